"""Where the rows of every expert lie, in tiles of a fixed number of rows, as kernels read it. Nothing waits for counts:
as many tiles are launched as there can be, and the surplus ones find no expert and end."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from moesaic.engine.plan import Plan

ASSIGNMENTS = 1024  # of a program


class Layout(NamedTuple):
    """The sorted assignments ("rows") and the tiles that cover them; a tile holds rows of one expert.

    expert_of_tile: [tiles] int32, E or more for a tile that is not needed.  start_of_tile: [tiles] its first row.
    ends: [E] where the rows of every expert end.  token_of: [S] the token of each row.
    assignments: [S] the flat (token, slot) number of each row.  row_of: [S] the way back, -1 where it names no expert.

    Unsorted, for a handful of tokens: row, tile and assignment are the same, expert_of_tile holds the ids themselves
    and the other fields are None.
    """

    expert_of_tile: Int[Tensor, " N"]
    start_of_tile: Tensor | None = None
    ends: Tensor | None = None
    token_of: Tensor | None = None
    assignments: Tensor | None = None
    row_of: Tensor | None = None


def unsorted(expert_ids: Int[Tensor, "T K"]) -> Layout:
    return Layout(expert_ids.flatten())


def layout(plan: Plan, k: int, block_rows: int) -> Layout:
    """Tiles of `block_rows` rows over a plan, and the way back from assignment to row."""
    n, experts = len(plan.assignments), len(plan.counts)
    tiles = most_tiles(n, experts, block_rows)
    padded = triton.next_power_of_2(experts)
    tiles_a_program = max(1, 8192 // padded)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=plan.counts.device)

    result = Layout(empty(tiles), empty(tiles), empty(experts), empty(n), plan.assignments, empty(n))
    _layout[(max(triton.cdiv(n, ASSIGNMENTS), triton.cdiv(tiles, tiles_a_program)),)](
        plan.assignments,
        plan.counts,
        *result[:4],
        result.row_of,
        n,
        k,
        experts,
        tiles,
        ROWS=block_rows,
        EXPERTS=padded,
        ASSIGNMENTS=ASSIGNMENTS,
        TILES=tiles_a_program,
    )
    return result


def most_tiles(n_assignments: int, n_experts: int, block_rows: int) -> int:
    """No routing needs more, and the worst needs as many: one row for each of many experts, the rest in full tiles."""
    used = min(n_experts, n_assignments)
    return used + (n_assignments - used) // block_rows


@triton.jit(do_not_specialize=["n", "tiles"])
def _layout(
    assignments,
    counts,
    expert_of_tile,
    start_of_tile,
    ends,
    token_of,
    row_of,
    n,
    k,
    num_experts,
    tiles,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ASSIGNMENTS: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    count = tl.load(counts + experts, mask=experts < num_experts, other=0).to(tl.int32)
    end = tl.cumsum(count, axis=0)
    total = tl.sum(count, axis=0)
    if program == 0:
        tl.store(ends + experts, end, mask=experts < num_experts)

    rows = program.to(tl.int64) * ASSIGNMENTS + tl.arange(0, ASSIGNMENTS)  # with many experts, far beyond the last
    assignment = tl.load(assignments + rows, mask=rows < n, other=0)
    tl.store(token_of + rows, assignment.to(tl.int32) // k, mask=rows < n)
    tl.store(row_of + assignment, tl.where(rows < total, rows, -1), mask=rows < n)

    tile = program.to(tl.int64) * TILES + tl.arange(0, TILES)  # with few experts, far beyond the last
    needed = tl.cdiv(count, ROWS)
    last_tile = tl.cumsum(needed, axis=0)
    expert = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    shift = end - count - (last_tile - needed) * ROWS  # what lies between `tile * ROWS` and the tile's first row
    shift = tl.sum(tl.where(experts[None, :] == expert[:, None], shift[None, :], 0), axis=1)
    tl.store(expert_of_tile + tile, expert, mask=tile < tiles)
    tl.store(start_of_tile + tile, tile * ROWS + shift, mask=tile < tiles)
