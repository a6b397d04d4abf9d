"""Gradients of the matrices: for every expert the product of its rows on one side with its rows on the other."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import dot, load_tile, offsets, place, precision


def outer(
    left: Float[Tensor, "l a"],
    right: Float[Tensor, "r b"],
    out: Float[Tensor, "E a b"],
    k: int,
    layout: Layout,
    blocks: Blocks,
    *,
    gather: str,
    accumulate: bool = False,
) -> Float[Tensor, "E a b"]:
    """out[e] = sum over the rows r of expert e of left[r]^T right[r], zero for an expert without rows.

    gather: "left" or "right", the side that lies by token and not by row. `accumulate` adds to what is in `out`.
    A block's `rows` and `columns` are those of `out`, its `depth` the rows that are added at a time.
    """
    n_experts, a, b = out.shape
    high, wide = triton.cdiv(a, blocks.rows), triton.cdiv(b, blocks.columns)
    _outer[(n_experts * high * wide,)](
        left,
        *left.stride(),
        right,
        *right.stride(),
        k,
        layout.ends,
        layout.assignments,
        out,
        *out.stride(),
        a,
        b,
        GATHER_LEFT=gather == "left",
        ACCUMULATE=accumulate,
        PRECISION=precision(left.dtype),
        OFFSETS=offsets(out),
        **blocks.arguments,
    )
    return out


@triton.jit
def _outer(
    left,
    left_row,
    left_column,
    right,
    right_row,
    right_column,
    k,
    ends,
    assignments,
    out,
    out_expert,
    out_row,
    out_column,
    height,
    width,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    high, wide = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    expert = tl.program_id(0) // (high * wide)
    above, beside = place(tl.program_id(0) % (high * wide), high, wide, GROUP)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    row = above * ROWS + tl.arange(0, ROWS)
    column = beside * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, stop, DEPTH):
        here = first + steps
        valid = here < stop
        token = (tl.load(assignments + here, mask=valid, other=0).to(tl.int32) // k).to(tl.int64)
        by_row = here.to(tl.int64)
        left_at = left + (token if GATHER_LEFT else by_row)[:, None] * left_row + (row * left_column)[None, :]
        right_at = right + (by_row if GATHER_LEFT else token)[:, None] * right_row + (column * right_column)[None, :]
        left_now = load_tile(left_at, valid, row < height, False)
        right_now = load_tile(right_at, valid, column < width, False)
        total = dot(tl.trans(left_now), right_now, total, PRECISION)

    out += expert.to(tl.int64) * out_expert
    at = out + (row.to(OFFSETS)[:, None] * out_row + column.to(OFFSETS)[None, :] * out_column)
    there = (row < height)[:, None] & (column < width)[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=there)
