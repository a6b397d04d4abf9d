"""What every kernel over tiles of rows shares: which tile a program has, which rows are in it, the product itself."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.engine.triton.blocks import Blocks

# Under TRITON_INTERPRET bfloat16 is bit patterns to numpy: everything is widened to float32 before it is computed with.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Tile(NamedTuple):
    """What a kernel over tiles is compiled for, beside what it computes; the first four are those of `Blocks`.

    precision: how float32 is multiplied.  offsets: the integers that reach all of one expert's matrix; where it begins
    is always reckoned in 64 bits.  even, even_depth: no masks are needed, anywhere or along the sum.  wrapped: columns
    beyond the last read the first ones, and nobody stores them.

    In a kernel a field is a bare number: one that a jitted function is to take has to be named as a constexpr first.
    """

    rows: int
    columns: int
    depth: int
    group: int
    precision: str
    offsets: tl.dtype
    even: bool
    even_depth: bool
    wrapped: bool


def product(blocks: Blocks, dtype: torch.dtype, matrix: Tensor, width: int) -> dict[str, Any]:
    """How a kernel is compiled that multiplies rows by `matrix` [E, depth, ...]; its tiles share `width` columns."""
    even_depth = even(matrix.shape[1], blocks.depth)
    wrapped = even_depth and even(width, 16) and not even(width, blocks.columns)  # 2880 columns of gpt-oss by 128
    whole = wrapped or (even_depth and even(width, blocks.columns))
    return compiled(blocks, dtype, matrix, whole, even_depth, wrapped)


def compiled(
    blocks: Blocks, dtype: torch.dtype, matrix: Tensor, whole: bool, even_depth: bool = False, wrapped: bool = False
) -> dict[str, Any]:
    """How a kernel over tiles of these blocks is compiled, for a `matrix` of every expert."""
    cut = (blocks.rows, blocks.columns, blocks.depth, blocks.group)
    tile = Tile(*cut, precision(dtype), offsets(matrix), whole, even_depth, wrapped)
    return {"TILE": tile, "num_warps": blocks.warps, "num_stages": blocks.stages}


def precision(dtype: torch.dtype) -> str:
    """How float32 matmuls multiply: "ieee" unless torch was told that TF32 is good enough."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def even(size: int, block: int) -> bool:
    """No masks needed along this axis."""
    return size % block == 0


