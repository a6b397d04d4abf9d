"""The forwards that run, one in a thread, and what their layers have given until now."""

import threading
from typing import Any

LOOPED = (
    "layer {name!r} runs several times in one call of the model, on as many tokens: a record has no place for passes "
    "of a looped model; where a wrapper calls its model more than once, record the model inside"
)


class Running:
    """What runs in one thread."""

    def __init__(self) -> None:
        self.forward: Any = None  # what the watcher knows of the call
        self.depth = 0  # calls of models, inside each other
        self.pending: list[Any] = []  # what its layers have given
        self.silent = False  # it began in a graph, and no layer has said whom it chose
        self.unheard = 0  # forwards that stayed so to their end
        self.ran: set[str] = set()  # layers, in the call that runs

    def again(self, layer: str) -> bool:
        """Whether the layer ran already in this call, as in models that pass through their layers several times."""
        ran = layer in self.ran
        self.ran.add(layer)
        return ran

    def name_cache(self, cache: object) -> None:
        """Whose cache this is: a model that is called without one makes it."""
        before = self.forward
        if cache is not None and before is not None and not before.cache:
            after = before._replace(cache=id(cache))
            self.pending = [r._replace(forward=after) if r.forward is before else r for r in self.pending]


class Threads:
    """`here` is what runs in the calling thread; `home` is the thread in which watching began."""

    def __init__(self) -> None:
        self.home = threading.get_ident()
        self._running: dict[int, Running] = {}

    @property
    def here(self) -> Running:
        return self._running.setdefault(threading.get_ident(), Running())

    @property
    def at_home(self) -> bool:
        return threading.get_ident() == self.home

    def all(self) -> tuple[Running, ...]:
        return tuple(self._running.values())

    def ended(self) -> list[Running]:
        """Of all threads, those in which no call of a model is known to run."""
        return [running for running in self.all() if not running.depth]

    @property
    def unheard(self) -> int:
        """Compiled calls in which no layer said anything."""
        return sum(running.unheard for running in self.all())
