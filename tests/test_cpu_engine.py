"""The CPU engine: exact, the same every time, and bounded in memory."""

import gc
import math
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import HABITS, in_every_way, leaves_of, needs_habit, problem
from oracles import moe_by_token
from test_engines import DTYPES, VARIANTS, K, ids_of, weights_like
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.engine import batches, gemm, matmul_forms, outer
from moesaic.engine import cpu as engine
from moesaic.engine.cpu import cpu
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

SIZES = [(1, 64, 32), (3, 33, 17), (40, 64, 32), (200, 48, 24)]  # tokens, D, I


def of_kind(variant, tokens, dtype, **sizes):
    """A problem of one of VARIANTS, and a gradient of its result. With a clamp where gpt-oss has it: at 0.5 the error
    of gradients is how many numbers fall on its other side."""
    spec, layout = VARIANTS[variant]
    spec, experts = replace(spec, limit=spec.limit and 7.0), weights_like(dtype, **sizes, **layout)
    weights = torch.rand(tokens, K).to(dtype).requires_grad_()
    x = torch.randn(tokens, experts.up.shape[1 if spec.transposed else 2]).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, spec.output_size(experts)).to(dtype)
    return x, ids_of("sentinels", tokens), weights, experts, spec, upstream


def result_and_gradients(run, x, ids, weights, experts, spec, upstream):
    out = run(x, ids, weights, experts, spec)
    return [out.detach(), *torch.autograd.grad(out, leaves_of(x, weights, experts), upstream)]


def exact(x, ids, weights, experts, spec, upstream):
    """What `result_and_gradients` is in float64, by the definition."""
    x, weights, *wide = (None if t is None else t.detach().double().requires_grad_() for t in (x, weights, *experts))
    return result_and_gradients(reference, x, ids, weights, ExpertWeights(*wide), spec, upstream.double())


def large_from(monkeypatch, habit, small, dtype=torch.float32):
    """Each habit takes its own forms for matrices of more elements than `small`."""
    needs_habit(habit, dtype)
    for room in (gemm, outer):
        monkeypatch.setattr(room, "machine", lambda: habit)
    for room in (matmul_forms, outer):
        monkeypatch.setattr(room, "SMALL", small)


@pytest.mark.parametrize(("tokens", "d", "width"), SIZES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("variant", ["swiglu", "relu squared", "gpt-oss"])
def test_float32_equals_the_reference_forward_and_backward(
    monkeypatch, with_threads, tokens, d, width, threads, habit, variant
):
    large_from(monkeypatch, habit, 0)
    monkeypatch.setattr(matmul_forms, "LEAST", matmul_forms.UNIT)  # matrices of these sizes are cut too
    with_threads(threads)
    given = of_kind(variant, tokens, torch.float32, d=d, width=width, out=d)
    for got, true in zip(result_and_gradients(cpu, *given), exact(*given), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))


def errors(found, true):
    """Of the result and of every gradient, over several problems, for the error of a few numbers alone is luck."""
    total = sum(
        torch.tensor([[float((a - b).square().sum()), float(b.square().sum())] for a, b in zip(*pair, strict=True)])
        for pair in zip(found, true, strict=True)
    )
    return (total[:, 0] / total[:, 1]).sqrt()


@cache
def yardstick(make, repeats, *sizes):
    """(problems, what they are in float64, the errors of plain torch): one for whatever a CPU has for 16 bits."""
    problems = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        problems.append(make(*sizes))
    true = [exact(*given) for given in problems]
    return problems, true, errors([result_and_gradients(reference, *given) for given in problems], true)


def of_tokens(dtype, tokens):
    return *problem(tokens, 96, 48, dtype=dtype), ExpertSpec(), torch.randn(tokens, 96).to(dtype)


@pytest.mark.usefixtures("instructions")
@in_every_way(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("tokens", [1, 5, 60, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_16_bit_is_no_worse_than_plain_torch_in_that_dtype(with_threads, dtype, tokens, threads):
    """Every way of multiplying, whatever this machine has; the yardstick is the plain formula in the same dtype."""
    problems, true, plain = yardstick(of_tokens, math.ceil(60 / tokens), dtype, tokens)
    with_threads(threads)
    assert (errors([result_and_gradients(cpu, *given) for given in problems], true) <= 1.1 * plain).all()


@pytest.mark.usefixtures("instructions")
@in_every_way(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "swiglu"])
def test_16_bit_experts_of_every_kind_are_no_worse_than_plain_torch(dtype, variant):
    """The H that is kept is rounded as a product and, where it has a bias, once more, as in transformers' gpt-oss; the
    yardstick rounds once. In the gradient of the routing weights a square doubles that, and nothing averages it out.
    """
    problems, true, plain = yardstick(of_kind, 10, variant, 80, dtype)
    allowed = torch.full_like(plain, 1.1)
    if VARIANTS[variant][0].activation == "relu2":
        allowed[2] = 1.6
    assert (errors([result_and_gradients(cpu, *given) for given in problems], true) <= allowed * plain).all()


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit_without_the_instructions_is_right_under_every_habit(monkeypatch, habit, dtype, transposed):
    """Experts of one to forty rows, forward and backward: narrow and widened matmuls beside each other."""
    needs_habit(habit, dtype)
    monkeypatch.setattr(gemm, "has_instructions", lambda _: False)
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    x, _, _, experts = problem(63, 32, 16, dtype=dtype)
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 40, 2, 9, 8, 3]))[:, None]
    weights = torch.rand(63, 1).to(dtype).requires_grad_()
    if transposed:
        experts = ExpertWeights(*(nn.Parameter(w.detach().mT.contiguous()) for w in experts[:2]))
    given = (x, ids, weights, experts, ExpertSpec(transposed=transposed), torch.randn(63, 32).to(dtype))
    for found, true in zip(result_and_gradients(cpu, *given), exact(*given), strict=True):
        assert (found.double() - true).norm() < (6e-3 if dtype == torch.bfloat16 else 8e-4) * true.norm()


