"""Which tiles the kernels take: a table keyed by what is known without asking the device, and no search at run time.

Written from the sizes that vLLM's and sglang's tuned tables settle on for Hopper and from what fits into shared memory
and registers there; the rows of the table are replaced by measurements as they come.
"""

from functools import cache
from typing import NamedTuple

import torch

from moesaic.engine.spec import ExpertSpec


class Blocks(NamedTuple):
    """A program's share of a matmul: `rows` x `columns` of the result, `depth` of the sum at a time.

    stages: loads in flight.  group: row tiles that are computed side by side, so that they share a matrix in cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    group: int = 1


class Tiles(NamedTuple):
    """The blocks of every op for one problem. Those that walk over rows cut them alike: one layout serves all."""

    up: Blocks
    matmul: Blocks
    d_hidden: Blocks
    outer: Blocks


# most rows that an expert has on average -> tiles; 0 is for any number above
# 16-bit numbers where accumulators are spread over a whole warpgroup (wgmma) or lie in memory of their own (tcgen05)
WIDE = {
    16: Tiles(
        # a single token has 8 experts for 132 multiprocessors: narrow tiles, or some idle
        up=Blocks(16, 32, 128, 4, 4),
        matmul=Blocks(16, 64, 128, 4, 4),
        d_hidden=Blocks(16, 64, 128, 4, 4),
        outer=Blocks(128, 128, 32, 8, 5),
    ),
    24: Tiles(
        up=Blocks(32, 64, 64, 4, 4),  # three to a multiprocessor; by 128 deep one, whose waits nothing covers
        matmul=Blocks(32, 128, 64, 4, 4),
        d_hidden=Blocks(32, 64, 128, 4, 4),
        outer=Blocks(128, 128, 32, 8, 5),
    ),
    80: Tiles(
        up=Blocks(64, 128, 64, 8, 4),  # by 4 warps, wider weights (autocast) spill 96 bytes
        matmul=Blocks(64, 128, 64, 4, 4),
        d_hidden=Blocks(64, 128, 64, 4, 4),
        outer=Blocks(128, 256, 64, 8, 5),
    ),
    0: Tiles(
        up=Blocks(128, 128, 64, 8, 4, group=8),
        matmul=Blocks(128, 256, 64, 8, 4, group=8),
        d_hidden=Blocks(128, 128, 64, 8, 4, group=8),
        outer=Blocks(128, 256, 64, 8, 5, group=4),
    ),
}
# 16-bit numbers elsewhere: half as many accumulators a program, or registers spill
NARROW = {
    16: WIDE[16],
    24: WIDE[24],
    80: Tiles(
        up=Blocks(64, 64, 64, 4, 4),
        matmul=Blocks(64, 128, 64, 4, 4),
        d_hidden=Blocks(64, 128, 64, 8, 4),
        outer=Blocks(128, 128, 64, 8, 4),
    ),
    0: Tiles(
        up=Blocks(128, 64, 64, 8, 4, group=8),
        matmul=Blocks(128, 128, 64, 8, 4, group=8),
        d_hidden=Blocks(128, 128, 64, 8, 4, group=8),
        outer=Blocks(128, 128, 64, 8, 4, group=4),
    ),
}
# float32 without tensor cores: as much as the registers hold
FLOAT = {
    16: Tiles(
        up=Blocks(16, 32, 32, 4, 3),
        matmul=Blocks(16, 64, 32, 4, 3),
        d_hidden=Blocks(16, 64, 32, 4, 3),
        outer=Blocks(64, 64, 16, 4, 3),
    ),
    0: Tiles(
        up=Blocks(64, 64, 16, 4, 3, group=8),
        matmul=Blocks(64, 128, 16, 4, 3, group=8),
        d_hidden=Blocks(64, 128, 16, 4, 3, group=8),
        outer=Blocks(128, 64, 16, 4, 3, group=4),
    ),
}
INVARIANT_ROWS = 64  # rows an expert that the batch-invariant mode takes its tiles for, whatever comes
INTERPRETED = Tiles(*[Blocks(16, 16, 16)] * 4)  # where numpy stands for the device, small tiles test more

# bytes of shared memory that one program can have (CUDA programming guide, table of technical specifications)
SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
LEAST_SHARED_MEMORY = 101376  # every other GPU since Ampere
WARPGROUPS = (9, 10)  # the major capabilities whose matmuls take 64 rows and more from shared memory
MATRICES = {"up": 2}  # tiles of weights at a time; 1 unless named
WIDEST = {10: 128}  # columns of a matmul: 256 were wrong on sm_100 with some Tritons (marin#7484), nobody looked here


def tiles_for(
    rows_per_expert: int, dtype: torch.dtype, capability: tuple[int, int], weight_dtype: torch.dtype | None = None
) -> Tiles:
    """The tiles for a mean number of rows: those that were tuned on this GPU, else those of the table.

    Weights may be wider than the rows, as under autocast; tiles are tuned without that.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    if device is not None:
        _tuned(device)  # the first time it reads the file, and what was chosen before is forgotten
    return _chosen(rows_per_expert, dtype, capability, weight_dtype, device)


