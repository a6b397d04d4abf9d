"""Upcycled layers compute what the dense MLP did, and what could not is refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from hf_models import relative

import moesaic as ms
from moesaic.engine.spec import ExpertSpec
from moesaic.layer.upcycle import DenseMLP, redrawn, upcycled

HIDDEN, WIDTH = 24, 48
RULES = {
    "mixtral": {},
    "deepseek-v3": {"n_shared_experts": 0, "n_group": 2, "topk_group": 1},
    "qwen3-moe": {},
    "gpt-oss": {},
    "classic": {"expert_bias": True, "output_size": 16},
}


def layer_config(preset: str = "mixtral", *, copies=8, visits=2, granularity=1, **fields) -> ms.MoEConfig:
    sizes = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH // granularity,
        "n_routed_experts": copies * granularity,
        "num_experts_per_tok": visits * granularity,
    }
    return ms.MoEConfig.preset(preset, **{**RULES.get(preset, {}), **sizes, **fields})


def dense_mlp(config: ms.MoEConfig, dtype=torch.float64) -> DenseMLP:
    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    out = config.output_size or HIDDEN
    gate = drawn(WIDTH, HIDDEN) if config.gated else None
    biases = [drawn(WIDTH), drawn(out), drawn(WIDTH) if config.gated else None] if config.expert_bias else []
    return DenseMLP(drawn(WIDTH, HIDDEN), drawn(out, WIDTH), gate, *biases)


def apply(mlp: DenseMLP, x: torch.Tensor, config: ms.MoEConfig) -> torch.Tensor:
    up = F.linear(x, mlp.up_proj, mlp.up_bias)
    if mlp.gate_proj is not None:
        gate = F.linear(x, mlp.gate_proj, mlp.gate_bias)
        up = torch.stack([gate, up], -1).flatten(-2) if config.interleaved else torch.cat([gate, up], -1)
    return F.linear(ExpertSpec.of(config).activate(up), mlp.down_proj, mlp.down_bias)


def layer_of(mlp: DenseMLP, config: ms.MoEConfig, **options) -> ms.MoE:
    layer = ms.MoE(config, engine="reference", dtype=mlp.up_proj.dtype)
    layer.load_state_dict(upcycled(mlp, config, **options))
    return layer


@pytest.mark.parametrize("granularity", [1, 2, 3, 4])
@pytest.mark.parametrize("preset", RULES)
def test_a_layer_gives_the_dense_output_to_the_rounding_of_float64(preset, granularity):
    config = layer_config(preset, granularity=granularity)
    mlp = dense_mlp(config)
    x = torch.randn(50, HIDDEN, dtype=torch.float64)
    layer = layer_of(mlp, config, granularity=granularity, router_std=0.3)
    assert relative(layer(x), apply(mlp, x, config)) < 1e-12
    loads = torch.bincount(layer.gate(x).expert_ids.flatten(), minlength=config.n_routed_experts)
    assert (loads > 0).sum() > 2 * config.num_experts_per_tok, "tokens go different ways"


@pytest.mark.parametrize(("visits", "router_std"), [(1, 0.3), (2, 0.0), (4, 0.0)])
def test_where_the_weights_are_powers_of_two_copies_give_the_dense_output_bit_for_bit(visits, router_std):
    config = layer_config(visits=visits)
    mlp = dense_mlp(config, torch.float32)
    x = torch.randn(30, HIDDEN)
    by_row = torch.cat([apply(mlp, row[None], config) for row in x])  # as many rows as the layer has at a time
    assert torch.equal(layer_of(mlp, config, router_std=router_std)(x), by_row)


@pytest.mark.parametrize("granularity", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_gets_every_slice_equally_often_although_logits_tie(dtype, granularity):
    config = layer_config("qwen3-moe", granularity=granularity)
    layer = layer_of(dense_mlp(config, dtype), config, granularity=granularity)
    x = torch.randn(4000, HIDDEN).to(dtype)
    routing = layer.gate(x)
    slices = F.one_hot(routing.expert_ids % granularity, granularity).sum(1)
    assert (slices == 2).all()
    by_copy = routing.logits.unflatten(-1, (8, granularity))
    assert torch.equal(by_copy, by_copy[..., :1].expand_as(by_copy))
    if dtype == torch.bfloat16:
        best = by_copy[..., 0].sort(descending=True).values
        assert (best[:, 1] == best[:, 2]).any(), "no tie between copies was met"


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("fields", [{"norm_topk_prob": False}, {"norm_eps": 1e-3}])
def test_weights_that_add_up_to_another_sum_are_refused_or_scaled_where_the_router_is_zero(scoring, fields):
    config = layer_config(granularity=2, scoring_func=scoring, routed_scaling_factor=2.5, **fields)
    mlp = dense_mlp(config)
    with pytest.raises(ValueError, match=r"lets the weights of every token add up to another sum.*or router_std=0$"):
        upcycled(mlp, config, granularity=2)
    x = torch.randn(20, HIDDEN, dtype=torch.float64)
    assert relative(layer_of(mlp, config, granularity=2, router_std=0.0)(x), apply(mlp, x, config)) < 1e-12


def test_a_single_expert_with_its_raw_score_is_refused():
    config = layer_config(visits=1, norm_single_expert=False)
    with pytest.raises(ValueError, match=r"norm_single_expert=False lets the weights .* use norm_single_expert=True"):
        upcycled(dense_mlp(config), config)


@pytest.mark.parametrize(
    ("granularity", "fields", "message"),
    [
        (5, {}, "granularity=5 does not cut the width 48 into equal slices: use 4 or 6"),
        (0, {}, "granularity=0 does not cut the width 48"),
        (2, {"n_routed_experts": 9}, "n_routed_experts=9 is not a multiple of granularity=2: use 10"),
        (2, {"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not a multiple of granularity=2: use 4"),
        (2, {"moe_intermediate_size": 48}, "moe_intermediate_size=48 does not fit the dense MLP: use 24"),
        (1, {"hidden_size": 8}, "hidden_size=8 does not fit the dense MLP: use 24"),
        (1, {"output_size": 8}, "output_size=8 does not fit the dense MLP: use 24"),
        (1, {"n_shared_experts": 1}, "n_shared_experts=1 would add to the dense output: use 0"),
        (1, {"gated": False}, "gated=False and the dense MLP has a gate_proj: use gated=True"),
        (1, {"expert_bias": True}, "expert_bias=True and the dense MLP lacks a bias: give all of its biases"),
        (1, {"topk_method": "unknown"}, "topk_method='unknown' cannot be routed"),
        (
            4,
            {"topk_method": "group_limited_greedy", "n_group": 16, "topk_group": 8},
            "n_group=16 parts the slices of a copy: use n_group=1, or 4 slices in one group",
        ),
    ],
)
def test_sizes_and_rules_that_do_not_fit_are_refused(granularity, fields, message):
    config = layer_config(granularity=max(granularity, 1) if WIDTH % max(granularity, 1) == 0 else 1, **fields)
    mlp = dense_mlp(layer_config())
    with pytest.raises(ValueError, match=re.escape(message)):
        upcycled(mlp, config, granularity=granularity)


def test_noise_draws_a_share_of_the_units_of_every_expert_and_leaves_the_others():
    config = layer_config("qwen3-moe")
    mlp = dense_mlp(config, torch.float32)
    state = upcycled(mlp, config, noise=0.25)
    changed = set()
    for expert in range(8):
        rows = [
            (state[f"experts.{expert}.{name}.weight"] != whole).any(dim).nonzero().flatten()
            for name, whole, dim in (
                ("up_proj", mlp.up_proj, 1),
                ("gate_proj", mlp.gate_proj, 1),
                ("down_proj", mlp.down_proj, 0),
            )
        ]
        assert len(rows[0]) == WIDTH / 4
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
        changed.add(tuple(rows[0].tolist()))
    assert len(changed) == 8, "every expert has its own"
    with pytest.raises(ValueError, match=r"noise=1.5 is no share: use a number from 0 to 1"):
        upcycled(mlp, config, noise=1.5)


def test_what_is_drawn_anew_has_the_mean_and_deviation_of_its_matrix():
    mlp = DenseMLP(3 + 0.5 * torch.randn(400, 100), torch.randn(100, 400))
    anew = redrawn(mlp, 1.0)
    assert anew.up_proj.mean() == pytest.approx(3, abs=0.02)
    assert anew.up_proj.std() == pytest.approx(0.5, rel=0.02)
    assert (anew.up_proj != mlp.up_proj).all()


def test_equal_copies_drift_apart_because_they_see_other_tokens():
    """At the first step the router itself has no gradient: whichever copies are chosen, the output is the same."""
    config = layer_config()
    layer = layer_of(dense_mlp(config), config, router_std=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        layer(torch.randn(100, HIDDEN, dtype=torch.float64)).square().mean().backward()
        router, experts = layer.gate.weight.grad.abs().max(), layer.experts.down_proj.grad.abs().max()
        assert (router < 1e-12 * experts) == (step == 0)
        optimizer.step()
    assert len({tuple(expert.flatten().tolist()) for expert in layer.experts.down_proj}) == 8


def test_with_slices_the_router_has_a_gradient_from_the_first_step():
    config = layer_config(granularity=4)
    layer = layer_of(dense_mlp(config), config, granularity=4, router_std=0.3)
    layer(torch.randn(100, HIDDEN, dtype=torch.float64)).square().mean().backward()
    by_copy = layer.gate.weight.grad.unflatten(0, (8, 4))
    assert by_copy.abs().max() > 1e-3 * layer.experts.down_proj.grad.abs().max()
    assert by_copy.sum(1).abs().max() < 1e-9 * by_copy.abs().max(), "whole copies still do not matter"
