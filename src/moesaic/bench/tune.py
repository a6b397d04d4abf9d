"""Tiles for one GPU by trying: around those of the table, a step at a time, each result checked against theirs.

The ops that walk over rows (up, matmul, d_hidden) read one layout, so they are chosen together for every number of
rows a tile; `outer` is chosen by itself.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.bench.gpu.clock import CudaClock
from moesaic.bench.gpu.truth import BOUNDS, relative_error
from moesaic.bench.problem import Problem, make_experts, make_problem
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.bench.timing import spread
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.blocks import Blocks, Tiles, built_in, suited
from moesaic.types import ExpertWeights
from moesaic.versions import versions

WALKERS = ("up", "matmul", "d_hidden")
OPS = (*WALKERS, "outer")
ROWS = {16: 8, 24: 20, 80: 64, 0: 1024}  # row of the built-in table -> rows an expert to measure it with
MOVES = 3  # steps away from the table's tiles at most
GAIN = 0.02  # of the time: less is noise, and the table's tiles stay
WARM, RUNS = 2, 7
LARGEST = {"rows": 128, "columns": 256, "depth": 128, "warps": 8, "stages": 5, "group": 8}
LEAST = {"rows": 16, "columns": 16, "depth": 16, "warps": 4, "stages": 2, "group": 1}

Timer = Callable[[str, Blocks, Callable[[], object]], float]  # (op, blocks, run) -> seconds


class Trial(NamedTuple):
    """One candidate. seconds: None where it did not run or was wrong, and the note says why."""

    dtype: str
    most: int
    op: str
    blocks: Blocks
    seconds: float | None
    note: str = ""


@dataclass
class Tuning:
    """The search for one shape and dtype on a device. `seconds`: shared out among the rows of the table."""

    shape: str
    dtype: str
    timer: Timer
    device: str = "cuda"
    capability: tuple[int, int] = (9, 0)
    seconds: float = float("inf")
    report: Callable[[Trial], object] = lambda _trial: None
    keep: Callable[["Tuning", dict[int, Tiles]], object] = lambda _tuning, _found: None  # what is found after each row
    check: Callable[[], object] = lambda: None  # after a failure: raises where the device takes nothing any more
    trials: list[Trial] = field(default_factory=list)
    _end: float = float("inf")

    def run(self, rows: Sequence[int] = tuple(ROWS)) -> dict[int, Tiles]:
        """Tiles by row of the built-in table: the best ones found, the table's own where nothing is clearly faster."""
        experts, start, found = make_experts(self.shape, self.dtype, self.device), time.perf_counter(), {}
        for number, most in enumerate(rows, start=1):
            self._end = start + self.seconds * number / len(rows)
            own = self._own(most)
            work = Work(self._problem(ROWS[most], experts), own)
            found[most] = self._tiles(most, own, work)
            self.keep(self, found)
            del work
        return found

    def gain(self, most: int, tiles: Tiles) -> float:
        """How many times faster than the table's own a whole set of tiles is: the time of all ops added up."""
        own = self._own(most)
        before, after = (sum(_seconds(self._known(most, op, getattr(t, op))) for op in OPS) for t in (own, tiles))
        return before / after if tiles != own and after < float("inf") else 1.0

    def _own(self, most: int) -> Tiles:
        """The table's, as the engine takes them for these experts."""
        tiles = built_in(ROWS[most], getattr(torch, self.dtype), self.capability)
        return suited(tiles, ExpertSpec.of(SHAPES[self.shape].config()), self.capability)

    def _problem(self, rows: int, experts: ExpertWeights) -> Problem:
        shape = SHAPES[self.shape]
        return make_problem(Cell(self.shape, -(-rows * shape.n_experts // shape.k), self.dtype, "forward"), experts)

    def _tiles(self, most: int, own: Tiles, work: "Work") -> Tiles:
        best: dict[int, dict[str, Trial]] = {}  # rows a tile -> op -> its fastest
        for rows in (own.up.rows, own.up.rows // 2, own.up.rows * 2):
            if LEAST["rows"] <= rows <= LARGEST["rows"]:
                started = {op: getattr(own, op)._replace(rows=rows) for op in WALKERS}
                moves = MOVES if rows == own.up.rows else 1
                best[rows] = {op: self._search(most, op, blocks, work, moves) for op, blocks in started.items()}
        outer = self._search(most, "outer", own.outer, work, MOVES)
        walkers = min(best.values(), key=_total)
        if _total(walkers) > (1 - GAIN) * self._own_total(most, own):
            walkers = {op: Trial(self.dtype, most, op, getattr(own, op), None) for op in WALKERS}
        return own._replace(**{op: trial.blocks for op, trial in {**walkers, "outer": outer}.items()})

    def _own_total(self, most: int, own: Tiles) -> float:
        return _total({op: self._known(most, op, getattr(own, op)) for op in WALKERS})

    def _known(self, most: int, op: str, blocks: Blocks) -> Trial:
        mine = (trial for trial in self.trials if (trial.most, trial.op, trial.blocks) == (most, op, blocks))
        return next(mine, Trial(self.dtype, most, op, blocks, None, "not tried: the time was up"))

    def _search(self, most: int, op: str, start: Blocks, work: "Work", moves: int) -> Trial:
        """Downhill: of all neighbours of the best tiles so far the best, while it gets faster."""
        best = self._try(most, op, start, work)
        seen = {start}
        for _ in range(moves):
            around = [blocks for blocks in neighbours(best.blocks, op) if blocks not in seen]
            seen.update(around)
            faster = min((self._try(most, op, blocks, work) for blocks in around), key=_seconds, default=best)
            if faster.seconds is None or faster.seconds > (1 - GAIN) * _seconds(best):
                break
            best = faster
        return best

    def _try(self, most: int, op: str, blocks: Blocks, work: "Work") -> Trial:
        seconds, note = None, ""
        if time.perf_counter() > self._end:
            return Trial(self.dtype, most, op, blocks, None, "not tried: the time was up")
        try:
            error = work.error(op, blocks)
            if error <= BOUNDS[self.dtype]:
                seconds = self.timer(op, blocks, lambda: work.run(op, blocks))
            else:
                note = f"wrong: differs from the table's tiles by {error:.1e}"
        except Exception as error:  # too much shared memory, too many registers: a candidate, no more
            note = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        trial = Trial(self.dtype, most, op, blocks, seconds, note)
        self.trials.append(trial)
        self.report(trial)
        if seconds is None:
            self.check()
        return trial


class Work:
    """Inputs of every op for one problem, and what the table's tiles make of them."""

    def __init__(self, problem: Problem, own: Tiles) -> None:
        from moesaic.engine.triton.plan import group_by_expert

        self._problem, self._own = problem, own
        self._k = problem.expert_ids.shape[1]
        self._plan = group_by_expert(problem.expert_ids, problem.config.n_routed_experts)
        self._layouts: dict[int, Any] = {}
        self._expected: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            self._hidden, self._activated = self.run("up", own.up)

    @torch.no_grad()
    def run(self, op: str, blocks: Blocks) -> list[Tensor]:
        """What the op gives: up both outputs, matmul the way forth and the way back, outer both matrices."""
        from moesaic.engine.triton.d_hidden import d_hidden
        from moesaic.engine.triton.matmul import matmul
        from moesaic.engine.triton.outer import d_matrix
        from moesaic.engine.triton.up import up

        p = self._problem
        spec, weights, grad = p.spec, p.weights, p.out_grad
        ups, downs = (w if spec.transposed else w.mT for w in p.experts[:2] if w is not None)  # [E, in, out]
        rows = self._layout((self._own.up if op == "outer" else blocks).rows)
        if op == "up":
            return list(up(p.tokens, self._k, rows, p.experts, spec, blocks, keep_hidden=True))
        if op == "matmul":
            forth = matmul(self._activated, downs, p.experts.down_bias, rows, blocks)
            return [forth, matmul(self._hidden, ups.mT, None, rows, blocks)]
        if op == "d_hidden":
            found = d_hidden(grad, self._hidden, weights, rows, p.experts, spec, blocks, wanted=(True, True, True))
            return [found.d_hidden, found.scaled, found.partials.sum(0)]
        d_down, d_up = (torch.empty_like(weight) for weight in (p.experts.down, p.experts.up))
        how = {"layout": rows, "blocks": blocks, "transposed": spec.transposed}
        return [
            d_matrix(grad, self._activated, d_down, by_token="out_grad", **how),
            d_matrix(self._hidden, p.tokens, d_up, by_token="inputs", **how),
        ]

    def error(self, op: str, blocks: Blocks) -> float:
        """That of its worst output, where what the table's own tiles give is the truth; NaN where one is."""
        if op not in self._expected:
            self._expected[op] = self.run(op, getattr(self._own, op))
        pairs = zip(self.run(op, blocks), self._expected[op], strict=True)
        return float(torch.tensor([relative_error(found.float(), expected.float()) for found, expected in pairs]).max())

    def _layout(self, rows: int) -> Any:
        from moesaic.engine.triton.layout import layout

        if rows not in self._layouts:
            self._layouts[rows] = layout(self._plan, self._k, rows)
        return self._layouts[rows]


def neighbours(blocks: Blocks, op: str) -> Iterator[Blocks]:
    """Tiles that differ in one number, after those of half the columns by half the warps in three stages: two programs
    fit where one did, and one computes while the other begins or ends. The rows of an op that walks over rows stay."""
    half = blocks._replace(columns=blocks.columns // 2, warps=blocks.warps // 2, stages=3)
    if half.columns >= LEAST["columns"] and half.warps >= LEAST["warps"]:
        yield half
    numbers = blocks._asdict()
    for name, value in numbers.items():
        if name == "rows" and op in WALKERS:
            continue
        steps = (value - 1, value + 1) if name == "stages" else (1, 8) if name == "group" else (value // 2, value * 2)
        for other in steps:
            if other != value and LEAST[name] <= other <= LARGEST[name]:
                yield blocks._replace(**{name: other})


def _seconds(trial: Trial) -> float:
    return float("inf") if trial.seconds is None else trial.seconds


def _total(trials: dict[str, Trial]) -> float:
    return sum(_seconds(trial) for trial in trials.values())


def by_events(clock: CudaClock) -> Timer:
    """The median of a few runs by CUDA events, the cache flushed before each."""

    def timer(_op: str, _blocks: Blocks, run: Callable[[], object]) -> float:
        for _ in range(WARM):
            run()
        tickets = []
        for _ in range(RUNS):
            clock.flush()
            tickets.append(clock.time(run))
        return spread([ticket() for ticket in tickets]).median

    return timer


def as_file(device: str, tuning: Tuning, found: dict[int, Tiles], before: Any = None) -> dict:
    """What `engine.triton.tuned` reads, with every trial. `before`: the file that was there, whose other dtypes and
    rows stay where it is of the same GPU and Triton."""
    from moesaic.engine.triton.tuned import FORMAT, parse_tuned

    tiles: dict[str, dict[str, Any]] = {}
    timings: list[dict[str, Any]] = []
    try:
        parse_tuned(before, device)
        tiles, timings = before["tiles"], list(before["timings"])
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    rows = tiles.setdefault(tuning.dtype, {})
    rows |= {str(most): {op: list(blocks) for op, blocks in t._asdict().items()} for most, t in found.items()}
    timings = [line for line in timings if line.get("dtype") != tuning.dtype or line.get("most") not in found]
    for trial in tuning.trials:
        took = None if trial.seconds is None else 1e6 * trial.seconds
        line = {**trial._asdict(), "blocks": list(trial.blocks), "us": took, "shape": tuning.shape}
        timings.append({name: value for name, value in line.items() if name != "seconds"})
    return {
        "format": FORMAT,
        "device": device,
        "versions": versions("triton"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tiles": tiles,
        "timings": timings,
    }


def read_before(path: Path) -> Any:
    """A file of tiles as it is, or nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
