"""The CPU engine: what it keeps, what it repeats, how it adds to gradients, what it refuses."""

import gc
import math
import weakref

import pytest
import torch
from oracles import moe_by_token
from test_engines import VARIANTS, K, ids_of, weights_like
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic as ms
from moesaic.engine import batches, gemm, memory, multiply, outer, processor
from moesaic.engine import cpu as engine
from moesaic.engine.cpu import cpu
from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

SIZES = [(1, 64, 32), (3, 33, 17), (40, 64, 32), (200, 48, 24)]  # tokens, D, I


def problem(tokens=20, d=16, width=8, n_experts=6, k=3, dtype=torch.float32, skew=None):
    """(x, ids, weights, experts) with leaves that want gradients; `skew` sends that share of slots to expert 2."""
    x = torch.randn(tokens, d, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])
    if skew is not None:
        ids = torch.full((tokens, k), n_experts)
        ids[: math.ceil(tokens * skew), 0] = 2
    weights = torch.rand(tokens, k, dtype=dtype, requires_grad=True)
    up = nn.Parameter(torch.randn(n_experts, 2 * width, d, dtype=dtype) / d**0.5)
    down = nn.Parameter(torch.randn(n_experts, d, width, dtype=dtype) / width**0.5)
    return x, ids, weights, ExpertWeights(up, down)


def leaves_of(x, weights, experts):
    return [x, weights, *(w for w in experts if w is not None)]


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "d", "width"), SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_float32_equals_the_reference_forward_and_backward(with_threads, tokens, d, width, threads):
    x, ids, weights, experts = problem(tokens, d, width)
    upstream = torch.randn(tokens, d)
    with_threads(threads)
    out = cpu(x, ids, weights, experts, ExpertSpec())
    grads = torch.autograd.grad(out, leaves_of(x, weights, experts), upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves_of(x, weights, experts)]
    expected = reference(wide[0], ids, wide[1], ExpertWeights(*wide[2:]), ExpertSpec())
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for got, true in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5 * float(true.detach().abs().max()))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 60, 300])
def test_16_bit_is_no_worse_than_plain_torch_in_that_dtype(dtype, tokens):
    """Every way of multiplying, whatever this machine has; the yardstick is the plain formula in the same dtype."""
    ours, plain = torch.zeros(5), torch.zeros(5)
    for _ in range(math.ceil(60 / tokens)):  # the error of a few numbers alone is luck
        x, ids, weights, experts = problem(tokens, 96, 48, dtype=dtype)
        upstream = torch.randn(tokens, 96).to(dtype)
        wide = [t.detach().double().requires_grad_() for t in leaves_of(x, weights, experts)]
        exact = reference(wide[0], ids, wide[1], ExpertWeights(*wide[2:]), ExpertSpec())
        truth = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
        for run, total in ((cpu, ours), (reference, plain)):
            out = run(x, ids, weights, experts, ExpertSpec())
            got = [out, *torch.autograd.grad(out, leaves_of(x, weights, experts), upstream)]
            pairs = zip(got, truth, strict=True)
            total += torch.tensor([float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in pairs])
    assert (ours <= 1.1 * plain).all()


@pytest.mark.parametrize("habit", ["intel", "amd", "other"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit_without_the_instructions_is_right_under_every_habit(monkeypatch, habit, dtype, transposed):
    """Experts of one to forty rows, forward and backward: narrow and widened matmuls beside each other."""
    if habit != "other" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "has_instructions", lambda _: False)
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(gemm, "SMALL", 0)
    x, _, _, experts = problem(63, 32, 16, dtype=dtype)
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 40, 2, 9, 8, 3]))[:, None]
    weights = torch.rand(63, 1).to(dtype).requires_grad_()
    if transposed:
        experts = ExpertWeights(*(nn.Parameter(w.detach().mT.contiguous()) for w in experts[:2]))
    leaves, upstream, spec = (
        leaves_of(x, weights, experts),
        torch.randn(63, 32).to(dtype),
        ExpertSpec(transposed=transposed),
    )
    out = cpu(x, ids, weights, experts, spec)
    got = [out, *torch.autograd.grad(out, leaves, upstream)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = reference(wide[0], ids, wide[1], ExpertWeights(*wide[2:]), spec)
    for found, true in zip(got, [exact, *torch.autograd.grad(exact, wide, upstream.double())], strict=True):
        error = (found.detach().double() - true.detach()).norm() / true.detach().norm()
        assert error < (6e-3 if dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("habit", ["intel", "amd", "other"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 70])
def test_widening_by_parts_computes_the_same(monkeypatch, habit, rows, transposed):
    if habit != "other" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(gemm, "SMALL", 0)
    inner = {"intel": gemm.columns_form, "amd": gemm.onednn_form, "other": gemm.rows_form}[habit]
    x, w = torch.randn(rows, 40), torch.randn(301, 40).bfloat16().mT
    w = w.contiguous() if transposed else w
    for elements in (1500, 5000, gemm.ANY):  # 8 parts of uneven width, 2, and the whole
        for form in (gemm.widening(elements, inner), gemm.widening_inputs(elements, inner)):
            out = torch.full((rows, 301), math.nan)
            form(x, w, out, memory.Workspace())
            torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 9, 45, 132, 133])