@cache
def _chosen(
    rows_per_expert: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    weight_dtype: torch.dtype | None,
    device: int | None,
) -> Tiles:
    here = device is not None and capability_of(torch.device("cuda", device)) == capability
    if here and weight_dtype in (None, dtype):
        tuned = _tuned(device).get(str(dtype).removeprefix("torch."), {})
        if tiles := tuned.get(_row(rows_per_expert, _table(dtype, capability))):
            return tiles
    return built_in(rows_per_expert, dtype, capability, weight_dtype)


@cache
def built_in(
    rows_per_expert: int, dtype: torch.dtype, capability: tuple[int, int], weight_dtype: torch.dtype | None = None
) -> Tiles:
    """The tiles of the table, with as many stages as fit into shared memory."""
    table = _table(dtype, capability)
    chosen = table[_row(rows_per_expert, table)]
    sizes = (dtype.itemsize, (weight_dtype or dtype).itemsize)
    return Tiles(*(fitted(op, blocks, sizes, capability) for op, blocks in chosen._asdict().items()))


def _table(dtype: torch.dtype, capability: tuple[int, int]) -> dict[int, Tiles]:
    return FLOAT if dtype == torch.float32 else WIDE if capability[0] in WARPGROUPS else NARROW


def _row(rows_per_expert: int, table: dict[int, Tiles]) -> int:
    return next((most for most in table if rows_per_expert <= most), 0)


@cache
def _tuned(device: int) -> dict[str, dict[int, Tiles]]:
    from moesaic.engine.triton.tuned import read_tuned

    _chosen.cache_clear()
    return read_tuned(torch.cuda.get_device_name(device))


def fitted(op: str, blocks: Blocks, itemsizes: tuple[int, int], capability: tuple[int, int]) -> Blocks:
    """`blocks` with fewer stages, or less depth, where shared memory is smaller than it was chosen for.

    itemsizes: bytes of an element of the rows, and of the weights. How many stages lie in memory is what the compiler
    was seen to do: all where a matmul reads shared memory itself (64 rows and more on WARPGROUPS), else one less, which
    waits in registers; two less in `outer`, whose row numbers have to be there before the rows.
    """
    memory = SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)
    blocks = blocks._replace(columns=min(blocks.columns, WIDEST.get(capability[0], blocks.columns)))
    outside = 2 if op == "outer" else 0 if capability[0] in WARPGROUPS and blocks.rows >= 64 else 1
    of_rows, of_weights = (itemsizes[0], itemsizes[0]) if op == "outer" else itemsizes
    while True:
        stage = (blocks.rows * of_rows + MATRICES.get(op, 1) * blocks.columns * of_weights) * blocks.depth
        stages = min(blocks.stages, memory // stage + outside)
        if stages >= 3 or blocks.depth <= 32:
            return blocks._replace(stages=max(stages, 1))
        blocks = blocks._replace(depth=blocks.depth // 2)


def suited(tiles: Tiles, spec: ExpertSpec, capability: tuple[int, int]) -> Tiles:
    """`tiles` as these experts can have them: gate and up are one matmul of twice the columns."""
    if not spec.gated:
        return tiles
    columns = min(tiles.up.columns, WIDEST.get(capability[0], 2 * tiles.up.columns) // 2)
    return tiles._replace(up=tiles.up._replace(columns=columns))


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
