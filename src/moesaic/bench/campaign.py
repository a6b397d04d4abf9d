"""Many cells, one set of weights at a time: with a budget, results kept as they come, and resumed where they ended."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.ceiling import Ceiling, measure_ceiling
from moesaic.bench.contenders import our_engines, peers_named
from moesaic.bench.gate import Truth
from moesaic.bench.gating import refuses_router, run_router_cell
from moesaic.bench.machine import machine
from moesaic.bench.memory import run_memory_cell
from moesaic.bench.problem import make_experts
from moesaic.bench.runner import Result, does_not_fit, failed, run_cell
from moesaic.bench.shapes import ROUNDS, SHAPES, Cell
from moesaic.bench.timing import CELL_SECONDS
from moesaic.types import ExpertWeights

RESULTS = "results.jsonl"
TRIES = 2  # of a cell that ended the whole run, by a crash or by running past its time
# of the machine and the run, for two runs to be one table
SAME = (
    *("cpu", "cores", "isa", "onednn_isa", "environment", "versions", "commit", "sources"),
    *("engines", "peers", "rounds"),
)


@dataclass
class Journal:
    """Lines of JSON: the machine, ceilings as they were measured, cells as they began and ended, commands that measured
    after the first. Appended to a file where there is one. `command`: that of the run that goes on with it."""

    path: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    @contextmanager
    def trying(self, key: str) -> Iterator[None]:
        """Around the measuring of a cell: a line says that it began, for a run that it ends, after the run's command
        where none before had it. Who presses Ctrl-C ends the run himself."""
        if self.command not in ("", *self.commands):
            self.add({"kind": "command", "command": self.command})
        self.add({"kind": "begin", "key": key})
        try:
            yield
        except KeyboardInterrupt:
            self.add({"kind": "interrupted", "key": key})
            raise

    def given_up(self, key: str) -> str:
        """Why a cell is not tried again, or nothing."""
        kinds = Counter(line["kind"] for line in self.lines if line.get("key") == key)
        tries = kinds["begin"] - kinds["interrupted"]
        return f"ended the run {tries} times without a result" if tries >= TRIES else ""

    @property
    def commands(self) -> list[str]:
        """Those that together give these results, the first first."""
        return [line["command"] for line in self.lines if line["kind"] in ("machine", "command") and "command" in line]

    @property
    def machine(self) -> dict[str, Any]:
        return next(line for line in self.lines if line["kind"] == "machine")

    @property
    def results(self) -> list[Result]:
        """The last of every cell."""
        found = (Result.of(line) for line in self.lines if line["kind"] == "cell")
        return list({result.cell: result for result in found}.values())

    @property
    def ceilings(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "ceiling"]


def open_journal(out: Path | None, *, resume: bool, settings: dict[str, Any] | None = None) -> Journal:
    """A new journal, or the one of an interrupted run on the same machine with the same versions and `settings`
    (engines, peers, rounds, and the command, which may differ).

    Raises ValueError where there is nothing to resume, something to overwrite, or another machine.
    """
    here = {"kind": "machine", **machine(), **(settings or {})}
    if out is None:
        if resume:
            raise ValueError("--resume needs the folder to go on with: give --out")
        return Journal(lines=[here])
    path = out / RESULTS
    if not resume:
        if path.exists():
            raise ValueError(f"{path} is there already: add --resume, or give another --out")
        journal = Journal(path)
        journal.add(here)
        return journal
    return resumed(path, here, SAME)


def resumed(path: Path, here: dict[str, Any], same: Sequence[str]) -> Journal:
    """The journal that is there. ValueError where it differs from `here` in one of the fields `same`."""
    journal = Journal(path, read_lines(path), here.get("command", ""))
    for name in same:
        then, now = journal.machine.get(name), here.get(name)
        if then != now:
            raise ValueError(f"{path}: measured with {name}={then}, here it is {now}: give another --out")
    return journal


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal; a last one that an interruption cut is left out. Raises ValueError where it is no journal."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): nothing to resume") from None
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines[0]["kind"] != "machine":
            raise KeyError("kind")
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path}: not a journal of `moesaic bench`: give another --out") from None
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return lines


@dataclass
class Campaign:
    """Runs cells into a journal; `rounds` None: ten, or what suits the time they take.

    Raises ValueError for engines and peers that there are not.
    """

    engines: Sequence[str]
    peers: Sequence[str]
    rounds: int | None = None
    budget_seconds: float | None = None
    journal: Journal = field(default_factory=Journal)

    def __post_init__(self) -> None:
        our_engines(self.engines, "float32")
        self._contenders = peers_named(self.peers)
        self._ceilings: dict[tuple[str, int], Ceiling] = {}

    def run(self, cells: Iterable[Cell], report: Callable[[Cell], object] = lambda _cell: None) -> list[Cell]:
        """Measure what is not in the journal yet, or was skipped; returns the cells that the budget left out, but for
        those that were skipped before: the report has them.

        `report` hears of each cell before it is measured.
        """
        start, left_out = time.perf_counter(), []
        skipped = {result.cell: result.skipped for result in self.journal.results if result.skipped}
        done = {result.cell for result in self.journal.results} - skipped.keys()
        threads_before = torch.get_num_threads()
        try:
            for group in _by_weights(cell for cell in cells if cell not in done):
                weights = _Weights(group[0])
                for cell in group:
                    then = skipped.get(cell, "")
                    if reason := self.journal.given_up(cell.key):
                        result = Result(cell, skipped=then if then.startswith("failed") else reason)
                    elif self.budget_seconds is not None and time.perf_counter() - start > self.budget_seconds:
                        left_out += [] if then else [cell]
                        continue
                    else:
                        report(cell)
                        torch.set_num_threads(cell.threads)
                        result = self._measure(cell, weights)
                    if not then or result.skipped != then:
                        self.journal.add(result.to_dict())
        finally:
            for dtype, threads in self._ceilings:
                self._measure_ceiling(dtype, threads, "end")
            torch.set_num_threads(threads_before)
        return left_out

    def _measure(self, cell: Cell, weights: "_Weights") -> Result:
        if reason := weights.refusal(cell):
            return Result(cell, skipped=reason)
        try:
            with self.journal.trying(cell.key):
                return self._run(cell, weights)
        except Exception as error:  # no contender's: the other cells are still to be measured
            weights.forget()
            return Result(cell, skipped=failed(error))

    def _run(self, cell: Cell, weights: "_Weights") -> Result:
        if cell.mode == "memory":
            weights.forget()  # every process makes its own
            return run_memory_cell(cell, self.engines, self.peers)
        if cell.mode == "router":
            return run_router_cell(cell, weights.get(), self.engines[0], rounds=self.rounds or ROUNDS)
        key = (cell.dtype, cell.threads)
        if key not in self._ceilings:
            self._ceilings[key] = self._measure_ceiling(*key, "begin")
        contenders = [*our_engines(self.engines, cell.dtype), *self._contenders]
        rounds, exact = self.rounds or ROUNDS, self.rounds is not None
        return run_cell(
            cell, weights.get(), contenders, self._ceilings[key], rounds=rounds, exact=exact, truths=weights.truths
        )

    def _measure_ceiling(self, dtype: str, threads: int, when: str) -> Ceiling:
        torch.set_num_threads(threads)
        ceiling = measure_ceiling(dtype)
        self.journal.add({"kind": "ceiling", "when": when, "dtype": dtype, "threads": threads, **ceiling._asdict()})
        return ceiling


class _Weights:
    """The weights of a shape and dtype, made when first asked for, and the float64 results that belong to them."""

    def __init__(self, cell: Cell) -> None:
        self._shape, self._dtype = cell.shape, cell.dtype
        self._experts: ExpertWeights | None = None
        self.truths: dict[Any, Truth] = {}

    def get(self) -> ExpertWeights:
        if self._experts is None:
            self._experts = make_experts(self._shape, self._dtype)
        return self._experts

    def forget(self) -> None:
        self._experts = None

    def refusal(self, cell: Cell) -> str:
        """Why a cell cannot be measured, or nothing."""
        held = 0 if self._experts is None else sum(w.nbytes for w in self._experts if w is not None)
        return (refuses_router(cell) if cell.mode == "router" else "") or does_not_fit(cell, held)


def _by_weights(cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Cells that share weights, together, in the order in which those first appear."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.shape, cell.dtype), []).append(cell)
    yield from groups.values()


def expected_seconds(cell: Cell, rounds: int | None) -> float:
    """A guess, for the time left: what a cell costs apart from its rounds, and those at an ordinary machine's speed."""
    shape = SHAPES[cell.shape]
    passes = 3 if cell.trains else 1
    compute = 6 * cell.tokens * shape.k * shape.hidden_size * shape.width * passes / 5e10
    active = min(shape.n_experts, cell.tokens * shape.k) / shape.n_experts
    moved = 4 * active * shape.num_parameters * passes / 1e10
    runs = 5 if cell.mode == "memory" else 6 * (rounds or ROUNDS)
    seconds = runs * (compute + moved)
    return 3 + (min(CELL_SECONDS, seconds) if rounds is None else seconds)
