"""The matmuls of a batch: every expert's rows through its matrix, each in the form that `gemm` has for it."""

from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.batches import Batch
from moesaic.engine.gemm import (
    AMX,
    ANY,
    INVARIANT,
    Table,
    form_for,
    looped_rows,
    matmul_dtype,
    most_rows,
    narrow_table,
    part_of,
    table_for,
)
from moesaic.engine.memory import Workspace
from moesaic.engine.outer import add_outer
from moesaic.engine.spec import ExpertSpec

RUN = 4  # neighbouring experts of few rows that are worth a call of torch's own loop


class Multiply:
    """Rows of a batch through the matrices of their experts, in scratch that the next batch uses again.

    `dtype` is that of the layer's tokens; where this CPU would emulate it, matrices are multiplied in float32.
    """

    def __init__(self, dtype: torch.dtype, *, batch_invariant: bool = False) -> None:
        self._own, self._dtype = dtype, matmul_dtype(dtype)
        self._batch_invariant = batch_invariant
        self._work = Workspace()

    def __call__(
        self, batch: Batch, x: Float[Tensor, "n a"], stack: Float[Tensor, "E a b"], name: str, out: Tensor | None = None
    ) -> Float[Tensor, "n b"]:
        """x_e @ stack[e] for every expert e of the batch, in the dtype of matrices; into `out` or into scratch called
        `name`, column-major where AMX multiplies. Where weights are widened for that, experts of few rows are
        multiplied in their own dtype."""
        if self._batch_invariant:
            return self._product(batch, x.to(self._dtype), stack, INVARIANT, name, out)
        few, sizes = narrow_table(stack, self._own), batch.sizes
        table = table_for(self._dtype, stack)
        if table is AMX:
            return self._turned(batch, x, stack, name, out)
        if min(sizes) > most_rows(few):
            return self._product(batch, x.to(self._dtype), stack, table, name, out)
        narrow = self._product(batch, x.to(stack.dtype), stack, few, "narrow")
        if max(sizes) <= most_rows(few):
            return narrow.to(self._dtype) if out is None else out.copy_(narrow)
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], self._dtype)
        out.copy_(narrow)
        return self._product(batch, x.to(self._dtype), stack, table, name, out, over=most_rows(few))

    def _turned(self, batch: Batch, x: Tensor, stack: Tensor, name: str, out: Tensor | None) -> Tensor:
        """The product as `W @ x.T` leaves it, column-major; an x that is column-major too is copied as it lies, with
        an odd multiple of 16 bytes from feature to feature. torch's loop over experts wants multiples, and even ones
        meet in the cache: 512 x 2048 become row-major in 1000 µs at 1024 bytes and in 330 at 1040.
        """
        rows, distance = len(x), len(x) + (8 - len(x)) % 16
        if x.stride(0) == 1:
            columns = self._work.take("columns of x", x.shape[1], distance, self._dtype)
            columns[:, :rows] = x.mT
            x = columns.mT
        x = x.to(self._dtype)
        if grouped_mm_is_better(batch, stack, ANY):
            product = F.grouped_mm(stack[batch.span].mT, x.mT, offs=batch.offsets).mT[:rows]
        else:
            product = self._work.take(name, stack.shape[2], distance, self._dtype)[:, :rows].mT
            parts = zip(batch.pieces, x[:rows].split(batch.sizes), product.split(batch.sizes), strict=True)
            for piece, some, result in parts:
                form_for(AMX, len(some))(some, stack[piece.expert], result, self._work)
        return product if out is None else out.copy_(product)

    def _product(
        self, batch: Batch, x: Tensor, stack: Tensor, table: Table, name: str, out: Tensor | None = None, over: int = 0
    ) -> Tensor:
        """The experts of more than `over` rows that the table has forms for; the others' rows are left as they are."""
        sizes, looped, most = batch.sizes, looped_rows(table), most_rows(table)
        # A batch of few rows on average is looped over whole: its larger experts cost less there than a loop that they
        # break (2 to 5 % of a float32 layer under Zipf routing). A table of few rows has forms of its own for them.
        if not over and (most == ANY or max(sizes) <= looped) and grouped_mm_is_better(batch, stack, looped):
            return self._looped(batch, x, stack, table, name, out)
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], x.dtype)
        numbers = range(len(sizes))
        for (wanted, is_looped), group in groupby(numbers, lambda i: (over < sizes[i] <= most, sizes[i] <= looped)):
            if not wanted:
                continue
            first, *others = group
            run = batch.run(first, first + 1 + len(others))
            here = slice(run.here.start - batch.here.start, run.here.stop - batch.here.start)
            if is_looped and grouped_mm_is_better(run, stack, looped):
                self._looped(run, x[here], stack, table, name, out[here])
                continue
            parts = zip(run.pieces, x[here].split(run.sizes), out[here].split(run.sizes), strict=True)
            for piece, rows, result in parts:
                form_for(table, len(rows))(rows, stack[piece.expert], result, self._work)
        return out

    def _looped(
        self, batch: Batch, x: Tensor, stack: Tensor, table: Table, name: str, out: Tensor | None = None
    ) -> Tensor:
        """By torch's own loop over the experts, in parts of the weights where that is faster."""
        weights, step = stack[batch.span], part_of(stack, table, len(x) / len(batch.pieces))
        if step >= stack.shape[2]:
            result = F.grouped_mm(x, weights, offs=batch.offsets)
            return result if out is None else out.copy_(result)
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], x.dtype)
        for some, result in zip(weights.split(step, 2), out.split(step, 1), strict=True):
            result.copy_(F.grouped_mm(x, some, offs=batch.offsets))
        return out

    def outer(
        self, batch: Batch, gradient: Tensor, g: Tensor, x: Tensor, spec: ExpertSpec, name: str, *, accumulate: bool
    ) -> None:
        """gradient[e] (+)= g_e^T x_e for every expert e of the batch, in the layout of the weights.

        An expert in several pieces is summed in scratch called `name`, in float32, before it reaches a 16-bit gradient.
        """
        left, right = (x, g) if spec.transposed else (g, x)
        sizes = batch.sizes
        parts = zip(batch.pieces, left.split_with_sizes(sizes), right.split_with_sizes(sizes), strict=True)
        for piece, a, b in parts:
            into = gradient[piece.expert]
            if into.dtype.itemsize > 2 or (piece.first and piece.last):
                add_outer(into, a, b, self._work, accumulate=accumulate or not piece.first)
                continue
            total = self._work.take(name, into.shape[0], into.shape[1], torch.float32)
            if piece.first and accumulate:
                total.copy_(into)
            add_outer(total, a, b, self._work, accumulate=accumulate or not piece.first)
            if piece.last:
                into.copy_(total)


def grouped_mm_is_better(batch: Batch, stack: Tensor, average: int) -> bool:
    """Whether torch's own loop serves for neighbouring experts of no more than `average` rows on average: without
    Python between them a matmul of a few rows takes 12 to 15 µs less, 3 to 11 %. An empty expert costs it one, and
    rows that are no multiples of 16 bytes are an error, on the CPU too."""
    pieces, span = batch.pieces, batch.span
    if len(pieces) < RUN or batch.here.stop - batch.here.start > average * len(pieces):
        return False
    if span.stop - span.start > 4 * len(pieces):
        return False
    if not stack.numel() or stack.dtype.itemsize > 4 or stack.data_ptr() % 16:
        return False
    strides, unit = sorted(stack.stride()), 16 // stack.dtype.itemsize
    whole = not any(size % unit for size in (*stack.shape[1:], *strides[1:]))
    return whole and strides[0] == 1 and 1 in stack.stride()[1:]
