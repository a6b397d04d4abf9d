"""The CPU engine with AMX, wherever the tests run: matmuls as W @ x.T, column-major from the first to the last."""

import math

import pytest
import torch
from cases import leaves_of, problem
from test_engines import VARIANTS, E, K, weights_like
from torch import nn

from moesaic.engine import batches, gemm, multiply, processor
from moesaic.engine.cpu import cpu
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


@pytest.fixture(autouse=True)
def _amx(monkeypatch):
    monkeypatch.setattr(gemm, "has_instructions", lambda _: True)
    monkeypatch.setattr(gemm, "has_amx", lambda: True)


@pytest.mark.parametrize("given", [False, True], ids=["scratch", "given"])
@pytest.mark.parametrize("layout", ["row-major", "column-major"])
@pytest.mark.parametrize(
    ("sizes", "inputs", "looped"),
    [
        pytest.param([2, 1, 0, 3, 12], 40, True, id="a few rows each"),
        pytest.param([7, 1, 1, 200], 40, True, id="many rows"),
        pytest.param([2, 1, 0, 3, 12], 41, False, id="rows that are no multiple of 16 bytes"),
        pytest.param([3, 0, 1], 40, False, id="few experts"),
        pytest.param([8], 40, False, id="one expert"),
        pytest.param([1], 40, False, id="one row"),
    ],
)
def test_products_are_right_and_column_major(monkeypatch, given, layout, sizes, inputs, looped):
    calls, grouped_mm, n = [], multiply.F.grouped_mm, sum(sizes)
    monkeypatch.setattr(
        multiply.F, "grouped_mm", lambda left, *args, **kw: calls.append(left.dim()) or grouped_mm(left, *args, **kw)
    )
    (batch,) = batches.batches(sizes, torch.arange(n))
    x, stack = torch.randn(n, inputs), torch.randn(len(sizes), 120, inputs).bfloat16().mT
    x = x if layout == "row-major" else torch.empty(inputs, n).mT.copy_(x)
    exact = torch.einsum("na,nab->nb", x.bfloat16().double(), stack[batch.expert_of_row()].double())
    multiplies = multiply.Multiply(torch.bfloat16)
    for _ in range(2):
        out = torch.full((n, 120), math.nan, dtype=torch.bfloat16) if given else None
        got = multiplies(batch, x, stack, "out", out)
        torch.testing.assert_close(got.double(), exact, rtol=8e-3, atol=1e-4)
        assert given or got.stride(0) == 1
        for scratch in multiplies._work._buffers.values():
            scratch.fill_(math.nan)
    assert calls == [3, 3] * looped, "W comes first"


def test_only_row_major_bfloat16_weights_are_multiplied_so(monkeypatch):
    w = torch.randn(24, 40).bfloat16()
    for amx in (True, False):
        monkeypatch.setattr(gemm, "has_amx", lambda amx=amx: amx)
        assert gemm.table_for(torch.bfloat16, w.mT) is (gemm.AMX if amx else gemm.PLAIN)
        assert gemm.table_for(torch.bfloat16, w) is gemm.table_for(torch.float16, w.half().mT) is gemm.PLAIN


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_every_kind_of_expert_is_as_near_to_float64_as_without(monkeypatch, variant, tokens, looped):
    """Forward, with and without gradients, and backward."""
    calls, grouped_mm = [], multiply.F.grouped_mm
    monkeypatch.setattr(
        multiply.F, "grouped_mm", lambda left, *args, **kw: calls.append(left.dim()) or grouped_mm(left, *args, **kw)
    )
    spec, layout = VARIANTS[variant]
    sizes = {"d": 16, "width": 8, "out": 24} if looped else {}  # widths of whole 16 bytes
    experts = weights_like(torch.bfloat16, **sizes, **layout)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    x = torch.randn(tokens, experts.up.shape[1 if spec.transposed else 2]).bfloat16().requires_grad_()
    weights = torch.rand(tokens, K).bfloat16().requires_grad_()
    leaves = leaves_of(x, weights, experts)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    rest = iter(wide[2:])
    exact = reference(wide[0], ids, wide[1], ExpertWeights(*(w if w is None else next(rest) for w in experts)), spec)
    upstream = torch.randn_like(exact).bfloat16()
    truth = [exact, exact, *torch.autograd.grad(exact, wide, upstream.double())]
    errors = []
    for amx in (True, False):
        monkeypatch.setattr(gemm, "has_amx", lambda amx=amx: amx)
        with torch.no_grad():
            got = [cpu(x, ids, weights, experts, spec)]
        got.append(cpu(x, ids, weights, experts, spec))
        got += torch.autograd.grad(got[1], leaves, upstream)
        errors.append([float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(got, truth, strict=True)])
    for with_amx, without in zip(*errors, strict=True):
        assert with_amx <= max(1.1 * without, 4e-3)  # a unit in the last place is 4e-3 to 8e-3
    assert (3 in calls) == (looped and len(ids.unique()) >= multiply.LOOPED)


@pytest.mark.parametrize("wanted", ["all", "down"])
def test_what_is_recomputed_is_what_was_kept(wanted):
    x, ids, weights, experts = problem(60, 32, 24, dtype=torch.bfloat16)
    leaves = leaves_of(x, weights, experts) if wanted == "all" else [experts.down]
    for leaf in leaves_of(x, weights, experts):
        leaf.requires_grad_(any(leaf is one for one in leaves))
    upstream = torch.randn(60, 32).bfloat16()
    kept, again = (
        torch.autograd.grad(cpu(x, ids, weights, experts, ExpertSpec(), recompute=recompute), leaves, upstream)
        for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_matrices_of_two_layouts_make_a_layer():
    """`up` as HF has it, which AMX multiplies, and `down` a transposed view, which it does not; 21 rows."""
    x, ids, weights, experts = problem(7, 32, 24, dtype=torch.bfloat16)
    view = experts.down.detach().mT.contiguous().mT
    with torch.no_grad():
        expected = cpu(x, ids, weights, experts, ExpertSpec())
        out = cpu(x, ids, weights, experts._replace(down=view), ExpertSpec())
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_added_to_rows_is_row_major(monkeypatch, transposed):
    """Adding columns takes 4.5 instead of 0.5 ms for 512 x 2048: column-major are the forward's products with weights
    [out, in], the backward's with [in, out]."""
    x, ids, weights, experts = problem(40, 32, 16, dtype=torch.bfloat16)
    if transposed:
        experts = ExpertWeights(*(nn.Parameter(w.detach().mT.contiguous()) for w in experts[:2]))
    strides, add = [], torch.Tensor.index_add_
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda *args: strides.append(args[-1].stride(1)) or add(*args))
    out = cpu(x, ids, weights, experts, ExpertSpec(transposed=transposed))
    torch.autograd.grad(out.sum(), leaves_of(x, weights, experts))
    assert strides == [1, 1]


@pytest.mark.parametrize(
    ("limit", "amx"),
    [
        ("ALL", True),
        ("default", True),
        ("AVX512_CORE_AMX_FP16", True),
        ("AVX10_1_512", False),
        ("AVX512_CORE_BF16", False),
    ],
)
def test_amx_is_there_if_the_cpu_has_it_and_onednn_may_use_it(monkeypatch, limit, amx):
    has = {"amx_bf16": True}
    monkeypatch.setattr(processor, "_capabilities", lambda: has)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processor.has_amx.__wrapped__() == amx
    has.clear()
    assert not processor.has_amx.__wrapped__()
