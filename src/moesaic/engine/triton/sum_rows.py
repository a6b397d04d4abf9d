"""Gradients of biases: the sum of every expert's rows."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.layout import Layout

COLUMNS, DEPTH = 64, 32  # of a program: columns it sums, rows it adds at a time


def sum_rows(
    rows: Float[Tensor, "r n"], weights: Float[Tensor, "T K"] | None, layout: Layout, like: Float[Tensor, "E n"]
) -> Float[Tensor, "E n"]:
    """For every expert the sum of its rows; with `weights`, rows lie by token and each counts with its routing weight.
    In the dtype of `like`; zero for an expert without rows."""
    out = like.new_empty(like.shape)
    n_experts, width = like.shape
    _sum_rows[(n_experts, triton.cdiv(width, COLUMNS))](
        rows, weights, layout.ends, layout.token_of, layout.assignments, out, width, COLUMNS, DEPTH
    )
    return out


@triton.jit
def _sum_rows(
    rows,
    weights,
    ends,
    token_of,
    assignments,
    out,
    width,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, stop, DEPTH):
        here = first + tl.arange(0, DEPTH)
        valid = here < stop
        row = here.to(tl.int64)
        scale = tl.full((DEPTH,), 1.0, tl.float32)
        if weights is not None:
            assignment = tl.load(assignments + here, mask=valid, other=0)
            scale = tl.load(weights + assignment, mask=valid, other=0.0).to(tl.float32)
            row = tl.load(token_of + here, mask=valid, other=0).to(tl.int64)
        at = rows + row[:, None] * width + column[None, :]
        value = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * scale[:, None], axis=0)
    tl.store(out + expert.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=inside)
