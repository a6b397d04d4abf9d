"""The backward of the CPU engine: what it computes and what it leaves."""

from functools import partial

import pytest
import torch
from cases import HABITS, in_every_way, leaves_of, needs_habit, problem
from test_cpu_engine import errors, of_kind, result_and_gradients, yardstick
from test_engines import FEW, VARIANTS, D, K, ids_of, weights_like
from torch import nn

import moesaic as ms
from moesaic.engine import batches, gemm, matmul_forms, multiply, op, outer
from moesaic.engine.cpu import cpu
from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("variant", ["swiglu", "biased", "gpt-oss"])
@in_every_way(torch.float32, torch.bfloat16, torch.float16)
def test_recomputing_gives_the_same_gradients(variant, dtype):
    spec, layout = VARIANTS[variant]
    experts = ExpertWeights(*(None if w is None else nn.Parameter(w) for w in weights_like(dtype, **layout)))
    ids = ids_of("an empty expert", 60)
    weights = torch.rand(60, K).to(dtype).requires_grad_()
    x = torch.randn(60, experts.up.shape[1 if spec.transposed else 2]).to(dtype).requires_grad_()
    upstream = torch.randn_like(cpu(x, ids, weights, experts, spec))
    kept, again = (
        torch.autograd.grad(
            cpu(x, ids, weights, experts, spec, recompute=recompute), leaves_of(x, weights, experts), upstream
        )
        for recompute in (False, True)
    )
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("frozen", ["x", "weights", "up", "down", "up and down", "x and weights and up"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_matmul(monkeypatch, frozen):
    x, ids, weights, experts = problem(40, 32, 16)
    named = {"x": x, "weights": weights, "up": experts.up, "down": experts.down}
    expected = dict(zip(named, torch.autograd.grad(
        cpu(x, ids, weights, experts, ExpertSpec()).square().sum(), list(named.values())), strict=True))  # fmt: skip
    outer_products, through = [], []
    real, real_backward = multiply.add_outer, ExpertSpec.activate_backward
    monkeypatch.setattr(ExpertSpec, "activate_backward", lambda *a: (through.append(a), real_backward(*a))[1])
    monkeypatch.setattr(multiply, "add_outer", lambda out, *a, **k: (outer_products.append(out), real(out, *a, **k)))
    for name in frozen.split(" and "):
        named[name].requires_grad_(False)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    for name, tensor in named.items():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected[name])
        else:
            assert tensor.grad is None
    assert bool(through) == any(named[name].requires_grad for name in ("x", "weights", "up"))
    trained = sum(named[name].requires_grad for name in ("up", "down"))
    assert len(outer_products) == trained * len(ids.unique())


@pytest.mark.parametrize("trained", ["biases", "matrices", "down_bias"])
def test_biases_and_matrices_train_without_each_other(monkeypatch, trained):
    x, ids, weights, plain = (
        torch.randn(40, D),
        ids_of("an empty expert", 40),
        torch.rand(40, K),
        weights_like(torch.float32, bias=True),
    )
    names = {"biases": ("up_bias", "down_bias"), "matrices": ("up", "down"), "down_bias": ("down_bias",)}[trained]
    experts = ExpertWeights(**{
        name: nn.Parameter(w.detach()) if name in names else w.detach() for name, w in plain._asdict().items()
    })  # fmt: skip
    leaves = [getattr(experts, name) for name in names]
    out = cpu(x, ids, weights, experts, ExpertSpec())
    expected = reference(x, ids, weights, experts, ExpertSpec())
    kept = [t for t in out.grad_fn.saved_tensors if t is not None and t.shape == (ids.numel(), experts.up.shape[1])]
    assert len(kept) == (trained != "down_bias"), "the gradient of down's biases needs no H, and all others do"
    monkeypatch.setattr(multiply.Multiply, "__call__", lambda *_: pytest.fail("a matmul")) if not kept else None
    for ours, true in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


def test_a_gradient_with_a_graph_of_nothing_is_zero():
    x, ids, weights, experts = problem(5)
    leaves = leaves_of(x, weights, experts)
    out = cpu(x, ids * 0 + 6, weights, experts, ExpertSpec())  # 6: no expert
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves, create_graph=True), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_weights_that_are_no_leaves_get_their_gradient_through_autograd():
    """LoRA: the expert matrices are computed from others."""
    x, ids, weights, experts = problem(30, 16, 8)
    low = nn.Parameter(torch.randn(6, 16, 2) * 0.1)
    for _ in range(2):
        up = experts.up + low @ low.mT[..., :16]
        cpu(x, ids, weights, ExpertWeights(up, experts.down), ExpertSpec()).square().sum().backward()
    ours, base = low.grad.clone(), experts.up.grad.clone()
    low.grad = experts.up.grad = None
    for _ in range(2):
        up = experts.up + low @ low.mT[..., :16]
        reference(x, ids, weights, ExpertWeights(up, experts.down), ExpertSpec()).square().sum().backward()
    torch.testing.assert_close(ours, low.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base, experts.up.grad, rtol=1e-4, atol=1e-5)


