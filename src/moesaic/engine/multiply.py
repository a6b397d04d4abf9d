"""The matmuls of a batch: every expert's rows through its matrix, each in the form that `gemm` has for it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.batches import Batch, Loads
from moesaic.engine.gemm import (
    AMX,
    INVARIANT,
    Table,
    form_for,
    looped_rows,
    matmul_dtype,
    most_rows,
    narrow_table,
    part_of,
    stray_rows,
    table_for,
)
from moesaic.engine.matmul_forms import ANY
from moesaic.engine.memory import Workspace
from moesaic.engine.outer import add_outer
from moesaic.engine.spec import ExpertSpec

LOOPED = 4  # experts of few rows that are worth a call of torch's own loop
# Experts that it passes for each with rows, at most. Forward, at most 4 | 12 (32 is as good), medians of 30 in turn,
# Intel Xeon. 4 tokens, 27 of 128 and 32 of 256 experts: qwen3-30b float32 20.5 | 20.2 ms, bfloat16 19.4 | 18.0, with
# AMX 15.6 | 13.8; dsv3-quarter 15.7 | 15.1, 14.1 | 13.5, 12.0 | 11.0. On 2 tokens 0 to 9 % less, on 8 tokens and in
# training 0 to 3 %.
SPARSE = 16


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
        multiplied in their own dtype, and a few rows too many with them."""
        if self._batch_invariant:
            return self._product(batch.loads, x.to(self._dtype), stack, INVARIANT, name, out)
        loads, table, few = batch.loads, table_for(self._dtype, stack), narrow_table(stack, self._own)
        if table is AMX:
            return self._turned(loads, x, stack, name, out)
        if min(loads.sizes) > most_rows(few):
            return self._product(loads, x.to(self._dtype), stack, table, name, out)
        if max(loads.sizes) <= most_rows(few):
            narrow = self._product(loads, x.to(stack.dtype), stack, few, "narrow")
        elif strays_stay(loads, stack, few):
            narrow = self._looped(loads, x.to(stack.dtype), stack, few, "narrow")
        else:
            return self._mixed(loads, x, stack, few, table, name, out)
        return narrow.to(self._dtype) if out is None else out.copy_(narrow)

    def _mixed(
        self, loads: Loads, x: Tensor, stack: Tensor, few: Table, table: Table, name: str, out: Tensor | None
    ) -> Tensor:
        """The experts of few rows by one table, the others one by one by the other."""
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], self._dtype)
        small, rows = loads.up_to(most_rows(few))
        narrow = self._product(small, x.index_select(0, rows).to(stack.dtype), stack, few, "narrow")
        out.index_copy_(0, rows, narrow.to(self._dtype))
        self._each(loads, x, stack, table, out, over=most_rows(few))
        return out

    def _turned(self, loads: Loads, x: Tensor, stack: Tensor, name: str, out: Tensor | None) -> Tensor:
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
        if loop_takes(stack) and loop_is_better(loads, ANY):
            product = F.grouped_mm(stack[loads.span].mT, x.mT, offs=loads.offsets).mT[:rows]
        else:
            product = self._work.take(name, stack.shape[2], distance, self._dtype)[:, :rows].mT
            self._each(loads, x[:rows], stack, AMX, product)
        return product if out is None else out.copy_(product)

    def _product(
        self, loads: Loads, x: Tensor, stack: Tensor, table: Table, name: str, out: Tensor | None = None
    ) -> Tensor:
        """By a table that has a form for every expert: torch's loop over them all, or over those of few rows and one by
        one over the others."""
        looped, most, can_loop = looped_rows(table), max(loads.sizes), loop_takes(stack)
        # Of few rows on average all are looped over: larger ones cost less there than by themselves (2 to 5 % of a
        # float32 layer under Zipf routing). A table that ends somewhere has a better form for its larger ones.
        if can_loop and (most_rows(table) == ANY or most <= looped) and loop_is_better(loads, looped):
            return self._looped(loads, x, stack, table, name, out)
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], x.dtype)
        if can_loop and 0 < looped < most:
            small, rows = loads.up_to(looped)
            if loop_is_better(small, looped):
                out.index_copy_(0, rows, self._looped(small, x.index_select(0, rows), stack, table, "looped"))
                self._each(loads, x, stack, table, out, over=looped)
                return out
        self._each(loads, x, stack, table, out)
        return out

    def _looped(
        self, loads: Loads, x: Tensor, stack: Tensor, table: Table, name: str, out: Tensor | None = None
    ) -> Tensor:
        """By torch's own loop over the experts, in parts of the weights where that is faster."""
        weights, step = stack[loads.span], part_of(stack, table, loads.average)
        if x.stride(0) == 1 and x.stride(1) * x.dtype.itemsize % 16:  # as `_turned` left it, which the loop refuses
            x = x.contiguous()
        if step >= stack.shape[2]:
            result = F.grouped_mm(x, weights, offs=loads.offsets)
            return result if out is None else out.copy_(result)
        if out is None:
            out = self._work.take(name, len(x), stack.shape[2], x.dtype)
        for some, result in zip(weights.split(step, 2), out.split(step, 1), strict=True):
            result.copy_(F.grouped_mm(x, some, offs=loads.offsets))
        return out

    def _each(self, loads: Loads, x: Tensor, stack: Tensor, table: Table, out: Tensor, over: int = 0) -> None:
        """One by one the experts of more than `over` rows, in the dtype of `out`."""
        for expert, place in loads.places(over):
            rows, result = x[place.start : place.stop].to(out.dtype), out[place.start : place.stop]
            form_for(table, len(place))(rows, stack[expert], result, self._work)

    def outer(
        self, batch: Batch, gradient: Tensor, g: Tensor, x: Tensor, spec: ExpertSpec, name: str, *, accumulate: bool
    ) -> None:
        """gradient[e] (+)= g_e^T x_e for every expert e of the batch, in the layout of the weights.

        An expert in several pieces is summed in scratch called `name`, in float32, before it reaches a 16-bit gradient.
        """
        left, right = (x, g) if spec.transposed else (g, x)
        sizes = batch.loads.sizes
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


def loop_takes(stack: Tensor) -> bool:
    """Whether torch's own loop over experts can: rows of other than whole 16 bytes are an error, on the CPU too."""
    if not stack.numel() or stack.dtype.itemsize > 4 or stack.data_ptr() % 16:
        return False
    strides, unit = sorted(stack.stride()), 16 // stack.dtype.itemsize
    whole = not any(size % unit for size in (*stack.shape[1:], *strides[1:]))
    return whole and strides[0] == 1 and 1 in stack.stride()[1:]


def loop_is_better(loads: Loads, average: int) -> bool:
    """Whether it is worth it for experts of no more than `average` rows on average: without Python between them a
    matmul of a few rows takes 12 to 15 µs less, 3 to 11 %; an expert without rows costs it one."""
    enough = len(loads.experts) >= LOOPED and loads.average <= average
    return enough and loads.span.stop - loads.span.start <= SPARSE * len(loads.experts)


def strays_stay(loads: Loads, stack: Tensor, few: Table) -> bool:
    """Whether a batch goes through the loop of a table that its larger experts have too many rows for; not where the
    table itself has a better form than the loop's for those."""
    most = looped_rows(few)
    strays = sum(size - most for size in loads.sizes if size > most)
    return most == most_rows(few) and strays <= stray_rows() and loop_takes(stack) and loop_is_better(loads, most)
