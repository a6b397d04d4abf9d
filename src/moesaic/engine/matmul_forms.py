"""The ways to multiply one expert's rows by its matrix: the same product, each at home on another machine.

A form writes x [m, a] @ w [a, b] into out [m, b]. W, as weights are stored, is w.T: [b, a]. (w comes transposed because
a view costs a microsecond, and an engine can take it of all experts at once.) Which form is taken where: `gemm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.engine.memory import Workspace

SMALL = 1 << 17  # elements of a weight: below, oneDNN's 20 µs a call are as much as the matmul (384 x 384: 30 | 15 MKL)
# Elements of a weight that MKL multiplies as they are for a few rows, where it packs more of them first: 4 rows times
# 1536 x 2048 in the cache take 120 µs in blocks of 2^19 and 239 in blocks of 2^20.
BLOCK = 1 << 19
SLABS = 4  # of W for each thread, at most: more take 5 % less where W has 2^25 elements
# The width of a slab is a multiple of UNIT: 2535 instead of 2718 µs for 64 rows x 2048 x 1408 in 6 slabs. What that
# leaves over is less than a fifth of W where a slab is LEAST wide; of many threads each would have a narrower one.
UNIT, LEAST = 16, 64
INVARIANT_ROWS = 32  # rows of every matmul in batch-invariant mode
ANY = 1 << 62

Form = Callable[[Tensor, Tensor, Tensor, Workspace], None]


def rows_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    del work
    torch.mm(x, w, out=out)


def blocks_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    del work
    step = step_of(w.shape[1], w.numel(), BLOCK)
    for columns, result in zip(w.split(step, 1), out.split(step, 1), strict=True):
        torch.mm(x, columns, out=result)


def step_of(length: int, elements: int, at_most: int) -> int:
    """How far apart to cut `length`, along which a matrix of so many elements is to be in parts of `at_most`."""
    parts = max(1, -(-elements // at_most))
    return max(1, -(-length // parts))


def columns_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    out.copy_(torch.mm(w.mT, x.mT, out=work.take("columns", w.shape[1], len(x), x.dtype)).mT)


def turned_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    del work
    torch.mm(w.mT, x.mT, out=out.mT)  # out is column-major


def slabs_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    """One batch of matmuls, some for each thread, each on a part of W whose memory lies together: W [out, in] is cut by
    outputs; W [in, out] by inputs, and the products are added up. What is left over is a matmul of its own.

    MKL's own way to share few rows among threads takes up to twice as long on some CPUs. One thread shares nothing, and
    would take 3 to 12 % longer.
    """
    by_outputs = w.stride(0) == 1
    length, threads = w.shape[1] if by_outputs else w.shape[0], torch.get_num_threads()
    slabs = threads * min(SLABS, max(1, -(-w.numel() // (threads * BLOCK))))
    step = length // slabs // UNIT * UNIT
    too_much = not by_outputs and slabs * len(x) > 2 * length  # to be added up: more than twice the numbers of W
    if threads == 1 or step < LEAST or too_much:
        rows_form(x, w, out, work)
    elif by_outputs:
        _slabs_of_outputs(x, w, out, work, slabs, slabs * step)
    else:
        _slabs_of_inputs(x, w, out, work, slabs, slabs * step)


def _slabs_of_outputs(x: Tensor, w: Tensor, out: Tensor, work: Workspace, slabs: int, end: int) -> None:
    parts = work.take("slabs", slabs * len(x), end // slabs, x.dtype).unflatten(0, (slabs, -1))
    torch.bmm(x.expand(slabs, -1, -1), w[:, :end].unflatten(1, (slabs, -1)).transpose(0, 1), out=parts)
    out[:, :end].unflatten(1, (slabs, -1)).copy_(parts.transpose(0, 1))
    if end < w.shape[1]:
        torch.mm(x, w[:, end:], out=out[:, end:])


def _slabs_of_inputs(x: Tensor, w: Tensor, out: Tensor, work: Workspace, slabs: int, end: int) -> None:
    parts = work.take("slabs", slabs * len(x), w.shape[1], x.dtype).unflatten(0, (slabs, -1))
    torch.bmm(x[:, :end].unflatten(1, (slabs, -1)).transpose(0, 1), w[:end].unflatten(0, (slabs, -1)), out=parts)
    torch.sum(parts, 0, out=out)
    if end < len(w):
        torch.addmm(out, x[:, end:], w[end:], out=out)


def vector_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    del work
    for row, result in zip(x, out, strict=True):
        torch.mv(w.mT, row.contiguous(), out=result)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN, which torch's own linear leaves to MKL for float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    del work
    if not w.numel():  # which oneDNN refuses in 16 bits
        out.zero_()
        return
    out.copy_(onednn_linear(x, w.mT))


def widening(elements: int, inner: Form) -> Form:
    """The form that widens so many elements of W at a time, and multiplies while they are in the cache."""

    def form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
        inputs, outputs = w.shape
        step = step_of(outputs, w.numel(), elements)
        multiply = inner if inputs * step > SMALL else rows_form
        for columns, result in zip(w.split(step, 1), out.split(step, 1), strict=True):
            multiply(x, converted(columns, x.dtype, work), result, work)

    return form


def widening_inputs(elements: int, inner: Form) -> Form:
    """The same for a w [in, out] whose rows lie together: parts of the inputs, and their products added up."""

    def form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
        inputs, outputs = w.shape
        step = step_of(inputs, w.numel(), elements)
        multiply, result = inner if step * outputs > SMALL else rows_form, out
        for rows, columns in zip(w.split(step), x.split(step, 1), strict=True):
            multiply(columns, converted(rows, x.dtype, work), result, work)
            if result is out:
                result = work.take("part", len(x), outputs, x.dtype)
            else:
                out.add_(result)

    return form


def invariant_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    """Always one matmul of INVARIANT_ROWS rows at one place in memory: BLAS results hang on both.

    As `W @ x.T`, where the rows lie side by side in vector registers: no row's sum then differs from another's (in 600
    random shapes; of `x @ W.T` 29 of 300 had rows that did). In float64 neither holds, so there one row at a time.
    """
    rows = 1 if x.dtype == torch.float64 else INVARIANT_ROWS
    w = converted(w, x.dtype, work)
    padded = work.take("padded", rows, x.shape[1], x.dtype)
    whole = work.take("invariant", rows, w.shape[1], x.dtype)
    for some, result in zip(x.split(rows), out.split(rows), strict=True):
        padded[: len(some)] = some
        padded[len(some) :] = 0
        columns_form(padded, w, whole, work)
        result.copy_(whole[: len(some)])


def converted(w: Tensor, dtype: torch.dtype, work: Workspace) -> Tensor:
    """`w` itself where it has the dtype, else a copy in scratch, row-major or column-major as w is."""
    if w.dtype == dtype:
        return w
    if w.stride(0) == 1:
        return work.take("converted", w.shape[1], w.shape[0], dtype).copy_(w.mT).mT
    return work.take("converted", w.shape[0], w.shape[1], dtype).copy_(w)