def grad_of_tokens(loss, x):
    (grad,) = torch.autograd.grad(loss, x)
    return grad


def backward_to_tokens(loss, x):
    loss.backward(inputs=[x])
    return x.grad


def grad_with_a_graph(loss, x):
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return grad.detach()


@pytest.mark.parametrize("ask", [grad_of_tokens, backward_to_tokens, grad_with_a_graph])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_that_a_backward_does_not_collect_are_not_computed(monkeypatch, ask, adapted):
    """Weights may be leaves or, as with LoRA, results; either way only the tokens' gradient is asked for."""
    x, ids, weights, experts = problem(30, 16, 8)
    used = ExpertWeights(*(w * 1 for w in experts[:2])) if adapted else experts
    loss = cpu(x, ids, weights, used, ExpertSpec()).square().sum()
    loss.backward(retain_graph=True)
    expected, x.grad = x.grad, None
    before = [w.grad.clone() for w in experts[:2]]
    wanted = []
    real = op._plain_backward
    monkeypatch.setattr(op, "_plain_backward", lambda *a, **how: (wanted.extend(a[3]), real(*a, **how))[1])
    monkeypatch.setattr(multiply, "add_outer", lambda *_, **__: pytest.fail("a product that nobody asked for"))
    torch.testing.assert_close(ask(loss, x), expected, rtol=1e-4, atol=1e-4)
    assert wanted == ([True, *[False] * 5] if ask is grad_with_a_graph else [])
    assert all(torch.equal(w.grad, grad) for w, grad in zip(experts[:2], before, strict=True))


@pytest.mark.parametrize("variant", ["swiglu", "gpt-oss"])
def test_gradients_of_gradients(variant):
    spec, layout = VARIANTS[variant]
    experts, ids = weights_like(torch.float64, **layout, **FEW), ids_of("sentinels", 4)
    x = torch.randn(4, FEW["d"], dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, K, dtype=torch.float64, requires_grad=True)
    given_weights = [w for w in experts if w is not None]

    def run(x, weights, *given_weights):
        return cpu(x, ids, weights, ExpertWeights(*given_weights), spec)

    assert torch.autograd.gradgradcheck(run, (x, weights, *given_weights))


@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_with_a_graph_go_through_the_gate_once(leaf):
    """Routing weights are made from the tokens: their path must not be counted twice."""
    config = ms.MoEConfig(hidden_size=16, moe_intermediate_size=8, n_routed_experts=6, num_experts_per_tok=2)
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("cpu", "reference"):
        torch.manual_seed(0)
        layer = ms.MoE(config, engine=name).double()
        tokens = x if leaf else 2 * x
        (first,) = torch.autograd.grad(layer(tokens).square().sum(), tokens, create_graph=True)
        found.append((first, torch.autograd.grad(first.square().sum(), x)[0]))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)


