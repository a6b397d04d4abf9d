"""The matmuls of the CPU engine: which form is taken for how many rows, and that all compute the same."""

import math
from itertools import product

import pytest
import torch
from cases import HABITS, leaves_of, needs_habit, needs_onednn, problem
from torch import nn

from moesaic.engine import batches, gemm, matmul_forms, memory, multiply, outer, processor
from moesaic.engine import cpu as engine
from moesaic.engine.cpu import cpu
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", ["rows_form", "columns_form", "slabs_form", "onednn_form"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 70])
def test_widening_by_parts_computes_the_same(monkeypatch, inner, rows, transposed):
    if inner == "onednn_form":
        needs_onednn(torch.float32)
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    inner = getattr(matmul_forms, inner)
    x, w = torch.randn(rows, 40), torch.randn(301, 40).bfloat16().mT
    w = w.contiguous() if transposed else w
    for elements in (1500, 5000, matmul_forms.ANY):  # 8 parts of uneven width, 2, and the whole
        for form in (matmul_forms.widening(elements, inner), matmul_forms.widening_inputs(elements, inner)):
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
    needs_habit(habit)
    with_threads(threads)
    monkeypatch.setattr(outer, "machine", lambda: habit)
    monkeypatch.setattr(outer, "ALIASED", aliased)
    monkeypatch.setattr(outer, "PART", 300)
    monkeypatch.setattr(outer, "GRAIN", 5)
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
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    monkeypatch.setattr(engine, "new_gradient", lambda w, _: new.append(w) or torch.full_like(w, math.nan))
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
@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 16, 17, 48, 49, 63, 64, 100, 320, 321])
def test_every_form_of_matmul_computes_the_same(monkeypatch, kind, habit, rows):
    needs_habit(habit)
    monkeypatch.setattr(gemm, "machine", lambda: habit)
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    monkeypatch.setattr(matmul_forms, "BLOCK", 5000)
    x, w = torch.randn(rows, 40), torch.randn(300, 40)
    if kind == "bfloat16 widened":
        w = w.bfloat16()
    if kind == "transposed":
        w = w.mT.contiguous().mT
    out = torch.full((rows, 300), math.nan)
    gemm.form_for(gemm.table_for(x.dtype, w.mT), rows)(x, w.mT, out, memory.Workspace())
    torch.testing.assert_close(out.double(), x.double() @ w.double().mT, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("threads", "inputs", "outputs", "transposed", "slabs"),
    [
        pytest.param(2, 64, 512, False, (8, 64, 64), id="four for each thread"),
        pytest.param(2, 512, 64, True, (8, 64, 64), id="of inputs"),
        pytest.param(2, 15, 132, False, (2, 15, 64), id="fewer of a smaller one, and four columns left"),
        pytest.param(2, 132, 15, True, (2, 64, 15), id="four rows left"),
        pytest.param(3, 64, 1000, False, (12, 64, 80), id="40 columns left by three threads"),
        pytest.param(1, 64, 512, False, None, id="one thread has nothing to share"),
        pytest.param(2, 64, 504, False, None, id="too narrow"),
        pytest.param(2, 504, 64, True, None, id="too narrow, of inputs"),
        pytest.param(8, 64, 512, False, None, id="too narrow for so many threads"),
        pytest.param(2, 0, 512, False, (2, 0, 256), id="of no inputs"),
        pytest.param(2, 512, 0, True, None, id="of no outputs"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slabs_of_a_matrix_are_the_whole_matrix(
    monkeypatch, with_threads, dtype, threads, inputs, outputs, transposed, slabs
):
    """Into a part of a larger result, from rows that lie apart."""
    with_threads(threads)
    monkeypatch.setattr(matmul_forms, "BLOCK", 1000)
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **kw: shapes.append(tuple(b.shape)) or bmm(a, b, **kw))
    w = torch.randn(outputs, inputs, dtype=dtype).mT
    w = w.contiguous() if transposed else w
    for rows in (0, 1, 2, 50):
        x = torch.randn(rows, inputs + 3, dtype=dtype)[:, 1:-2]
        around = torch.full((rows + 2, outputs + 2), math.nan, dtype=dtype)
        out = around[1:-1, 1:-1]
        matmul_forms.slabs_form(x, w, out, memory.Workspace())
        torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-5, atol=2e-4)
        assert around.isnan().sum() == around.numel() - out.numel()
    assert shapes == ([slabs] * 4 if slabs else [])


def test_what_slabs_of_inputs_leave_to_be_added_up_is_bounded(monkeypatch, with_threads):
    """At most twice as much as the matrix, however many the rows and the threads are."""
    with_threads(2)
    monkeypatch.setattr(matmul_forms, "BLOCK", 1000)
    taken, take, w = [], memory.Workspace.take, torch.randn(512, 40)
    monkeypatch.setattr(memory.Workspace, "take", lambda *args: taken.append(args[2:4]) or take(*args))
    for rows in (128, 129, 1024):
        x, out = torch.randn(rows, 512), torch.empty(rows, 40)
        matmul_forms.slabs_form(x, w, out, memory.Workspace())
        torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-5, atol=2e-4)
    assert taken == [(8 * 128, 40)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_of_few_and_of_many_rows_in_one_batch(monkeypatch, habit, dtype, transposed):
    """On a CPU without the instructions the few are multiplied in 16 bits, the many in float32, none left out."""
    needs_habit(habit, dtype)
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
        pytest.param([1, *[0] * 30, 2, *[0] * 20, 1, *[0] * 10, 1], [5], id="far between"),
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
    needs_onednn(torch.float32)
    monkeypatch.setattr(gemm, "machine", lambda: "intel")
    monkeypatch.setattr(matmul_forms, "SMALL", 0)
    # two parts, of 16 and 8 columns, where there are more than 3 rows on average
    monkeypatch.setattr(matmul_forms, "BLOCK", 500)
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
        pytest.param("amd-avx2", [*[1] * 20, 14], [34], id="twelve, where leaving it costs more"),
        pytest.param("amd-avx2", [*[1] * 20, 15], [20], id="thirteen"),
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
    assert gemm.form_for(gemm.ROW_MAJOR["intel"], 320) is matmul_forms.onednn_form
    assert gemm.form_for(gemm.ROW_MAJOR["intel"], 321) is matmul_forms.rows_form


def test_the_tables_of_forms_reach_every_number_of_rows():
    whole = (gemm.ROW_MAJOR, gemm.COLUMN_MAJOR, gemm.WIDE, gemm.WIDE_COLUMN_MAJOR)
    for table in (*(t for tables in whole for t in tables.values()), gemm.PLAIN, gemm.AMX):
        bounds = [rows for rows, _ in table]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == matmul_forms.ANY
        taken = [form for _, form in table]
        blocks = matmul_forms.blocks_form
        assert blocks not in taken or taken.index(blocks) == 1, "what is called whole comes first"
    for tables in (gemm.NARROW, gemm.NARROW_COLUMN_MAJOR, gemm.NARROW_HALF):
        for table in tables.values():
            bounds = [rows for rows, _ in table]
            assert bounds == sorted(set(bounds))
            assert not bounds or bounds[-1] < 32
            assert all(form is not matmul_forms.rows_form for _, form in table[1:]), (
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
        ({"cpu_name": "AMD Ryzen 5 3600", "avx2": True}, "amd-avx2"),
        ({"cpu_name": "AMD Opteron(tm) Processor 6282 SE"}, "other"),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_f": True}, "intel"),
        ({"cpu_name": "Intel(R) Core(TM) i7-8700", "avx2": True}, "other"),
        ({"cpu_name": "Neoverse-V2"}, "other"),
        ({}, "other"),
    ],
)
def test_whose_habits_are_expected(monkeypatch, capabilities, habit):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(processor, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.machine.__wrapped__() == habit


@pytest.mark.parametrize(
    ("limit", "habit"),
    [("AVX2", "amd-avx2"), ("AVX2_VNNI_2", "amd-avx2"), ("AVX512_CORE", "amd"), ("AVX10_1_512", "amd"), ("", "amd")],
)
def test_an_amd_whose_onednn_may_not_use_avx512_is_as_one_without(monkeypatch, limit, habit):
    """It would refuse bfloat16; on Intel it is MKL that few rows are left to, with or without a limit."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    names = {"AMD EPYC": habit, "Intel(R) Xeon(R) Processor": "intel"}
    for (name, expected), variable in product(names.items(), ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")):
        has = {"cpu_name": name, "avx2": True, "avx512_f": True}
        with monkeypatch.context() as patch:
            patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
            patch.setattr(processor, "_capabilities", lambda has=has: has)
            patch.setenv(variable, limit)
            assert processor.machine.__wrapped__() == expected
