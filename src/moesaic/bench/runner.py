"""One cell: build everybody, refuse the wrong, time the rest in turn, and say how far each is from the ceiling."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from moesaic.bench.ceiling import Ceiling, Phase, l3_bytes, least_seconds, phases_of
from moesaic.bench.contenders import PEERS, Call, Contender
from moesaic.bench.gate import BOUNDS, SANE, Truth, errors_of, is_right, truth_of
from moesaic.bench.machine import available_bytes
from moesaic.bench.matmuls import Matmuls
from moesaic.bench.problem import Problem, make_problem
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.bench.timing import Entrant, interleave, plan_rounds, spread
from moesaic.types import ExpertWeights

T = TypeVar("T")
GEMM_ONLY = "gemm-only"
FAILED = "failed:"
QUICK = 1.0  # seconds
LEAST_BYTES = 1 << 20  # of memory that are told apart: pages come and go by themselves
EAGER = PEERS["eager"].name


@dataclass
class Row:
    """One contender in one cell. Speeds are None where it is wrong or was refused; `note` says which and why.

    Milliseconds; GF/s and GB/s count the work of the roofline, whatever the contender really moved.
    runs_ms: every run.  of_ceiling: least time by roofline over the median.
    of_matmuls: the median of gemm-only over this one.
    ratio: the best peer's median over this one, for our engines; of memory, the best peer's bytes over these.
    extra_bytes: peak memory over weights and gradients.  of_layer: a router's share of router and experts together.
    build_ms, prepacked_bytes: what came before the clock, and the copy of the weights that it made.
    """

    name: str
    kind: str
    note: str = ""
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    rounds: int = 0
    runs_ms: list[float] = field(default_factory=list)
    gflops: float | None = None
    gbytes: float | None = None
    of_ceiling: float | None = None
    of_matmuls: float | None = None
    ratio: float | None = None
    best_peer: str | None = None
    extra_bytes: int | None = None
    of_layer: float | None = None
    build_ms: float = 0.0
    prepacked_bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def cost(self) -> float | None:
        """What is compared: milliseconds, or bytes in a memory cell."""
        return self.median_ms if self.extra_bytes is None else max(self.extra_bytes, LEAST_BYTES)

    def timed(self, seconds: list[float]) -> float:
        """Fill in what its runs took; returns their median, in seconds."""
        measured = spread(seconds)
        self.median_ms, self.p10_ms, self.p90_ms = (1e3 * value for value in measured[:3])
        self.rounds, self.runs_ms = measured.rounds, [1e3 * value for value in seconds]
        return measured.median

    def to_dict(self) -> dict[str, Any]:
        """JSON has no infinity: null is the error of a gradient that is missing or not a number."""
        errors = {what: error if math.isfinite(error) else None for what, error in self.errors.items()}
        return {**asdict(self), "errors": errors}

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Row":
        errors = {what: math.inf if error is None else error for what, error in line["errors"].items()}
        return replace(cls(**line), errors=errors)


@dataclass
class Result:
    """A cell with its rows, or the reason why it was left out."""

    cell: Cell
    rows: list[Row] = field(default_factory=list)
    skipped: str = ""
    least_ms: float | None = None
    ceiling: Ceiling | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        ceiling = None if self.ceiling is None else self.ceiling._asdict()
        rows = [row.to_dict() for row in self.rows]
        return {"kind": "cell", "key": self.cell.key, **asdict(self), "rows": rows, "ceiling": ceiling}

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Result":
        ceiling = None if line["ceiling"] is None else Ceiling(**line["ceiling"])
        rows = [Row.of(row) for row in line["rows"]]
        return cls(Cell.of(line["cell"]), rows, line["skipped"], line["least_ms"], ceiling, line["seconds"])

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def ours(self) -> Row | None:
        return next((row for row in self.rows if row.kind == "ours"), None)


def needed_bytes(cell: Cell) -> int:
    """What a cell takes at its peak with the hungriest contender: weights, four gradients as large, activations."""
    shape, item = SHAPES[cell.shape], 4 if cell.dtype == "float32" else 2
    weights = item * shape.num_parameters
    activations = 4 * cell.tokens * shape.k * (6 * shape.hidden_size + 8 * shape.width)
    copies = 5 if cell.trains else 1
    return copies * weights + activations + flush_bytes(cell)


def flush_bytes(cell: Cell) -> int:
    """What is read before a run that is to find nothing in the cache: twice what that holds."""
    return 2 * l3_bytes() if cell.cache == "cold" else 0


def does_not_fit(cell: Cell, held: int = 0) -> str:
    """The reason to skip a cell on this machine, or nothing. `held`: bytes of its weights that are there already."""
    available, needed = available_bytes(), needed_bytes(cell)
    if available is None or needed - held < 0.9 * available:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"


def run_cell(
    cell: Cell,
    experts: ExpertWeights,
    contenders: Iterable[Contender],
    ceiling: Ceiling,
    *,
    rounds: int,
    exact: bool = False,
    truths: dict[Any, Truth] | None = None,
) -> Result:
    """Measure a cell in about so many rounds, or just as many where `exact`.

    `truths` keeps the float64 results of the last cell, for one that differs only in threads, cache or mode; those of
    many cells would take more memory than a cell.
    """
    start = time.perf_counter()
    problem = make_problem(cell, experts)
    truths = {} if truths is None else truths
    case = (cell.shape, cell.tokens, cell.dtype, cell.routing, cell.trains)
    if case not in truths:
        truths.clear()
        truths[case] = truth_of(problem)
    judged = _judge(problem, truths[case], contenders)
    rows = [row for row, _, _ in judged]
    calls = {row.name: call for row, call, _ in judged if call is not None}
    entrants = entrants_of(problem, calls)
    once = {row.name: seconds for row, call, seconds in judged if call is not None}
    rows.append(Row(GEMM_ONLY, "bound"))
    once[GEMM_ONLY] = _timed(entrants[-1].run)[1]
    not_peers = [row.name for row in rows if row.kind != "peer"]
    planned = dict.fromkeys(once, rounds) if exact else plan_rounds(once, rounds, never_few=not_peers)
    seconds = interleave(entrants, planned)
    seconds = {name: runs or [once[name]] for name, runs in seconds.items()}
    problem.forget_gradients(weights_too=True)
    least_ms = fill(rows, seconds, phases_of(problem), ceiling)
    return Result(cell, rows, least_ms=least_ms, ceiling=ceiling, seconds=time.perf_counter() - start)


def _judge(problem: Problem, truth: Truth, contenders: Iterable[Contender]) -> list[tuple[Row, Call | None, float]]:
    """Rows with errors, what is fit to be timed, and how long one run took. Eager first: its errors are the measure."""
    judged, eager = [], {}
    for contender in sorted(contenders, key=lambda c: c.name != EAGER):
        row = Row(contender.name, contender.kind)
        refusal = contender.refuses(problem.cell)
        if refusal:
            row.note = refusal
            judged.append((row, None, math.nan))
            continue
        try:
            call, seconds = _timed(lambda contender=contender: contender.build(problem))
            row.build_ms = 1e3 * seconds
            row.prepacked_bytes = getattr(call, "prepacked_bytes", 0)
            row.errors, seconds = _try(problem, truth, call)
        except Exception as error:  # anybody's: the others are still to be measured
            row.note = failed(error)
            problem.forget_gradients(weights_too=True)
            judged.append((row, None, math.nan))
            continue
        right = is_right(row.errors, eager, bound_of(contender, problem.cell.dtype))
        if not right:
            row.note = "wrong"
        elif contender.name == EAGER:
            eager = row.errors
        judged.append((row, call if right else None, seconds))
    return judged


def bound_of(contender: Contender, dtype: str) -> float:
    """Of its errors; eager, the measure of the others, has none to be measured by and is to be sane."""
    return (SANE if contender.name == EAGER else 1.0) * BOUNDS[dtype]


def failed(error: Exception) -> str:
    """The note of a contender that raised."""
    first = str(error).partition("\n")[0]
    return f"{FAILED} {type(error).__name__}: {first}"


def _try(problem: Problem, truth: Truth, call: Call) -> tuple[dict[str, float], float]:
    """Errors of a contender, and the seconds of its last run."""
    forget_gradients(problem, call, weights_too=True)
    out, seconds = _timed(lambda: run_once(problem, call))
    accumulates = problem.cell.accumulates
    if accumulates or seconds < QUICK:  # the first run of a quick one is mostly its start
        forget_gradients(problem, call, weights_too=not accumulates)
        out, seconds = _timed(lambda: run_once(problem, call))
    grads_of = getattr(call, "expert_grads", problem.expert_grads)
    errors = errors_of(problem, truth, out, passes=2 if accumulates else 1, grads_of=grads_of)
    forget_gradients(problem, call, weights_too=not accumulates)
    return errors, seconds


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def run_once(problem: Problem, call: Call) -> Tensor:
    """The timed region: a forward, and a backward where the cell trains."""
    with torch.set_grad_enabled(problem.cell.mode != "forward"):
        out = call(problem.tokens, problem.expert_ids, problem.weights)
    if problem.cell.trains:
        out.backward(problem.out_grad)
    return out


def entrants_of(problem: Problem, calls: Mapping[str, Call]) -> list[Entrant]:
    """Who is timed: the `calls`, and last the matmuls alone."""
    flush = torch.ones(flush_bytes(problem.cell) // 4)
    runs: dict[str, Callable[[], object]] = {name: partial(run_once, problem, call) for name, call in calls.items()}
    runs[GEMM_ONLY] = Matmuls(problem)
    return [Entrant(name, partial(_prepare, problem, run, calls.values(), flush), run) for name, run in runs.items()]


def _prepare(problem: Problem, run: Callable[[], object], calls: Collection[Call], flush: Tensor) -> None:
    """What comes before the clock: the same call for a warm cache, a read of `flush` for a cold one.

    Nobody starts beside the gradients of another of the `calls`: fresh ones are given back first, so that all take the
    pages that were just freed. A virtual machine may have to get older ones from its host: dsv3-quarter T=512 took 2.3
    to 5.8 instead of 1.3 s.
    """
    weights_too, cache = not problem.cell.accumulates, problem.cell.cache
    forget_gradients(problem, *calls, weights_too=weights_too)
    if cache == "warm":
        run()
        forget_gradients(problem, *calls, weights_too=weights_too)
    elif cache == "cold":
        flush.sum()


def forget_gradients(problem: Problem, *calls: Call, weights_too: bool) -> None:
    """Those of the problem, and of what leaves calls have of their own."""
    problem.forget_gradients(weights_too=weights_too)
    for leaf in chain.from_iterable(getattr(call, "leaves", ()) for call in calls):
        if weights_too:
            leaf.grad = None


def fill(
    rows: Sequence[Row],
    seconds: Mapping[str, list[float]],
    phases: Sequence[Phase],
    ceiling: Ceiling,
    flops: float | None = None,
) -> float:
    """Times, GF/s, GB/s and share of the ceiling of every row that was timed; then who is best. Returns the least
    milliseconds. `flops`: what GF/s are counted from, all phases unless given."""
    least = least_seconds(phases, ceiling)
    flops = sum(phase.flops for phase in phases) if flops is None else flops
    moved = sum(phase.bytes for phase in phases)
    for row in rows:
        if row.name in seconds:
            median = row.timed(seconds[row.name])
            row.gflops, row.gbytes, row.of_ceiling = 1e-9 * flops / median, 1e-9 * moved / median, least / median
    compare(rows)
    return 1e3 * least


def compare(rows: Sequence[Row]) -> None:
    """Fill in what relates rows to each other: our ratio to the best peer, everybody's to the matmuls alone."""
    peers = [(cost, row.name) for row in rows if row.kind == "peer" and (cost := row.cost) is not None]
    bound = next((row for row in rows if row.name == GEMM_ONLY), None)
    for row in rows:
        if row.cost is None:
            continue
        if bound is not None and bound.median_ms is not None and row.median_ms is not None and row is not bound:
            row.of_matmuls = bound.median_ms / row.median_ms
        if row.kind == "ours" and peers:
            best, row.best_peer = min(peers)
            row.ratio = best / row.cost
