"""Who may be timed: everybody's result against float64, ours also on memory that holds NaN."""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.bench.contenders import Call, Contender
from moesaic.bench.gate import Truth, errors_of, is_right
from moesaic.bench.gpu.cells import TORCH
from moesaic.bench.gpu.truth import BOUNDS, relative_error
from moesaic.bench.problem import Problem
from moesaic.bench.runner import Row, failed, forget_gradients, run_once
from moesaic.bench.timing import Clock


class DeviceLost(Exception):
    """The device refuses everything after an illegal access: this process is over, the journal is not. rows: what the
    cell had by then."""

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Judged(NamedTuple):
    """call: None where the contender is wrong, failed, or was refused.  seconds: of one run."""

    row: Row
    call: Call | None
    seconds: float


def judge(problem: Problem, truth: Truth, contenders: Sequence[Contender], clock: Clock) -> list[Judged]:
    """Everybody's errors; torch's own grouped_mm first, whose errors are the measure of the others'."""
    judged: dict[str, Judged] = {}
    torch_errors: dict[str, float] = {}
    for contender in sorted(contenders, key=lambda c: TORCH.index(c.name) if c.name in TORCH else len(TORCH)):
        row = Row(contender.name, contender.kind)
        judged[contender.name] = Judged(row, None, math.nan)
        row.note = contender.refuses(problem.cell) or ""
        if row.note:
            continue
        try:
            call, seconds = _try(problem, truth, contender, row, clock)
        except Exception as error:  # anybody's: the others are still to be measured
            row.note = failed(error)
            problem.forget_gradients(weights_too=True)
            check_device(clock, row.name, [entry.row for entry in judged.values()])
            continue
        if not is_right(row.errors, torch_errors, BOUNDS[problem.cell.dtype]):
            row.note = "wrong"
            continue
        torch_errors = torch_errors or (row.errors if contender.name in TORCH else {})
        judged[contender.name] = Judged(row, call, seconds)
    return [judged[contender.name] for contender in contenders]


def check_device(clock: Clock, who: str = "", rows: Sequence[Row] = ()) -> None:
    """Give back what a failure held. Raises DeviceLost, with the name of `who` ran last, where nothing will run any
    more."""
    try:
        clock.wait()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise DeviceLost(f"{who}: {first}" if who else first, rows) from None
    if clock.is_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def checked_replay(calls: Sequence[Callable[[], object]], clock: Clock) -> Callable[[], object]:
    """Their replay; ValueError where its results are not, bit for bit, those of the calls one by one."""
    replay = clock.replay(calls)
    try:
        torch.testing.assert_close(replay(), [call() for call in calls], rtol=0, atol=0)
    except AssertionError:
        raise ValueError("replayed, it gives other numbers") from None
    return replay


def _try(problem: Problem, truth: Truth, contender: Contender, row: Row, clock: Clock) -> tuple[Call, float]:
    """Build, run (the first time compiles), ours once more on poisoned memory, then compare."""
    passes = 2 if problem.cell.accumulates else 1

    def run() -> Tensor:
        """The last of `passes` runs, gradients added up."""
        for _ in range(passes - 1):
            run_once(problem, call)
            forget_gradients(problem, call, weights_too=False)
        return run_once(problem, call)

    start = time.perf_counter()
    call = contender.build(problem)
    forget_gradients(problem, call, weights_too=True)
    run_once(problem, call)
    clock.wait()
    row.build_ms = 1e3 * (time.perf_counter() - start)
    forget_gradients(problem, call, weights_too=True)
    if contender.kind != "peer":
        with poisoned():
            out = run()
        grads_of = problem.expert_grads
        errors = errors_of(problem, truth, out, passes=passes, grads_of=grads_of, distance=relative_error)
        if any(math.isnan(error) for error in errors.values()):
            raise ValueError("an element of the result is never written")
        forget_gradients(problem, call, weights_too=True)
    start = time.perf_counter()
    out = run()
    clock.wait()
    seconds = (time.perf_counter() - start) / passes
    grads_of = getattr(call, "expert_grads", problem.expert_grads)
    row.errors = errors_of(problem, truth, out, passes=passes, grads_of=grads_of, distance=relative_error)
    forget_gradients(problem, call, weights_too=True)
    return call, seconds


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that an element that nobody writes is not right by chance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form, which is not what is asked
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
