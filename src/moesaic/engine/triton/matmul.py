"""Rows, as sorted, through their experts' matrices: the down projection, and the way back through the up projection."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import columns_of, load_bias, multiply, my_rows, product, strided


def matmul(
    rows: Float[Tensor, "S a"], matrix: Float[Tensor, "E a b"], bias: Tensor | None, layout: Layout, blocks: Blocks
) -> Float[Tensor, "S b"]:
    """rows[r] @ matrix[e] + bias[e] for every row r of expert e. Rows of no expert are not written."""
    n, depth, width = len(rows), *matrix.shape[1:]
    out = rows.new_empty(n, width)
    tiles = len(layout.expert_of_tile)
    _matmul[(tiles * triton.cdiv(width, blocks.columns),)](
        rows,
        layout,
        strided(matrix),
        strided(bias),
        out,
        tiles,
        len(matrix),
        depth,
        width,
        **product(blocks, rows.dtype, matrix, width),
    )
    return out


@triton.jit(do_not_specialize=["tiles"])
def _matmul(x, layout, matrix, bias, out, tiles, num_experts, depth, width, TILE: tl.constexpr):
    expert, start, valid, block = my_rows(layout, tiles, tl.cdiv(width, TILE.columns), num_experts, TILE)
    if (expert < 0) | (expert >= num_experts):
        return
    row = tl.where(valid, tl.arange(0, TILE.rows), 0)[:, None]
    column, inside = columns_of(block, width, None, TILE)
    x_tile = x + start.to(tl.int64) * depth + (row * depth + tl.arange(0, TILE.depth)[None, :])
    total = multiply(x_tile, valid, matrix, expert, column, inside, depth, TILE)
    if bias is not None:
        total += load_bias(bias, expert, column, inside)[None, :]
    there = valid[:, None] & inside[None, :]
    out += start.to(tl.int64) * width
    tl.store(out + (row * width + column[None, :]), total.to(out.dtype.element_ty), mask=there)
