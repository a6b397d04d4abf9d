"""Gradients of the matrices: for every expert the product of its rows on one side with its rows on the other."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import compiled, dot, even, halves, load_rows, place, strided


def outer(
    left: Float[Tensor, "l a"],
    right: Float[Tensor, "r b"],
    out: Float[Tensor, "E a b"],
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
        right,
        layout.ends,
        layout.token_of,
        strided(out),
        a,
        b,
        GATHER_LEFT=gather == "left",
        ACCUMULATE=accumulate,
        **compiled(blocks, left.dtype, out, even(a, blocks.rows) and even(b, blocks.columns)),
    )
    return out


def d_matrix(
    out_grad: Float[Tensor, "o b"],
    inputs: Float[Tensor, "i a"],
    grad: Float[Tensor, "E ..."],
    layout: Layout,
    blocks: Blocks,
    *,
    by_token: str,
    transposed: bool,
    accumulate: bool = False,
) -> Tensor:
    """The gradient `grad` of matrices that took `inputs` to rows whose gradient is `out_grad`, in the matrices' layout.

    by_token: "out_grad" or "inputs", whichever lies by token.
    """
    if transposed:  # [E, in, out]
        gather = "left" if by_token == "inputs" else "right"
        return outer(inputs, out_grad, grad, layout, blocks, gather=gather, accumulate=accumulate)
    gather = "right" if by_token == "inputs" else "left"
    return outer(out_grad, inputs, grad, layout, blocks, gather=gather, accumulate=accumulate)


@triton.jit
def _outer(
    left,
    right,
    ends,
    token_of,
    matrices,
    height,
    width,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    GROUP: tl.constexpr = TILE.group
    EVEN: tl.constexpr = TILE.even
    high, wide = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    expert = tl.program_id(0) // (high * wide)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    if ACCUMULATE:
        if start == stop:
            return
    above, beside = place(tl.program_id(0) % (high * wide), high, wide, GROUP)
    row = above * ROWS + tl.arange(0, ROWS)
    column = beside * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, TILE.depth)

    left += row[None, :]
    right += column[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, stop, TILE.depth):
        here = first + steps
        valid = here < stop
        token = tl.load(token_of + here, mask=valid, other=0).to(tl.int64)
        of_left = (token if GATHER_LEFT else here.to(tl.int64))[:, None] * height
        of_right = (here.to(tl.int64) if GATHER_LEFT else token)[:, None] * width
        left_now = load_rows(left + of_left, valid, row < height, EVEN)
        right_now = load_rows(right + of_right, valid, column < width, EVEN)
        total = dot(tl.trans(left_now), right_now, total, TILE)

    out, out_expert, out_row, out_column = matrices
    out += expert.to(tl.int64) * out_expert
    parts = halves(total)
    for half in tl.static_range(2):
        line = beside * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        at = out + (row.to(TILE.offsets)[:, None] * out_row + line.to(TILE.offsets)[None, :] * out_column)
        there = (row < height)[:, None] & (line < width)[None, :]
        part = parts[half]
        if ACCUMULATE:
            part += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(at, part.to(out.dtype.element_ty), mask=there)
