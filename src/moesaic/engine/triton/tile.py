"""What every kernel over tiles of rows shares: which tile a program has, which rows are in it, one step of a dot."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Under TRITON_INTERPRET bfloat16 is bit patterns to numpy: everything is widened to float32 before it is computed with.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def precision(dtype: torch.dtype) -> str:
    """How float32 matmuls multiply: "ieee" unless torch was told that TF32 is good enough."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def even(size: int, block: int) -> bool:
    """No masks needed along this axis."""
    return size % block == 0


def strides(matrix: Tensor | None, count: int) -> tuple[int, ...]:
    """Those of a tensor that may be missing."""
    return (0,) * count if matrix is None else matrix.stride()


def offsets(matrices: Tensor) -> tl.dtype:
    """The integers that reach all of one expert's matrix; where it begins is always reckoned in 64 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(matrices.shape[1:], matrices.stride()[1:], strict=True))
    return tl.int32 if reach < 2**31 - 2**20 else tl.int64  # tiles may stick out, masked


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
def tile_rows(tile, expert_of_tile, start_of_tile, ends, num_experts, SORTED: tl.constexpr):
    """(expert, first row, row after the last) of a tile. The expert is outside [0, num_experts) where there is none."""
    expert = tl.load(expert_of_tile + tile)
    expert = tl.where(expert < num_experts, expert, num_experts).to(tl.int32)  # an id may be wider
    if SORTED:
        start = tl.load(start_of_tile + tile)
        stop = tl.load(ends + expert, mask=expert < num_experts, other=0)
    else:
        start, stop = tile, tile + 1
    return expert, start, stop


@triton.jit
def tokens_of(rows, valid, token_of, k, SORTED: tl.constexpr):
    """The token of each row; token 0, which every batch has, for rows that are not valid: so loads need no mask."""
    if SORTED:
        return tl.load(token_of + rows, mask=valid, other=0).to(tl.int64)
    else:
        return tl.where(valid, rows // k, 0).to(tl.int64)


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
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32; b in a's dtype, as it is not under autocast."""
    return tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)


@triton.jit
def halves(tile):
    """(left columns, right columns). What comes after a dot is done by halves, or registers spill: 1000 bytes of stack
    in d_hidden with 128 x 128 tiles on sm_90, and none so."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def unzipped(tile):
    """(even columns, odd columns)."""
    return tile.reshape(tile.shape[0], tile.shape[1] // 2, 2).split()


@triton.jit
def zipped(even, odd):
    return tl.join(even, odd).reshape(even.shape[0], 2 * even.shape[1])