def test_the_check_sees_the_oracle():
    """The yardstick of this file against the numpy definition."""
    x, ids, weights, experts = problem(7, dtype=torch.float64)
    out = cpu(x, ids, weights, experts, ExpertSpec()).detach()
    assert abs(out.numpy() - moe_by_token(x, ids, weights, *experts[:2])).max() < 1e-12


WAYS = [(torch.float32, habit, "none") for habit in HABITS]
WAYS += [(dtype, "intel", has) for dtype in (torch.bfloat16, torch.float16) for has in ("amx", "native", "none")]
WAYS += [(torch.bfloat16, habit, "none") for habit in HABITS[1:]]


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("dtype", "habit", "instructions"), WAYS, indirect=["instructions"], ids=str)
@pytest.mark.parametrize("tokens", [9, 200])
def test_results_repeat_bit_for_bit(monkeypatch, with_threads, dtype, tokens, habit):
    """Of a weight in the forms for large ones and another in those for small ones; also added to gradients that are."""
    large_from(monkeypatch, habit, 1 << 15, dtype)
    monkeypatch.setattr(outer, "PART", 1 << 13)
    x, ids, weights, experts = problem(tokens, 256, 96, dtype=dtype)
    leaves, upstream = leaves_of(x, weights, experts), torch.randn(tokens, 256).to(dtype)
    before, runs = [torch.randn_like(leaf) for leaf in leaves], []
    with_threads(2)
    for _ in range(3):
        out = cpu(x, ids, weights, experts, ExpertSpec())
        fresh = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad.clone()
        out.backward(upstream)
        runs.append([out, *fresh, *(leaf.grad for leaf in leaves)])
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("variant", ["swiglu", "geglu", "softcapped", "plain mlp", "gpt-oss"])
@in_every_way(*DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_batch_invariant_rows_do_not_depend_on_their_companions(with_threads, variant, dtype, threads, grad):
    spec, layout = VARIANTS[variant]
    experts = ExpertWeights(*(None if w is None else w.requires_grad_(grad) for w in weights_like(dtype, **layout)))
    ids, weights = ids_of("an empty expert", 150), torch.rand(150, K).to(dtype)
    x = torch.randn(150, experts.up.shape[1 if spec.transposed else 2]).to(dtype)
    with_threads(threads)
    whole = cpu(x, ids, weights, experts, spec, batch_invariant=True)
    for rows in (torch.randperm(150), torch.arange(7, 40), torch.tensor([149]), torch.arange(0, 150, 3)):
        part = cpu(x[rows], ids[rows], weights[rows], experts, spec, batch_invariant=True)
        assert torch.equal(part, whole[rows])


def test_batch_invariance_holds_in_functional_transforms():
    x, ids, weights, experts = problem(60, 96, 48)

    def run(*rows):
        call = lambda *rows: cpu(rows[0], ids[rows[1]], rows[2], experts, ExpertSpec(), batch_invariant=True)  # noqa: E731
        return torch.func.vjp(lambda x, weights: call(x, rows[1], weights), rows[0], rows[2])[0]

    everything = torch.arange(60)
    whole = run(x, everything, weights)
    for rows in (torch.randperm(60), torch.arange(3), torch.tensor([41])):
        assert torch.equal(run(x[rows], rows, weights[rows]), whole[rows])


@pytest.mark.parametrize(("d", "width"), [(256, 768), (100, 1500), (64, 33)])
def test_batch_invariance_holds_at_widths_where_torch_splits_the_work(with_threads, d, width):
    with_threads(2)
    x, ids, weights, experts = problem(90, d, width, k=2)
    whole = cpu(x, ids, weights, experts, ExpertSpec(), batch_invariant=True)
    for rows in (torch.randperm(90), torch.arange(3), torch.tensor([41])):
        part = cpu(x[rows], ids[rows], weights[rows], experts, ExpertSpec(), batch_invariant=True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [128, 1024, 15000, 40000])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("gated", [True, False])
def test_batch_invariance_holds_for_one_row_of_an_expert(with_threads, threads, width, activation, gated):
    """As in decoding: torch gives the GELU of one row and that of several to other loops, and splits it early."""
    with_threads(threads)
    spec, d, n = ExpertSpec(activation, gated=gated), 16, 35
    shapes = (2, width * (2 if gated else 1), d), (2, d, width)
    experts = ExpertWeights(*(torch.randn(shape) / 4 for shape in shapes))
    x, ids, weights = 3 * torch.randn(n, d), torch.zeros(n, 1, dtype=torch.int64), torch.rand(n, 1)
    whole = cpu(x, ids, weights, experts, spec, batch_invariant=True)
    for rows in (*torch.arange(n).split(1)[:5], torch.arange(n - 1), torch.arange(1, n)):
        part = cpu(x[rows], ids[rows], weights[rows], experts, spec, batch_invariant=True)
        assert torch.equal(part, whole[rows])


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "view" not in str(func) and not out._is_view():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("skew", [None, 1.0])
def test_no_tensor_is_as_large_as_all_rows_of_the_model_width(skew):
    tokens, d, width, k = 3000, 64, 8, 3
    x, ids, weights, experts = problem(tokens, d, width, k=k, skew=skew)
    with torch.no_grad(), Largest() as largest:
        out, hidden, order, counts = engine.forward(
            x, ids, weights, experts, ExpertSpec(), keep="hidden", batch_invariant=False
        )
        engine.backward(
            out, x, weights, experts, hidden, order, counts, ExpertSpec(), engine.Gradients(1, 1, 1, 1, 0, 0)
        )
    assert largest.elements <= max(tokens * d, tokens * k * 2 * width)  # the output, or H


def test_a_hot_expert_is_cut_so_that_scratch_does_not_grow_with_it():
    rows = [
        piece.stop - piece.start
        for batch in batches.batches([0, 5000, 3], torch.arange(5003))
        for piece in batch.pieces
    ]
    assert sum(rows) == 5003
    assert max(rows) == batches.PIECE_ROWS
    assert all(len(b.rows) <= batches.PIECE_ROWS for b in batches.batches([400] * 20, torch.arange(8000)))


@pytest.mark.parametrize(("recompute", "kept"), [(False, "hidden"), (True, "nothing else")])
def test_only_tokens_hidden_and_metadata_are_kept(recompute, kept):
    tokens, d, width, k, n = 50, 32, 16, 3, 6
    x, ids, weights, experts = problem(tokens, d, width)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        cpu(x, ids, weights, experts, ExpertSpec(), recompute=recompute)
    given = {t.data_ptr() for t in (x, ids, weights, *experts[:2])}
    sizes = sorted(t.numel() for pointer, t in saved.items() if pointer not in given and t.numel())
    assert sizes == sorted([n, tokens * k, *([tokens * k * 2 * width] if kept == "hidden" else [])])


@pytest.mark.parametrize(("how", "kept"), [("no_grad", "nothing"), ("frozen", "nothing"), ("trained", "hidden")])
def test_nothing_is_kept_where_nothing_needs_a_gradient(how, kept):
    x, ids, weights, experts = problem()
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moesaic.experts.default:
                asked.append(args[-2])
            return func(*args, **(kwargs or {}))

    if how == "frozen":
        x, weights, experts = x.detach(), weights.detach(), ExpertWeights(*(w.detach() for w in experts[:2]))
    with torch.set_grad_enabled(how != "no_grad"), Watch():
        out = cpu(x, ids, weights, experts, ExpertSpec())
    assert (out.grad_fn is not None) == (kept == "hidden")
    assert asked == [kept]
    with torch.no_grad():
        _, hidden, _, _ = engine.forward(x, ids, weights, experts, ExpertSpec(), keep=kept, batch_invariant=False)
    assert (hidden.numel() > 0) == (kept == "hidden")


def test_memory_returns_to_the_baseline():
    alive = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    alive.append(weakref.ref(t))
            return out

    x, ids, weights, experts = problem(100, 32, 16)
    with torch.no_grad(), Watch():
        out, *rest = engine.forward(x, ids, weights, experts, ExpertSpec(), keep="hidden", batch_invariant=False)
        for into in ((None, None), tuple(map(torch.zeros_like, experts[:2]))):  # new gradients, and added to ones
            wanted = engine.Gradients(1, 1, 1, 1, 0, 0)
            engine.backward(out, x, weights, experts, *rest, ExpertSpec(), wanted, *into)
        del out, rest, into
        with torch.enable_grad():
            cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    assert len(alive) > 40
    for leaf in leaves_of(x, weights, experts):
        leaf.grad = None
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
