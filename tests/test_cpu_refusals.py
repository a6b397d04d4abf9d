"""What the CPU engine refuses, and in which words."""

import pytest
import torch
from cases import problem

from moesaic.engine import gemm
from moesaic.engine.cpu import cpu
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


def wrong(**changes):
    x, ids, weights, experts = problem(5)
    given = {"x": x, "ids": ids, "weights": weights, "up": experts.up, "down": experts.down, "spec": ExpertSpec()}
    given.update({name: change(given[name]) for name, change in changes.items()})
    return lambda: cpu(given["x"], given["ids"], given["weights"], ExpertWeights(given["up"], given["down"]),
                       given["spec"])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda x: x[None]}, r"tokens \(1, 5, 16\).*flatten leading axes"),
        ({"x": lambda x: x[:4]}, r"do not fit tokens \(4, 16\)"),
        ({"weights": lambda w: w[:, :2]}, r"expert_ids \(5, 3\) and weights \(5, 2\)"),
        ({"x": lambda x: x[:, :15]}, r"tokens have width 15, up \(6, 16, 16\) takes 16"),
        ({"ids": lambda ids: ids.float()}, r"expert_ids are torch.float32: give int64"),
        ({"x": lambda x: x.long()}, r"tokens are torch.int64: give one of torch.float32"),
        ({"x": lambda x: x.bfloat16()}, r"tokens are torch.bfloat16, up is torch.float32.*autocast"),
        ({"ids": lambda ids: ids * 0 + 7}, r"expert_ids reach from 7 to 7: there are 6 experts, 0 to 5, and 6 means"),
        ({"ids": lambda ids: ids * 0 - 6}, r"expert_ids reach from -6"),
        ({"down": lambda d: d[:5]}, r"up \(6, 16, 16\) and down \(5, 16, 8\)"),
        ({"down": lambda d: d[:, :, :7]}, r"gives 16, down \(6, 16, 7\) takes 7: gated experts give twice"),
        ({"up": lambda u: u[0]}, r"one matrix an expert"),
        ({"x": lambda x: x.detach().to("meta")}, r"engine='cpu' was given tokens on meta"),
        ({"up": lambda u: u.detach().to("meta")}, r"tokens are on cpu, up on meta"),
        ({"spec": lambda _: ExpertSpec(gated=False)}, r"give as many"),
        ({"x": lambda x: x.detach().to(torch.float8_e4m3fn)}, r"tokens are torch.float8_e4m3fn: give one of"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changes)()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_experts_of_a_dtype_that_needs_scales_are_refused_under_autocast_too(dtype):
    x, ids, weights, experts = problem(5)
    packed = ExpertWeights(*(w.detach().to(dtype) for w in experts[:2]))
    message = f"up are {dtype}: give one of torch.float32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        cpu(x, ids, weights, packed, ExpertSpec())


def test_half_weights_under_bfloat16_autocast_do_not_overflow(monkeypatch):
    """bfloat16 rows reach further than float16: they are not to be rounded to the weights' dtype."""
    for native in (True, False):
        monkeypatch.setattr(gemm, "has_instructions", lambda _, native=native: native)
        x, ids, weights, experts = problem(2)
        half = ExpertWeights(*(w.detach().half() for w in experts[:2]))
        with torch.autocast("cpu", torch.bfloat16):
            out = cpu(1e5 * x.detach(), ids, weights.detach(), half, ExpertSpec(activation="relu", gated=True))
        assert out.isfinite().all()


def test_ids_out_of_range_are_named_in_functional_transforms_too():
    x, ids, weights, experts = problem(5)
    with pytest.raises(ValueError, match="expert_ids reach from 7 to 7"):
        torch.func.grad(lambda up: cpu(x, ids * 0 + 7, weights, experts._replace(up=up), ExpertSpec()).sum())(
            experts.up
        )


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='swish' is unknown: use one of silu, gelu"):
        ExpertSpec(activation="swish")


@pytest.mark.parametrize("ignored", [{"limit": 7.0}, {"up_offset": 1.0}, {"interleaved": True}, {"up_softcap": 4.0}])
def test_what_experts_without_a_gate_cannot_do_is_refused(ignored):
    with pytest.raises(ValueError, match=f"{next(iter(ignored))}=.* is for gated experts"):
        ExpertSpec(gated=False, **ignored)


def test_a_slope_of_another_activation_than_silu_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1\.702 is the slope of SiLU"):
        ExpertSpec("gelu", alpha=1.702)


def test_bounds_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"gate_softcap=4\.0 is for SiLU: use activation='silu'"):
        ExpertSpec("gelu", gate_softcap=4.0)
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        for name in ("limit", "up_softcap"):
            with pytest.raises(ValueError, match=rf"{name}={cap} is no bound: use a positive finite number, or None"):
                ExpertSpec(**{name: cap})


def test_a_bias_of_the_wrong_size_is_named():
    x, ids, weights, experts = problem(5)
    with pytest.raises(ValueError, match=r"down_bias is \(6, 15\): give \[6, 16\]"):
        cpu(x, ids, weights, experts._replace(down_bias=torch.zeros(6, 15)), ExpertSpec())


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_is_refused_with_a_way_out(grad):
    x, ids, weights, experts = problem(5)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match="vmap over experts is not supported: flatten the mapped axis"),
    ):
        torch.func.vmap(lambda row: cpu(row, ids, weights, experts, ExpertSpec()))(torch.stack([x, x]))


def test_functional_gradients_work():
    x, ids, weights, experts = problem(5)
    by_func = torch.func.grad(lambda up: cpu(x, ids, weights, experts._replace(up=up), ExpertSpec()).square().sum())
    (expected,) = torch.autograd.grad(cpu(x, ids, weights, experts, ExpertSpec()).square().sum(), experts.up)
    torch.testing.assert_close(by_func(experts.up.detach()), expected)
