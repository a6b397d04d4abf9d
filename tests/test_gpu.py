"""What must hold on a CUDA device. Skipped where there is none."""

import pytest
import torch
from cases import GRID, v3
from oracles import densify

from moesaic.engine.select import ENGINES
from moesaic.layer.moe import DeepseekV3MoE
from moesaic.rules import largest, route
from moesaic.types import check_routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ties_go_to_the_lower_index_there_too(dtype):
    values = torch.randint(-3, 4, (500, 64)).to(dtype)
    assert torch.equal(largest(values.cuda(), 8).cpu(), largest(values, 8))


@pytest.mark.parametrize(("experts", "groups", "kept", "k"), GRID)
def test_the_same_logits_route_the_same(experts, groups, kept, k):
    config, logits, bias = v3(experts, groups, kept, k), torch.randn(300, experts), torch.randn(experts)
    here = route(logits, bias, config)
    there = check_routing(route(logits.cuda(), bias.cuda(), config), experts)
    same = (here.expert_ids == there.expert_ids.cpu()).all(1)
    assert same.float().mean() > 0.99, "sigmoid may differ in the last bit and move a near-tie"
    dense = densify(there.expert_ids.cpu(), there.weights.cpu(), experts)
    torch.testing.assert_close(dense[same], densify(here.expert_ids, here.weights, experts)[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_layer_computes_the_same(engine):
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1), engine=engine).double()
    x = torch.randn(40, 32, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-10, atol=1e-10)


def test_the_correction_bias_travels_unchanged():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    layer.gate.e_score_correction_bias.fill_(5.000123)
    bias = layer.to("cuda", torch.bfloat16).gate.e_score_correction_bias
    assert (bias.device.type, bias.dtype) == ("cuda", torch.float32)
    assert bias.eq(torch.tensor(5.000123)).all()
