"""Many cells, one set of weights at a time: with a budget, results kept as they come, and resumed where they ended."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.ceiling import Ceiling, measure_ceiling
from moesaic.bench.contenders import Contender, our_engines
from moesaic.bench.gate import Truth
from moesaic.bench.machine import machine
from moesaic.bench.problem import make_experts
from moesaic.bench.runner import Result, does_not_fit, run_cell
from moesaic.bench.shapes import Cell

RESULTS = "results.jsonl"
SAME = ("cpu", "cores", "isa", "onednn_isa", "versions", "commit")  # of the machine, for two runs to be one table


@dataclass
class Journal:
    """Lines of JSON: the machine, ceilings as they were measured, cells. Appended to a file where there is one."""

    path: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def machine(self) -> dict[str, Any]:
        return next(line for line in self.lines if line["kind"] == "machine")

    @property
    def results(self) -> list[Result]:
        return [Result.of(line) for line in self.lines if line["kind"] == "cell"]

    @property
    def ceilings(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "ceiling"]


def open_journal(out: Path | None, *, resume: bool) -> Journal:
    """A new journal, or the one of an interrupted run on the same machine with the same versions.

    Raises ValueError where there is nothing to resume, something to overwrite, or another machine.
    """
    here = {"kind": "machine", **machine()}
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
    journal = Journal(path, read_lines(path))
    for name in SAME:
        if journal.machine[name] != here[name]:
            raise ValueError(
                f"{path}: measured with {name}={journal.machine[name]}, here it is {here[name]}: give another --out"
            )
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
    """Runs cells into a journal. `report(cell)` hears of each cell before it is run."""

    engines: Sequence[str]
    peers: Sequence[Contender]
    rounds: int
    journal: Journal
    budget_seconds: float | None = None
    report: Callable[[Cell], object] = lambda _cell: None

    def run(self, cells: Iterable[Cell]) -> list[Cell]:
        """Measure what is not in the journal yet; returns the cells that the budget left out."""
        start, left_out = time.perf_counter(), []
        done = {result.cell for result in self.journal.results}
        ceilings: dict[tuple[str, int], Ceiling] = {}
        try:
            for shape, dtype, group in _by_weights(cell for cell in cells if cell not in done):
                experts, truths = None, {}
                for cell in group:
                    if self.budget_seconds is not None and time.perf_counter() - start > self.budget_seconds:
                        left_out.append(cell)
                        continue
                    self.report(cell)
                    torch.set_num_threads(cell.threads)
                    if experts is None and (reason := does_not_fit(cell)):
                        self.journal.add(Result(cell, skipped=reason).to_dict())
                        continue
                    if (dtype, cell.threads) not in ceilings:
                        ceilings[dtype, cell.threads] = self._ceiling(dtype, cell.threads, "begin")
                    experts = make_experts(shape, dtype) if experts is None else experts
                    self._measure(cell, experts, ceilings[dtype, cell.threads], truths)
        finally:
            for dtype, threads in ceilings:
                self._ceiling(dtype, threads, "end")
        return left_out

    def _measure(self, cell: Cell, experts: Any, ceiling: Ceiling, truths: dict[Any, Truth]) -> None:
        contenders = [*our_engines(self.engines, cell.dtype), *self.peers]
        result = run_cell(cell, experts, contenders, ceiling, rounds=self.rounds, truths=truths)
        self.journal.add(result.to_dict())

    def _ceiling(self, dtype: str, threads: int, when: str) -> Ceiling:
        torch.set_num_threads(threads)
        ceiling = measure_ceiling(dtype)
        self.journal.add({"kind": "ceiling", "when": when, "dtype": dtype, "threads": threads, **ceiling._asdict()})
        return ceiling


def _by_weights(cells: Iterable[Cell]) -> Iterator[tuple[str, str, list[Cell]]]:
    """Cells that share weights, together, in the order in which those first appear."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.shape, cell.dtype), []).append(cell)
    for (shape, dtype), group in groups.items():
        yield shape, dtype, group