def offsets(matrices: Tensor) -> tl.dtype:
    """The integers that reach all of one expert's matrix; where it begins is always reckoned in 64 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(matrices.shape[1:], matrices.stride()[1:], strict=True))
    return tl.int32 if reach < 2**31 - 2**20 else tl.int64  # tiles may stick out, masked


def strided(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """As kernels take a tensor that has something for every expert: (pointer, stride of experts, other strides)."""
    return None if tensor is None else (tensor, *tensor.stride())


@triton.jit
def place(program, tiles, columns, GROUP: tl.constexpr):
    """(tile of rows, tile of columns) of a program: GROUP row tiles share each column tile before the next one is
    begun, so that both stay in cache (the order of Triton's matmul tutorial)."""
    width = GROUP * columns
    first = (program // width) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = program % width
    return first + inside % height, inside // height


@triton.jit
def my_rows(layout, tiles, columns, num_experts, TILE: tl.constexpr):
    """(expert, first row, which of TILE.rows rows are the expert's, tile of columns) of this program. The expert is
    outside [0, num_experts) where there is none."""
    GROUP: tl.constexpr = TILE.group
    tile, block = place(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.load(layout.expert_of_tile + tile)
    expert = tl.where(expert < num_experts, expert, num_experts).to(tl.int32)  # an id may be wider
    if layout.ends is None:
        start, stop = tile, tile + 1
    else:
        start = tl.load(layout.start_of_tile + tile)
        stop = tl.load(layout.ends + expert, mask=expert < num_experts, other=0)
    return expert, start, start + tl.arange(0, TILE.rows) < stop, block


@triton.jit
def tokens_of(start, valid, layout, k, TILE: tl.constexpr):
    """The token of each row; token 0, which every batch has, for rows that are not valid: so loads need no mask."""
    rows = start + tl.arange(0, TILE.rows)
    if layout.token_of is None:
        return tl.where(valid, rows // k, 0).to(tl.int64)
    else:
        return tl.load(layout.token_of + rows, mask=valid, other=0).to(tl.int64)


@triton.jit
def columns_of(block, width, PAIRS: tl.constexpr, TILE: tl.constexpr):
    """(the columns of this program's tile, which of them are there).

    PAIRS: where they come in pairs of gate and up, `width` pairs in all, the tile has TILE.columns pairs: "apart" takes
    columns from all gates and as many from all ups, which lie behind; "neighbours" takes what lies together. Or None.
    """
    COLUMNS: tl.constexpr = TILE.columns
    ACROSS: tl.constexpr = COLUMNS if PAIRS is None else 2 * COLUMNS
    lane = tl.arange(0, ACROSS)
    if PAIRS == "apart":
        column = block * COLUMNS + lane % COLUMNS
    else:
        column = block * ACROSS + lane
    if PAIRS == "neighbours":
        width = 2 * width
    inside = column < width
    if TILE.wrapped:  # less than a mask costs; 16 numbers still lie side by side
        column = tl.max_contiguous(tl.multiple_of(column % width, 16), 16)
    if PAIRS == "apart":
        column += lane // COLUMNS * width
    return column, inside


@triton.jit
def multiply(x_tile, valid, matrix, expert, column, inside, depth, TILE: tl.constexpr):
    """Rows through those columns of the expert's matrix, in float32."""
    ROWS: tl.constexpr = TILE.rows
    EVEN: tl.constexpr = TILE.even
    EVEN_DEPTH: tl.constexpr = TILE.even_depth
    w, w_expert, w_depth, w_column = matrix
    steps = tl.arange(0, TILE.depth)
    ahead = tl.full((), TILE.depth, TILE.offsets) * w_depth
    lines = steps.to(TILE.offsets)[:, None] * w_depth
    w_tile = w + expert.to(tl.int64) * w_expert + (lines + column.to(TILE.offsets)[None, :] * w_column)
    total = tl.zeros((ROWS, column.shape[0]), dtype=tl.float32)
    for done in range(0, depth, TILE.depth):
        left = steps < depth - done
        x_now = load_tile(x_tile, valid, left, EVEN_DEPTH)
        total = dot(x_now, load_tile(w_tile, left, inside, EVEN), total, TILE)
        x_tile += TILE.depth
        w_tile += ahead
    return total


@triton.jit
def load_bias(bias, expert, column, inside):
    """Those columns of the expert's bias, in float32."""
    pointer, of_expert, of_column = bias
    pointer += expert.to(tl.int64) * of_expert
    return tl.load(pointer + column * of_column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_tile(pointers, row_valid, column_valid, EVEN: tl.constexpr):
    """A tile whose every element is there (EVEN), or with zeros where it is not."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=row_valid[:, None] & column_valid[None, :], other=0.0)
    return widened(tile)


@triton.jit
def load_rows(pointers, row_valid, column_valid, EVEN: tl.constexpr):
    """A tile with zeros for rows that are not valid, and for columns that are not there unless all are (EVEN)."""
    if EVEN:
        tile = tl.load(pointers, mask=row_valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=row_valid[:, None] & column_valid[None, :], other=0.0)
    return widened(tile)


@triton.jit
def widened(tile):
    if INTERPRETED:
        return tile.to(tl.float32)
    else:
        return tile


@triton.jit
def dot(a, b, total, TILE: tl.constexpr):
    """total + a @ b in float32; b in a's dtype, as it is not under autocast."""
    return tl.dot(a, b.to(a.dtype), total, input_precision=TILE.precision)


@triton.jit
def halves(tile):
    """(left columns, right columns): gate and up where one tile has both. What comes after a dot is done by halves, or
    registers spill: 1000 bytes of stack in d_hidden with 128 x 128 tiles on sm_90, and none so."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def unzipped(tile):
    """(even columns, odd columns)."""
    return tile.reshape(tile.shape[0], tile.shape[1] // 2, 2).split()


@triton.jit
def zipped(even, odd):
    return tl.join(even, odd).reshape(even.shape[0], 2 * even.shape[1])