def test_gradients_with_a_graph_of_an_autocast_forward():
    x, ids, weights, experts = problem(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cpu(x, ids, weights, experts, ExpertSpec()).square().sum()
    (first,) = torch.autograd.grad(loss, experts.up, create_graph=True)
    (plain,) = torch.autograd.grad(cpu(x, ids, weights, experts, ExpertSpec()).square().sum(), experts.up)
    assert float((first - plain).detach().norm() / plain.norm()) < 5e-2


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("variant", ["swiglu", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast_are_no_worse_than_those_of_inputs_cast_to_its_dtype(variant, dtype):
    """Of everything, against float64: weights and gradients stay float32, also where 16 bits are multiplied."""

    def autocast(*given):
        with torch.autocast("cpu", dtype):
            return cpu(*given)

    def narrow(x, ids, weights, experts, spec):
        experts = ExpertWeights(*(None if w is None else w.to(dtype) for w in experts))
        return reference(x.to(dtype), ids, weights.to(dtype), experts, spec).float()

    problems, true, _ = yardstick(partial(of_kind, d=32, width=24, out=32), 6, variant, 80, torch.float32)
    ours, allowed = (errors([result_and_gradients(run, *p) for p in problems], true) for run in (autocast, narrow))
    assert ours.gt(0).all(), "nothing is computed in 16 bits"
    assert (ours <= allowed).all(), (ours / allowed).tolist()


@pytest.mark.usefixtures("instructions")
def test_a_16_bit_gradient_of_a_hot_expert_is_rounded_once():
    tokens = 32 * batches.PIECE_ROWS
    x, weights = torch.rand(tokens, 8).bfloat16(), torch.rand(tokens, 1).bfloat16()
    ids = torch.zeros(tokens, 1, dtype=torch.long)
    experts = ExpertWeights(*(nn.Parameter(torch.rand(1, *shape).bfloat16()) for shape in ((8, 8), (8, 4))))
    upstream = torch.rand(tokens, 8).bfloat16()  # of equal rows every product would be rounded to the same side
    cpu(x, ids, weights, experts, ExpertSpec()).backward(upstream)
    plain, true = ([nn.Parameter(w.detach().to(dtype)) for w in experts[:2]] for dtype in (x.dtype, torch.float64))
    grouped(x, ids, weights, ExpertWeights(*plain), ExpertSpec()).backward(upstream)
    grouped(x.double(), ids, weights.double(), ExpertWeights(*true), ExpertSpec()).backward(upstream.double())
    for given, straight, exact in zip(experts[:2], plain, true, strict=True):
        ours, theirs = (float((w.grad.double() - exact.grad).norm() / exact.grad.norm()) for w in (given, straight))
        assert ours <= 1.2 * theirs + 1e-3


STRIDED = {
    "odd stride": lambda up: torch.cat([up, up[..., :1]], dim=2)[..., :16],
    "every other": lambda up: up.repeat_interleave(2, dim=2)[..., ::2],
    "offset": lambda up: torch.cat([up[:, :1], up], dim=1)[:, 1:],
    "one expert for all": lambda up: up[:1].expand(6, -1, -1),
    "one row for all": lambda up: up[:, :1].expand(-1, 16, -1),
    "one column for all": lambda up: up[..., :1].expand(-1, -1, 16),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("how", STRIDED)
@in_every_way(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_strided_weights_compute_and_train_as_their_copies(monkeypatch, how, dtype, habit, tokens):
    """In every form of matmul, each of which has its own idea of how a matrix lies in memory."""
    needs_habit(habit, dtype)
    for room in (gemm, outer):
        monkeypatch.setattr(room, "machine", lambda: habit)
    for room in (matmul_forms, outer):
        monkeypatch.setattr(room, "SMALL", 0)
    x, ids, weights, experts = problem(tokens, 16, 8, dtype=dtype)
    strided = STRIDED[how](experts.up.detach())
    results = []
    for up in (strided, strided.contiguous()):
        leaf = up.detach().requires_grad_()
        out = cpu(x, ids, weights, ExpertWeights(leaf, experts.down), ExpertSpec())
        results.append([out.detach(), *torch.autograd.grad(out.sum(), [x, leaf, experts.down])])
        with torch.no_grad():
            results[-1].append(cpu(x, ids, weights, ExpertWeights(leaf, experts.down), ExpertSpec()))
    loose = 2e-5 if dtype == torch.float32 else 3e-2
    for ours, copy in zip(*results, strict=True):
        torch.testing.assert_close(ours, copy, rtol=loose, atol=loose * float(copy.abs().max()))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_gradients_may_come_in_batches(how):
    x, ids, weights, experts = problem(6)
    leaves, several = [x, weights, *experts[:2]], torch.randn(3, 6, 16)
    out = cpu(x, ids, weights, experts, ExpertSpec())

    def ask(grad, **options):
        return torch.autograd.grad(out, leaves, grad, retain_graph=True, **options)

    together = ask(several, is_grads_batched=True) if how == "is_grads_batched" else torch.func.vmap(ask)(several)
    for ours, expected in zip(together, zip(*map(ask, several), strict=True), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_compiled_transform_has_the_gradient_of_an_eager_one():
    x, ids, weights, experts = problem(5)

    def loss(up):
        matrices = ExpertWeights(up, experts.down.detach())
        return cpu(x.detach(), ids, weights.detach(), matrices, ExpertSpec()).square().sum()

    up = experts.up.detach()
    eager = torch.func.grad(loss)(up)
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="aot_eager")(up), eager)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_has_its_tangent():
    x, ids, weights, experts = problem(9, dtype=torch.float64)
    tangent = torch.randn(9, 16, dtype=torch.float64)
    frozen = ExpertWeights(*(w.detach() for w in experts[:2]))
    both = []
    for engine_of in (cpu, reference):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
            out = engine_of(dual, ids, weights.detach(), frozen, ExpertSpec())
            both.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*both)
