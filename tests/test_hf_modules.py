import pytest
import torch
from cases import v3
from hf_models import FAMILIES, tiny, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

import moesaic as ms
from moesaic.config import MoEConfig
from moesaic.hf.modules import is_recompute, moe_layers
from moesaic.layer.moe import DeepseekV3MoE, MoE
from moesaic.layer.router import Router


@pytest.mark.parametrize("family", FAMILIES)
def test_moe_layers_are_found_in_the_order_in_which_they_run(family):
    model, order = tiny(family), []
    layers = moe_layers(model)
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda *_, name=layer.name: order.append(name))
    model(token_ids())
    dense_layers = 1 if "first_k_dense_replace" in FAMILIES[family][2] else 0
    assert order == [layer.name for layer in layers]
    assert len(layers) == 3 - dense_layers
    for layer in layers:
        assert layer.router.weight.dim() == 2
        assert not hasattr(layer.experts, "weight")
        assert layer.config == MoEConfig.from_hf(model.config)


def test_experts_that_are_spread_over_ranks_are_refused_where_a_rank_is_told_of_its_own_only():
    """As transformers 5.17 spreads them; test_expert_parallel.py has what later ones do."""
    model = tiny("qwen3_moe")
    for layer in moe_layers(model):
        layer.experts.num_experts //= 2
    with pytest.raises(ValueError, match=r"layers\.0\.mlp: its experts are spread over ranks.*use transformers 5\.24"):
        moe_layers(model)


def test_our_own_layers_are_found_with_their_own_config():
    first, second = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1)), MoE.classic(32, 8, 32, 6, 2)
    layers = moe_layers(nn.Sequential(first, nn.ReLU(), second))
    assert [layer.name for layer in layers] == ["0", "2"]
    assert [layer.config for layer in layers] == [first.config, second.config]
    assert layers[0].router is first.gate
    assert layers[1].experts is second.experts


def test_a_layer_and_a_gate_are_models_too():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    assert [found.name for found in moe_layers(layer)] == [""]
    gate = moe_layers(layer.gate)
    assert gate[0].router is layer.gate
    assert gate[0].experts is None


def test_experts_that_two_gates_share_are_refused_and_a_layer_that_is_there_twice_is_one():
    first, second = DeepseekV3MoE(v3(16, 4, 2, 4)), DeepseekV3MoE(v3(16, 4, 2, 4))
    second.experts = first.experts
    with pytest.raises(ValueError, match=r"^0 and 1 share their experts and not their router: which of them chose"):
        moe_layers(nn.Sequential(first, second))
    second.gate = first.gate
    assert [layer.name for layer in moe_layers(nn.Sequential(first, second))] == ["0"]


def test_of_a_family_that_is_not_known_the_sizes_are_read_and_a_given_config_stands_in(monkeypatch):
    model = tiny("mixtral")
    config = MoEConfig.from_hf(model.config)
    monkeypatch.setattr(type(model.config), "model_type", "never_heard_of")
    found = moe_layers(model)[0].config
    assert not found.rule_is_known
    assert (found.n_routed_experts, found.num_experts_per_tok, found.hidden_size) == (8, 2, 32)
    assert moe_layers(model, config)[0].config is config


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(Router(v3(8, 1, 1, 2)), nn.Linear(4, 4))], ids=type)
def test_what_has_no_experts_is_refused(model):
    with pytest.raises(ValueError, match=r"^not an MoE model: \w+ has no module with a gate and fused experts"):
        moe_layers(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_is_told_from_forward(reentrant):
    seen = []
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))  # what comes last is not recomputed
    layer[0].register_forward_hook(lambda *_: seen.append(is_recompute()))
    checkpoint(layer, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
    layer(torch.randn(2, 4)).sum().backward()
    assert seen == [False, True, False]


@pytest.mark.parametrize(
    "ask",
    [
        moe_layers,
        ms.attach,
        lambda model: ms.BiasBalance(1e-3).attach(model),
        lambda model: ms.BalanceLoss("switch", 1e-2).attach(model),
        lambda model: ms.record(model).__enter__(),
        lambda model: ms.replay(model, None).__enter__(),
    ],
    ids=["moe_layers", "attach", "BiasBalance", "BalanceLoss", "record", "replay"],
)
def test_the_name_of_a_model_is_no_model(ask):
    with pytest.raises(ValueError, match="model='qwen3' is no module: give a model of torch"):
        ask("qwen3")