@pytest.mark.parametrize("aliased", [20, 512])  # 40 columns are padded, and are not
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("habit", ["intel", "amd"])
def test_a_gradient_in_parts_is_the_whole_gradient(
    monkeypatch, with_threads, habit, dtype, accumulate, aliased, rows, threads
):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    with_threads(threads)
    monkeypatch.setattr(outer, "machine", lambda: habit)
    monkeypatch.setattr(outer, "ALIASED", aliased)
    monkeypatch.setattr(outer, "PART", 300)
    monkeypatch.setattr(outer, "BLOCK", 5)
    monkeypatch.setattr(outer, "SMALL", 0)
    g, x, before = torch.randn(rows, 53), torch.randn(rows, 40), torch.randn(53, 40).to(dtype)
    out = before.clone() if accumulate else torch.full_like(before, math.nan)
    outer.add_outer(out, g, x, memory.Workspace(), accumulate=accumulate)
    exact = g.double().T @ x.double() + (before.double() if accumulate else 0)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [45, 132])
def test_a_gradient_in_16_bits_is_rounded_once(monkeypatch, rows):
    """With the instructions a product is rounded as it is written; in chunks it would be as often as there are."""
    monkeypatch.setattr(outer, "machine", lambda: "intel")
    monkeypatch.setattr(outer, "SMALL", 0)
    g, x = torch.randn(rows, 53).bfloat16(), torch.randn(rows, 40).bfloat16()
    calls, add_product = [], outer._add_product
    monkeypatch.setattr(outer, "_add_product", lambda *args: calls.append(len(args[1])) or add_product(*args))
    outer.outer_by_rows(torch.empty(53, 40).bfloat16(), g, x, beta=0.0)
    assert calls == [rows]
    calls.clear()
    outer.outer_by_rows(torch.empty(53, 40), g.float(), x.float(), beta=0.0)
    assert max(calls) <= outer.CHUNK, "in float32 it is in chunks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_pieces_may_be_looped_over(monkeypatch, transposed, dtype):
    """A batch-invariant forward that is computed again leaves the backward pieces of 32 rows, several of an expert."""
    monkeypatch.setattr(gemm, "machine", lambda: "intel")
    monkeypatch.setattr(gemm, "has_instructions", lambda _: False)
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(engine, "new_gradient", lambda w: new.append(w) or torch.full_like(w, math.nan))
    new, looped, real = [], [], multiply.Multiply._looped
    monkeypatch.setattr(
        multiply.Multiply, "_looped", lambda self, loads, *a, **kw: looped.append(loads) or real(self, loads, *a, **kw)
    )
    x, ids, weights, experts = problem(200, dtype=dtype)
    if transposed:
        experts = ExpertWeights(*(nn.Parameter(w.detach().mT.contiguous()) for w in experts[:2]))
    spec, leaves = ExpertSpec(transposed=transposed), leaves_of(x, weights, experts)
    out = cpu(x, ids, weights, experts, spec, batch_invariant=True, recompute=True)
    got = torch.autograd.grad(out.square().sum(), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = reference(exact[0], ids, exact[1], ExpertWeights(*exact[2:]), spec)
    for ours, theirs in zip(got, torch.autograd.grad(out.square().sum(), exact), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert len(new) == 2
    pieces = [loads for loads in looped if len(set(loads.experts)) < len(loads.experts)]
    assert bool(pieces) == (dtype == torch.float32 and not transposed), "W itself takes any number of rows"


@pytest.mark.parametrize("kind", ["float32", "bfloat16 widened", "transposed"])
@pytest.mark.parametrize("habit", ["intel", "amd", "other"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 16, 17, 48, 49, 63, 64, 100, 320, 321])
def test_every_form_of_matmul_computes_the_same(monkeypatch, kind, habit, rows):
    if habit != "other" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(gemm, "BLOCK", 5000)
    x, w = torch.randn(rows, 40), torch.randn(300, 40)
    if kind == "bfloat16 widened":
        w = w.bfloat16()
    if kind == "transposed":
        w = w.mT.contiguous().mT
    out = torch.full((rows, 300), math.nan)
    gemm.form_for(gemm.table_for(x.dtype, w.mT), rows)(x, w.mT, out, memory.Workspace())
    torch.testing.assert_close(out.double(), x.double() @ w.double().mT, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("habit", ["intel", "amd", "other"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_of_few_and_of_many_rows_in_one_batch(monkeypatch, habit, dtype, transposed):
    """On a CPU without the instructions the few are multiplied in 16 bits, the many in float32, none left out."""
    if habit != "other" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(gemm, "has_instructions", lambda _: False)
    for sizes in ([1, 2, 1], [1, 40, 3, 2, 9, 0, 4, 5, 1], [30, 20], [2, 2, 4]):
        (batch,) = batches.batches(sizes, torch.arange(sum(sizes)))
        x, stack = torch.randn(sum(sizes), 40), torch.randn(len(sizes), 40, 24).to(dtype)
        stack = stack if transposed else stack.mT.contiguous().mT
        got = multiply.Multiply(dtype)(batch, x, stack, "out", torch.full((len(x), 24), math.nan))
        expert = batch.expert_of_row()
        narrow = torch.tensor(sizes)[expert] <= gemm.most_rows(gemm.narrow_table(stack, dtype))
        rows = torch.where(narrow[:, None], x.to(dtype).double(), x.double())
        exact = torch.einsum("na,nab->nb", rows, stack[expert].double())
        error = (got.double() - exact).abs()
        assert (error[~narrow] < 1e-4).all()
        assert (error[narrow] <= torch.finfo(dtype).eps * exact[narrow].abs() + 1e-3).all(), "rounded once"
        assert not narrow.any() or error[narrow].max() > 1e-4, "the few rows were not multiplied in 16 bits"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["scratch", "given"])
@pytest.mark.parametrize(
    ("sizes", "looped"),
    [
        pytest.param([2, 1, 0, 3, 4], [10], id="as W is"),
        pytest.param([2, 1, 0, 3, 12], [18, 18], id="in blocks"),
        pytest.param([4, 2, 14, 20], [40, 40], id="in blocks, as many as may be on average"),
        pytest.param([5, 2, 14, 20], [], id="one more on average, and too few"),
        pytest.param([21, 1, 0, 3, 2, 2, 9, 1, 1, 1, 70, 0, 1, 2, 3, 0, 1], [118, 118], id="with two that are larger"),
        pytest.param([61, 1, 0, 3, 2, 2, 9, 1, 1, 1, 70, 0, 1, 2, 3, 0, 1], [27], id="before and after larger ones"),
        pytest.param([90, 10, 10, 10, 10, 90], [40, 40], id="four of as many as may be"),
        pytest.param([90, 8, 8, 11, 8, 8, 90], [32, 32], id="four, with one of 11 rows between them"),
        pytest.param([90, 8, 8, 11, 8, 90], [], id="three are too few"),
    ],
)
def test_experts_of_few_rows_go_through_torch_s_own_loop(monkeypatch, transposed, given, sizes, looped):
    """Experts of many rows, and of none, may lie between them, before and after."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "machine", lambda: "intel")
    monkeypatch.setattr(gemm, "SMALL", 0)
    # two parts, of 16 and 8 columns, where there are more than 3 rows on average
    monkeypatch.setattr(gemm, "BLOCK", 500)
    calls = []
    grouped_mm = multiply.F.grouped_mm
    monkeypatch.setattr(
        multiply.F, "grouped_mm", lambda x, *args, **kw: calls.append(len(x)) or grouped_mm(x, *args, **kw)
    )
    (batch,) = batches.batches(sizes, torch.arange(sum(sizes)))
    x, stack = torch.randn(sum(sizes), 40), torch.randn(len(sizes), 40, 24)
    stack = stack if transposed else stack.mT.contiguous().mT
    around = torch.full((len(x) + 5, 24), math.nan)
    got = multiply.Multiply(torch.float32)(batch, x, stack, "out", around[3:-2] if given else None)
    assert around[:3].isnan().all()
    assert around[-2:].isnan().all()
    assert not given or torch.equal(got, around[3:-2])
    exact = torch.einsum("na,nab->nb", x.double(), stack[batch.expert_of_row()].double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    assert calls == ([len(x)] if transposed else looped), "stored [in, out], any number of rows will do"


@pytest.mark.parametrize(
    ("habit", "sizes", "looped"),
    [
        # AMD multiplies 4 rows of 16-bit weights one by one, half the time of the call that the loop would make
        pytest.param("amd", [1, 2, 1, 1, 4, 2], [7], id="another form for larger ones"),
        pytest.param("intel", [1, 2, 1, 1, 5, 2], [12], id="three rows more, not worth leaving the loop"),
        pytest.param("intel", [1, 2, 1, 1, 6, 2], [7], id="four"),
        pytest.param("intel", [2, 3, 2, 2], [], id="too many on average, and three are too few"),
    ],
)
def test_the_loop_in_16_bits_leaves_out_experts_of_more_rows(monkeypatch, habit, sizes, looped):
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(gemm, "has_instructions", lambda _: False)
    calls = []
    grouped_mm = multiply.F.grouped_mm
    monkeypatch.setattr(
        multiply.F, "grouped_mm", lambda x, *args, **kw: calls.append(len(x)) or grouped_mm(x, *args, **kw)
    )
    (batch,) = batches.batches(sizes, torch.arange(sum(sizes)))
    x, stack = torch.randn(sum(sizes), 40).bfloat16(), torch.randn(len(sizes), 24, 40).bfloat16().mT
    exact = torch.einsum("na,nab->nb", x.double(), stack[batch.expert_of_row()].double())
    around = torch.full((len(x) + 5, 24), math.nan)
    for out in (None, around[3:-2]):
        calls.clear()
        got = multiply.Multiply(torch.bfloat16)(batch, x, stack, "out", out)
        assert out is None or got is out
        assert around[:3].isnan().all()
        assert around[-2:].isnan().all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-2, atol=1e-2)
        assert calls == looped


def test_a_hot_expert_of_float32_goes_to_mkl_on_intel():
    assert gemm.form_for(gemm.ROW_MAJOR["intel"], 320) is gemm.onednn_form
    assert gemm.form_for(gemm.ROW_MAJOR["intel"], 321) is gemm.rows_form


def test_the_tables_of_forms_reach_every_number_of_rows():
    whole = (gemm.ROW_MAJOR, gemm.COLUMN_MAJOR, gemm.WIDE, gemm.WIDE_COLUMN_MAJOR)
    for table in (*(t for tables in whole for t in tables.values()), gemm.PLAIN, gemm.AMX):
        bounds = [rows for rows, _ in table]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == gemm.ANY
        forms = [form for _, form in table]
        assert gemm.blocks_form not in forms or forms.index(gemm.blocks_form) == 1, "what is called whole comes first"
    for tables in (gemm.NARROW, gemm.NARROW_COLUMN_MAJOR, gemm.NARROW_HALF):
        for table in tables.values():
            bounds = [rows for rows, _ in table]
            assert bounds == sorted(set(bounds))
            assert not bounds or bounds[-1] < 32
            assert all(form is not gemm.rows_form for _, form in table[1:]), (
                "more than the first would be left to the loop over experts"
            )


@pytest.mark.parametrize(
    ("limit", "bfloat16", "float16"),
    [
        ("", True, True),
        ("ALL", True, True),
        ("avx512_core_vnni", False, False),
        ("AVX2", False, False),
        ("AVX512_CORE_BF16", True, False),
        ("AVX512_CORE_FP16", True, True),
        ("AVX10_1_512", True, True),
        ("AVX512_CORE_AMX", True, True),
    ],
)
def test_instructions_are_there_if_the_cpu_has_them_and_onednn_may_use_them(monkeypatch, limit, bfloat16, float16):
    has = {"avx512_bf16": True, "avx512_fp16": True}
    monkeypatch.setattr(processor, "_capabilities", lambda: has)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    for dtype, expected in ((torch.bfloat16, bfloat16), (torch.float16, float16)):
        assert processor.has_instructions.__wrapped__(dtype) == expected
    has.clear()
    assert not processor.has_instructions.__wrapped__(torch.bfloat16)


@pytest.mark.parametrize(
    ("capabilities", "habit"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, "amd"),
        ({"cpu_name": "AMD Ryzen 5 3600"}, "other"),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_f": True}, "intel"),
        ({"cpu_name": "Intel(R) Core(TM) i7-8700"}, "other"),
        ({"cpu_name": "Neoverse-V2"}, "other"),
        ({}, "other"),
    ],
)
def test_whose_habits_are_expected(monkeypatch, capabilities, habit):
    monkeypatch.setattr(processor, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.machine.__wrapped__() == habit


# -- repeating ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [9, 300])
def test_results_repeat_bit_for_bit(monkeypatch, with_threads, dtype, tokens):
    monkeypatch.setattr(gemm, "SMALL", 1 << 15)  # between the two weights: one in the forms for large ones
    x, ids, weights, experts = problem(tokens, 256, 96, dtype=dtype)
    upstream = torch.randn(tokens, 256).to(dtype)
    runs = []
    with_threads(2)
    for _ in range(3):
        out = cpu(x, ids, weights, experts, ExpertSpec())
        runs.append([out, *torch.autograd.grad(out, leaves_of(x, weights, experts), upstream)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("variant", ["swiglu", "geglu", "plain mlp", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_invariant_rows_do_not_depend_on_their_companions(with_threads, variant, dtype, threads):
    spec, layout = VARIANTS[variant]
    experts = weights_like(dtype, **layout)
    ids, weights = ids_of("an empty expert", 150), torch.rand(150, K).to(dtype)
    x = torch.randn(150, experts.up.shape[1 if spec.transposed else 2]).to(dtype)
    with_threads(threads)
    whole = cpu(x, ids, weights, experts, spec, batch_invariant=True)
    for rows in (torch.randperm(150), torch.arange(7, 40), torch.tensor([149]), torch.arange(0, 150, 3)):
        part = cpu(x[rows], ids[rows], weights[rows], experts, spec, batch_invariant=True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize(("d", "width"), [(256, 768), (100, 1500), (64, 33)])
def test_batch_invariance_holds_at_widths_where_torch_splits_the_work(with_threads, d, width):
    with_threads(2)
    x, ids, weights, experts = problem(90, d, width, k=2)
    whole = cpu(x, ids, weights, experts, ExpertSpec(), batch_invariant=True)
    for rows in (torch.randperm(90), torch.arange(3), torch.tensor([41])):
        part = cpu(x[rows], ids[rows], weights[rows], experts, ExpertSpec(), batch_invariant=True)
        assert torch.equal(part, whole[rows])


# -- memory ------------------------------------------------------------------------------------------------------------


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
        engine.backward(out, x, weights, experts, *rest, ExpertSpec(), engine.Gradients(1, 1, 1, 1, 0, 0))
        del out, rest
        with torch.enable_grad():
            for _ in range(2):  # the second adds to the gradients of the first
                cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    assert len(alive) > 40
    for leaf in leaves_of(x, weights, experts):
        leaf.grad = None
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["swiglu", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputing_gives_the_same_gradients(variant, dtype, instructions):
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
    for a, b in zip(kept, again, strict=True):
        if dtype == torch.float32 or instructions != "none":
            assert torch.equal(a, b)
        else:  # what is kept is rounded to bfloat16, what is computed again is not, and may lie beyond a clamp's edge
            assert (a - b).norm() < 0.1 * b.norm()


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


def accumulated(prepare, steps=2, dtype=torch.float32, **options):
    """Gradients of up and down after `steps` backwards of the engine and of the reference, and whether `.grad` was
    added to by the engine itself. `prepare(experts)` may put hooks or strange gradients there."""
    torch.manual_seed(0)
    x, ids, weights, experts = problem(30, 16, 8, dtype=dtype)
    plain = ExpertWeights(*(nn.Parameter(w.detach().clone()) for w in experts[:2]))
    finish = prepare(experts) or (lambda: None)
    own = []
    real = multiply.add_outer

    def spy(out, *args, accumulate, **kwargs):
        own.append(any(w.grad is not None and out.untyped_storage().data_ptr() == w.grad.untyped_storage().data_ptr()
                       for w in experts[:2]))  # fmt: skip
        return real(out, *args, accumulate=accumulate, **kwargs)

    multiply.add_outer = spy
    try:
        for step in range(steps):
            cpu(x, ids, weights, experts, ExpertSpec(), **options).square().sum().backward()
            reference(x.detach(), ids, weights.detach(), plain, ExpertSpec()).square().sum().backward()
            if step == 0:
                own.clear()
    finally:
        multiply.add_outer = real
        finish()
    for ours, theirs in zip(experts[:2], plain[:2], strict=True):
        loose = 1 if dtype == torch.float32 else 500
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=loose * 1e-4, atol=loose * 1e-5 * float(theirs.grad.abs().max())
        )
    return all(own)


def test_an_existing_gradient_is_added_to_in_place():
    assert accumulated(lambda _: None)


def test_a_gradient_added_to_in_place_is_not_what_a_graph_has_saved():
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    saved = [w.grad * nn.Parameter(torch.ones(())) for w in experts[:2]]
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    for product in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_a_gradient_hook_is_called_with_the_whole_gradient():
    seen = []

    def prepare(experts):
        experts.up.register_hook(lambda grad: seen.append(grad.clone()))
        experts.down.register_hook(lambda grad: seen.append(grad.clone()))

    assert not accumulated(prepare)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0].norm(), seen[2].norm())


def test_a_post_accumulate_hook_is_called():
    seen = []

    def prepare(experts):
        for w in experts[:2]:
            w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    assert not accumulated(prepare)
    assert len(seen) == 4


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_sees_every_gradient():
    with torch.autograd.set_detect_anomaly(True):
        assert not accumulated(lambda _: None)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout")
def test_a_strided_gradient_is_left_to_autograd():
    def prepare(experts):
        for w in experts[:2]:
            w.grad = torch.zeros_like(w).mT.contiguous().mT

    assert not accumulated(prepare)


def test_a_gradient_made_in_inference_mode_is_refused_as_by_torch():
    x, ids, weights, experts = problem(30, 16, 8)
    for w in experts[:2]:
        with torch.inference_mode():
            w.grad = torch.zeros_like(w)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()


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


def test_weights_used_twice_in_one_graph_get_both_gradients():
    x, ids, weights, experts = problem(30, 16, 8)
    experts.up.grad, experts.down.grad = torch.ones_like(experts.up), torch.ones_like(experts.down)

    def twice(run):
        return run(run(x, ids, weights, experts, ExpertSpec()), ids, weights, experts, ExpertSpec()).square().sum()

    expected = torch.autograd.grad(twice(reference), experts[:2])
    twice(cpu).backward()
    for w, grad in zip(experts[:2], expected, strict=True):
        torch.testing.assert_close(w.grad - 1, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", ["x", "up"])
def test_backward_to_some_inputs_leaves_other_gradients_alone(chosen):
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    before = {name: t.grad.clone() for name, t in {"x": x, "up": experts.up, "down": experts.down}.items()}
    loss = cpu(x, ids, weights, experts, ExpertSpec()).square().sum()
    loss.backward(inputs=[x if chosen == "x" else experts.up])
    for name, tensor in {"x": x, "up": experts.up, "down": experts.down}.items():
        torch.testing.assert_close(tensor.grad, before[name] * (2 if name == chosen else 1), rtol=1e-4, atol=1e-5)


def test_autograd_grad_leaves_gradients_alone():
    x, ids, weights, experts = problem(30, 16, 8)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    before = experts.up.grad.clone()
    (grad,) = torch.autograd.grad(cpu(x, ids, weights, experts, ExpertSpec()).square().sum(), experts.up)
    assert torch.equal(experts.up.grad, before)
    torch.testing.assert_close(grad, before)


@pytest.mark.parametrize("variant", ["swiglu", "gpt-oss"])
def test_gradients_of_gradients(variant):
    spec, layout = VARIANTS[variant]
    experts, ids = weights_like(torch.float64, **layout), ids_of("sentinels", 4)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
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
def test_a_16_bit_gradient_of_a_hot_expert_is_rounded_once():
    tokens = 32 * batches.PIECE_ROWS
    x, weights = torch.rand(tokens, 8).bfloat16(), torch.rand(tokens, 1).bfloat16()
    ids = torch.zeros(tokens, 1, dtype=torch.long)
    experts = ExpertWeights(*(nn.Parameter(torch.rand(1, *shape).bfloat16()) for shape in ((8, 8), (8, 4))))
    cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
    plain, true = ([nn.Parameter(w.detach().to(dtype)) for w in experts[:2]] for dtype in (x.dtype, torch.float64))
    grouped(x, ids, weights, ExpertWeights(*plain), ExpertSpec()).sum().backward()
    grouped(x.double(), ids, weights.double(), ExpertWeights(*true), ExpertSpec()).sum().backward()
    for given, straight, exact in zip(experts[:2], plain, true, strict=True):
        ours, theirs = (float((w.grad.double() - exact.grad).norm() / exact.grad.norm()) for w in (given, straight))
        assert ours <= 1.2 * theirs + 1e-3


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("how", ["odd stride", "every other", "offset", "expanded"])
def test_strided_16_bit_weights_compute_as_their_copies(how):
    x, ids, weights, experts = problem(40, 16, 8, dtype=torch.bfloat16)
    up = experts.up.detach()
    strided = {
        "odd stride": torch.cat([up, up[..., :1]], dim=2)[..., :16],
        "every other": up.repeat_interleave(2, dim=2)[..., ::2],
        "offset": torch.cat([up[:, :1], up], dim=1)[:, 1:],
        "expanded": up[:1].expand(6, -1, -1),
    }[how]
    out = cpu(x, ids, weights, ExpertWeights(strided, experts.down), ExpertSpec())
    copy = cpu(x, ids, weights, ExpertWeights(strided.contiguous(), experts.down), ExpertSpec())
    torch.testing.assert_close(out.float(), copy.float(), rtol=2e-2, atol=2e-2)


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


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_that_was_made_with_a_graph_is_left_to_autograd():
    x, ids, weights, experts = problem(10, 16, 8, dtype=torch.float64)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward(create_graph=True)
    assert experts.up.grad.requires_grad
    first = experts.up.grad.detach().clone()
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    torch.testing.assert_close(experts.up.grad.detach(), 2 * first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hot_expert_in_pieces_is_added_to_gradients_that_exist(dtype):
    tokens = 2 * batches.PIECE_ROWS + 300
    x, weights, ids = torch.randn(tokens, 8).to(dtype), torch.rand(tokens, 1).to(dtype), torch.zeros(tokens, 1).long()
    ids[::3] = 1
    experts = ExpertWeights(*(nn.Parameter(torch.randn(2, *shape).to(dtype)) for shape in ((8, 8), (8, 4))))
    true = ExpertWeights(*(nn.Parameter(w.detach().double()) for w in experts[:2]))
    for times in (1, 2):
        cpu(x, ids, weights, experts, ExpertSpec()).sum().backward()
        grouped(x.double(), ids, weights.double(), true, ExpertSpec()).sum().backward()
        for ours, exact in zip(experts[:2], true[:2], strict=True):
            error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
            assert error < times * (1e-5 if dtype == torch.float32 else 1e-2)


def test_bfloat16_gradients_accumulate_in_place_too():
    assert accumulated(lambda _: None, dtype=torch.bfloat16)


# -- refusing ----------------------------------------------------------------------------------------------------------


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


def test_the_check_sees_the_oracle():
    """The yardstick of this file against the numpy definition."""
    x, ids, weights, experts = problem(7, dtype=torch.float64)
    out = cpu(x, ids, weights, experts, ExpertSpec()).detach()
    assert abs(out.numpy() - moe_by_token(x, ids, weights, *experts[:2])).max() < 1e-12
