"""Rows, as sorted, through their experts' matrices: the down projection, and the way back through the up projection."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import dot, even, load_tile, offsets, place, precision, strides, tile_rows


def matmul(
    rows: Float[Tensor, "S a"], matrix: Float[Tensor, "E a b"], bias: Tensor | None, layout: Layout, blocks: Blocks
) -> Float[Tensor, "S b"]:
    """rows[r] @ matrix[e] + bias[e] for every row r of expert e. Rows of no expert are not written."""
    n, depth, width = len(rows), *matrix.shape[1:]
    out = rows.new_empty(n, width)
    tiles = len(layout.expert_of_tile)
    _matmul[(tiles * triton.cdiv(width, blocks.columns),)](
        rows,
        *layout.pointers[:3],
        matrix,
        *matrix.stride(),
        bias,
        *strides(bias, 2),
        out,
        tiles,
        len(matrix),
        depth,
        width,
        PRECISION=precision(rows.dtype),
        OFFSETS=offsets(matrix),
        EVEN_DEPTH=even(depth, blocks.depth),
        EVEN=even(depth, blocks.depth) and even(width, blocks.columns),
        **blocks.arguments,
    )
    return out


@triton.jit(do_not_specialize=["tiles"])
def _matmul(
    x,
    expert_of_tile,
    start_of_tile,
    ends,
    w,
    w_expert,
    w_depth,
    w_column,
    bias,
    bias_expert,
    bias_column,
    out,
    tiles,
    num_experts,
    depth,
    width,
    PRECISION: tl.constexpr,
    OFFSETS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, block = place(tl.program_id(0), tiles, tl.cdiv(width, COLUMNS), GROUP)
    expert, start, stop = tile_rows(tile, expert_of_tile, start_of_tile, ends, num_experts, True)
    if (expert < 0) | (expert >= num_experts):
        return
    rows = start + tl.arange(0, ROWS)
    valid = rows < stop
    row = tl.where(valid, tl.arange(0, ROWS), 0)[:, None]
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width

    steps = tl.arange(0, DEPTH)
    x_tile = x + start.to(tl.int64) * depth + (row * depth + steps[None, :])
    w += expert.to(tl.int64) * w_expert
    ahead = tl.full((), DEPTH, OFFSETS) * w_depth
    w_tile = w + (steps.to(OFFSETS)[:, None] * w_depth + column.to(OFFSETS)[None, :] * w_column)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for done in range(0, depth, DEPTH):
        left = steps < depth - done
        total = dot(load_tile(x_tile, valid, left, EVEN_DEPTH), load_tile(w_tile, left, inside, EVEN), total, PRECISION)
        x_tile += DEPTH
        w_tile += ahead

    if bias is not None:
        bias += expert.to(tl.int64) * bias_expert
        total += tl.load(bias + column * bias_column, mask=inside, other=0.0).to(tl.float32)[None, :]
    there = valid[:, None] & inside[None, :]
    out += start.to(tl.int64) * width
    tl.store(out + (row * width + column[None, :]), total.to(out.dtype.element_ty), mask=there)
