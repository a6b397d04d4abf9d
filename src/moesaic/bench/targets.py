"""What is asked of our engine, cell by cell, and whether it was reached.

Set for a 2-core machine with AVX-512 and without 16-bit matmul instructions, with 2 threads and default settings.
Elsewhere they are a comparison, not a promise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.bench.runner import GEMM_ONLY, Result
from moesaic.bench.shapes import TINY, Cell, Grid

FLAGSHIPS = ("qwen3-30b", "olmoe", "dsv3-quarter")
ANY = 0.97  # a cell without a number of its own: never noticeably behind the best peer
OF_MATMULS, MATMULS_FROM = 0.85, 512  # share of the matmuls alone, from this many tokens
NO_BOUND = 1.05  # somebody faster than the matmuls alone by more than this: they are no bound in that cell
EAGER_TRAINING = 5.0  # times faster than transformers' eager, float32 forward and backward with fresh gradients
MEMORY = 1 / 0.6  # the best peer's peak over ours: at most 0.6 of it
SELECTION, ROUTER_OF_LAYER = 1.4, 0.05

# the best peer's median over ours, with balanced routing, in the order of FLAGSHIPS
RATIOS: dict[tuple[str, str, int], tuple[float, float, float]] = {
    ("forward", "bfloat16", 2048): (3.0, 3.0, 2.3),
    ("forward", "bfloat16", 512): (2.2, 2.3, 1.7),
    ("forward", "bfloat16", 128): (1.6, 1.8, 1.4),
    ("forward", "bfloat16", 16): (1.2, 1.2, 1.2),
    ("forward", "bfloat16", 1): (1.2, 1.2, 1.2),
    ("forward", "float32", 2048): (1.05, 1.05, 1.05),
    ("forward", "float32", 128): (1.15, 1.3, 1.0),
    ("forward", "float32", 16): (1.0, 1.0, 1.0),
    ("forward", "float32", 1): (1.0, 1.0, 1.0),
    ("fwd+bwd-fresh", "float32", 512): (1.1, 1.1, 1.1),
    ("fwd+bwd-fresh", "float32", 2048): (1.1, 1.1, 1.1),
    ("fwd+bwd-accumulate", "float32", 128): (1.8, 1.8, 1.8),
    ("fwd+bwd-accumulate", "float32", 512): (1.5, 1.5, 1.5),
    ("fwd+bwd-fresh", "bfloat16", 512): (2.0, 2.0, 2.0),
    ("fwd+bwd-accumulate", "bfloat16", 512): (2.0, 2.0, 2.0),
    ("memory", "float32", 2048): (MEMORY, MEMORY, MEMORY),
    ("memory", "bfloat16", 2048): (MEMORY, MEMORY, MEMORY),
}


@dataclass(frozen=True)
class Verdict:
    """One number asked and found. `at_most`: the found one should not be above, rather than not below."""

    cell: Cell
    what: str
    asked: float
    found: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.found <= self.asked if self.at_most else self.found >= self.asked


def target_cells(threads: int) -> list[Cell]:
    """Every cell that has a number of its own, in an order that loads each set of weights once."""
    cells = []
    for shape in FLAGSHIPS:
        for dtype in ("float32", "bfloat16"):
            for mode, of_dtype, tokens in RATIOS:
                if of_dtype == dtype:
                    grid = Grid((shape,), (tokens,), (dtype,), (mode,), ("balanced",), (threads,))
                    cells += grid.cells()
            if shape == "dsv3-quarter":
                cells.append(Cell(shape, 2048, dtype, "router", threads=threads))
    return cells


def asked_ratio(cell: Cell) -> float:
    named = RATIOS.get((cell.mode, cell.dtype, cell.tokens))
    if named is None or cell.shape not in FLAGSHIPS or cell.routing != "balanced":
        return ANY
    return named[FLAGSHIPS.index(cell.shape)]


def judge(result: Result) -> Iterator[Verdict]:
    """What a cell says about the targets; nothing where it was skipped, ours is wrong, or the shape is a tiny one."""
    cell = result.cell
    if cell.shape in TINY:
        return
    if cell.mode == "router":
        yield from _judge_router(result)
        return
    row = result.ours
    if row is None or row.cost is None:
        return
    if row.ratio is not None:
        yield Verdict(cell, "ratio to the best peer", asked_ratio(cell), row.ratio)
    shares = [other.of_matmuls for other in result.rows if other.of_matmuls is not None]
    if cell.tokens >= MATMULS_FROM and row.of_matmuls is not None and max(shares) <= NO_BOUND:
        yield Verdict(cell, f"share of {GEMM_ONLY}", OF_MATMULS, row.of_matmuls)
    eager = result.row("transformers eager")
    slow_eager = (cell.mode, cell.dtype) == ("fwd+bwd-fresh", "float32") and cell.tokens in (512, 2048)
    if slow_eager and eager is not None and eager.median_ms is not None and row.median_ms is not None:
        yield Verdict(cell, "ratio to transformers eager", EAGER_TRAINING, eager.median_ms / row.median_ms)


def _judge_router(result: Result) -> Iterator[Verdict]:
    selection, router = result.row("ours: selection"), result.row("ours: router")
    if selection is not None and selection.ratio is not None:
        yield Verdict(result.cell, "selection, ratio to transformers", SELECTION, selection.ratio)
    if router is not None and router.of_layer is not None:
        yield Verdict(result.cell, "router's share of the layer", ROUTER_OF_LAYER, router.of_layer, at_most=True)
