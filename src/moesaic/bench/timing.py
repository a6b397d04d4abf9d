"""Rounds of all contenders in turn, and what is said about the seconds they took."""

import gc
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

FEW = 3  # rounds of those that are far behind, and the least anybody gets
FAR_BEHIND = 3.0  # times the fastest
MANY = 5  # times the wanted rounds, where that costs little
LITTLE = 3.0  # seconds
CELL_SECONDS = 60.0  # for the rounds of those that are not far behind


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


def interleave(
    entrants: Sequence[Entrant], rounds: Mapping[str, int], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run, each round in an order of its own (the same every time): whatever disturbs the machine, and
    whatever the one before leaves in the cache, falls on all of them."""
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    order = random.Random(0)
    with without_collections():
        for number in range(max(rounds.values())):
            for entrant in order.sample(entrants, len(entrants)):
                if number >= rounds[entrant.name]:
                    continue
                entrant.prepare()
                start = clock()
                result = entrant.run()
                seconds[entrant.name].append(clock() - start)
                del result
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
