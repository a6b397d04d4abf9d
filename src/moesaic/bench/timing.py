"""Rounds of all contenders in turn, and what is said about the seconds they took."""

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

FEW = 3  # rounds of those that are far behind, and the least anybody gets
FAR_BEHIND = 3.0  # times the fastest
MANY = 5  # times the wanted rounds, where that costs little
LITTLE = 3.0  # seconds
CELL_SECONDS = 60.0  # for the rounds of those that are not far behind

Seconds = Callable[[], float]  # waits for the run that it belongs to


class Entrant(NamedTuple):
    """`prepare` runs before the clock starts, and what `run` returns is freed after it stops."""

    name: str
    prepare: Callable[[], object]
    run: Callable[[], object]


class Spread(NamedTuple):
    """Seconds: median, 10th and 90th percentile, and of how many rounds."""

    median: float
    p10: float
    p90: float
    rounds: int


def plan_rounds(
    seconds: Mapping[str, float], wanted: int, *, never_few: Collection[str] = (), allowed: float = CELL_SECONDS
) -> dict[str, int]:
    """Rounds for each, by how long one took: more than wanted where that costs little; in a long cell few for those far
    behind, unless named in `never_few`, and where that is not enough fewer for all. None at all for one far behind
    whose single run outlasts the cell: the run that it was judged by has to do."""
    a_round = sum(seconds.values())
    if wanted * a_round <= allowed:
        return dict.fromkeys(seconds, max(wanted, min(MANY * wanted, int(LITTLE / a_round))))
    fastest = min(seconds.values())
    slow = {name for name, took in seconds.items() if took > FAR_BEHIND * fastest and name not in never_few}
    rounds = min(wanted, max(FEW, int(allowed / sum(took for name, took in seconds.items() if name not in slow))))
    few = {name: min(FEW, wanted) if took <= allowed else 0 for name, took in seconds.items()}
    return {name: few[name] if name in slow else rounds for name in seconds}


class Clock:
    """`now` in seconds, the wall clock unless given: what it times is over when it returns."""

    device = "cpu"
    is_cuda = False

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def time(self, run: Callable[[], object]) -> Seconds:
        start = self.now()
        result = run()
        seconds = self.now() - start
        del result
        return lambda: seconds

    def flush(self) -> None:
        """Nothing of the run before stays in a cache."""

    def wait(self) -> None:
        """Until the device has done what it was given; raises what went wrong there."""

    def replay(self, calls: Sequence[Callable[[], object]]) -> Callable[[], list[object]]:
        """All calls in order, as one graph where there are graphs; gives their results."""
        return lambda: [call() for call in calls]

    def why_no_graph(self, run: Callable[[], object]) -> str:
        """Why a call cannot be put into a graph, or nothing."""
        run()
        return ""

    def peak_of(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        """(what it returns, bytes that are allocated more after it than before, and at the peak)."""
        return run(), 0, 0


WALL = Clock()


def interleave(entrants: Sequence[Entrant], rounds: Mapping[str, int], clock: Clock = WALL) -> dict[str, list[float]]:
    """Seconds of every run, each round in an order of its own (the same every time): whatever disturbs the machine, and
    whatever the one before leaves in the cache, falls on all of them. They are read at the end of the round: a run may
    still be going on when its call has returned."""
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    order = random.Random(0)
    with without_collections():
        for number in range(max(rounds.values())):
            tickets = []
            for entrant in order.sample(entrants, len(entrants)):
                if number < rounds[entrant.name]:
                    entrant.prepare()
                    clock.flush()
                    tickets.append((entrant.name, clock.time(entrant.run)))
            for name, ticket in tickets:
                seconds[name].append(ticket())
    return seconds


def spread(seconds: Sequence[float]) -> Spread:
    p10, median, p90 = np.quantile(np.asarray(seconds), (0.1, 0.5, 0.9))
    return Spread(float(median), float(p10), float(p90), len(seconds))


@contextmanager
def without_collections() -> Iterator[None]:
    """No pause of Python's garbage collector inside a timed run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
