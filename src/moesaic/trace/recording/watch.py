"""Watching the modules of a model from outside: who is told what they were called with, eager and compiled.

Experts on transformers' interface are watched where it looks up their implementation: each entry of that table calls
what it called before and reports on the way. The implementation's name stays, so `generate()` may switch it; a graph
compiled before is guarded by that entry, so it is compiled once more with the reporting operator in it, and found again
when the watching ends. Our own experts ask for a watcher themselves. Routers, experts of other makes, and those spread
over ranks get hooks.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesaic.hf.experts import is_on_seam
from moesaic.hf.outputs import picks_of, read_router
from moesaic.hf.spread import is_spread
from moesaic.layer.experts import Experts
from moesaic.trace.recording.telling import KEY, LOCK, forget_copied, reported, telling
from moesaic.types import Routing

Observer = Callable[[str, Routing], None]
DETAILS = ("ids", "picks", "scores")  # what an operator in a graph is given; a graph of its own for each
CALLED = "_moesaic_call_key"  # as KEY, on experts that are watched where they are called, not in their table

NARROW = (
    "the weights of a compiled model in half precision are being recorded: its own results may differ in the last bits "
    "from those of the same model unrecorded; detail='ids' changes none"
)


@contextmanager
def observe(
    modules: Mapping[str, nn.Module], observer: Observer, detail: str = "picks", *, routers: bool = False
) -> Iterator[None]:
    """Hand every call of the watched modules to `observer`; the modules' own results are untouched.

    Experts are reported before their call, with the ids and weights they were given and logits None: that is what the
    model really used. `routers` are reported after theirs, with logits. Recomputation under activation
    checkpointing is not reported again. Tensors are the live ones: copy what you keep. detail="ids" leaves weights out
    of compiled graphs.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if routers:
                stack.enter_context(telling(module, _router_reporter(name, observer)))
                stack.enter_context(_hooked(module, lambda m: m.register_forward_hook(_after_router)))
            elif isinstance(module, Experts) or _is_on_table(module):
                stack.enter_context(telling(module, _experts_reporter(name, observer)))
                stack.enter_context(_asked(module, detail))
            else:
                stack.enter_context(telling(module, _experts_reporter(name, observer), CALLED))
                stack.enter_context(_hooked(module, _hook_experts))
        yield


def _is_on_table(module: nn.Module) -> bool:
    """Experts that are spread over ranks look their implementation up there too, with ids of this rank alone."""
    return is_on_seam(module) and not is_spread(module) and table_of(module) is not None


def _experts_reporter(name: str, observer: Observer) -> Callable[..., None]:
    def told(ids: Tensor, weights: Tensor | None, _second: None, in_narrow_graph: int) -> None:
        if in_narrow_graph:
            warnings.warn(NARROW, stacklevel=2)  # shown once, as Python's filter has it
        observer(name, picks_of(ids, weights))

    return told


def _router_reporter(name: str, observer: Observer) -> Callable[..., None]:
    def told(ids: Tensor, weights: Tensor | None, logits: Tensor | None, _flag: int) -> None:
        logits = None if logits is None else logits.flatten(0, -2)
        observer(name, Routing(logits, *picks_of(ids, weights)[1:]))

    return told


# What stands in the way of a call. All of it may be traced into a graph, which has to be made anew when a module begins
# to be watched: dynamo guards what getattr finds, or does not, and nothing that is looked up in __dict__.


@lru_cache(maxsize=256)
def _watched(original: Callable[..., Tensor] | None, detail: str) -> Callable[..., Tensor]:
    """`original`, an experts implementation or None for the module's own, that reports what it is given.

    The same function for the same arguments, so that a graph compiled under an earlier watch is found again.
    """
    ours = getattr(original, "__module__", "").startswith("moesaic.")  # one operator, which inductor does not look into

    def experts(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if (key := getattr(self, KEY, None)) is not None:
            tokens, ids, weights = args if len(args) == 3 else bound(self, args, kwargs)
            told = None if detail == "ids" else weights
            ids = reported(key, ids, told, flag=int(told is not None and not ours and tokens.itemsize < 4))
            args, kwargs = (tokens, ids, weights), {}
        compute = type(self).forward.__wrapped__ if original is None else original
        return compute(self, *args, **kwargs)

    return experts


def _own_ids(module: nn.Module, ids: Tensor, _weights: Tensor) -> Tensor:
    return reported(getattr(module, KEY, None), ids)


def _own_picks(module: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    return reported(getattr(module, KEY, None), ids, weights)


# another function than for picks, so another graph, with the router's hook
def _own_scores(module: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    return reported(getattr(module, KEY, None), ids, weights)


OWN = dict(zip(DETAILS, (_own_ids, _own_picks, _own_scores), strict=True))  # what our own experts call


def _before_experts(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    key = getattr(module, CALLED, None)
    if key is None or kwargs is None:  # torch leaves out kwargs where another thread takes the hook off just now
        return None
    tokens, ids, weights, *rest = args if len(args) >= 3 else bound(module, args, kwargs)
    used = reported(key, ids, weights, flag=int(tokens.itemsize < 4))
    return None if used is ids else ((tokens, used, weights, *rest), {})


def _after_router(module: nn.Module, _args: Any, output: Any) -> Any:
    if (key := getattr(module, KEY, None)) is None:
        return None
    found = read_router(module, output)
    used = reported(key, found.ids, found.weights, found.logits)
    if used is found.ids or found.place is None:
        return None
    return found.put(output, ids=used)


_hooks: dict[nn.Module, tuple[int, RemovableHandle]] = {}  # module -> how many watch it, and the one hook


@contextmanager
def _hooked(module: nn.Module, register: Callable[[nn.Module], RemovableHandle]) -> Iterator[None]:
    """Inside the block the module has a hook of ours: one, since each call is told to everybody who watches."""
    with LOCK:
        if module not in _hooks:
            forget_copied(module, _before_experts, _after_router)
        count, hook = _hooks.get(module) or (0, register(module))
        _hooks[module] = count + 1, hook
    try:
        yield
    finally:
        with LOCK:
            count, hook = _hooks.pop(module)
            if count > 1:
                _hooks[module] = count - 1, hook
            else:
                hook.remove()


def _hook_experts(module: nn.Module) -> RemovableHandle:
    return module.register_forward_pre_hook(_before_experts, with_kwargs=True)


def bound(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """The arguments of an experts call in their order, however they were given."""
    return inspect.signature(module.forward).bind(*args, **kwargs).args


class _Table:
    """One table of experts implementations of transformers, with our entries in it while somebody watches."""

    def __init__(self, table: MutableMapping[str | None, Any]) -> None:
        self.table = table
        self.details: list[str] = []
        self._ours: dict[str | None, tuple[Any, Any]] = {}  # name -> (what was there, what is there now)

    def add(self, detail: str) -> None:
        self.details.append(detail)
        self._refresh()

    def remove(self, detail: str) -> None:
        self.details.remove(detail)
        self._refresh()

    def _refresh(self) -> None:
        detail = max(self.details, key=DETAILS.index, default=None)
        for name in {*self.table, *self._ours, "eager", None}:  # the last two mean the module's own
            here = self.table.get(name)
            before, ours = self._ours.pop(name, (here, None))
            if here is not ours and ours is not None:  # somebody put another one there meanwhile: theirs stays
                before = here
            elif ours is not None:
                del self.table[name]
                if before is not None and self.table.get(name) is not before:
                    self.table[name] = before
            if detail is not None:
                self.table[name] = ours = _watched(before, detail)
                self._ours[name] = (before, ours)


_tables: dict[int, _Table] = {}
_wanted: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()  # details that our own experts are asked for


def table_of(module: nn.Module) -> MutableMapping[str | None, Any] | None:
    """The table in which this class of experts looks up its implementation."""
    forward = type(module).forward
    if not inspect.isfunction(forward):
        return None
    table = inspect.getclosurevars(forward).nonlocals.get("experts_interface")
    return table if isinstance(table, MutableMapping) else None


@contextmanager
def _asked(module: nn.Module, detail: str) -> Iterator[None]:
    """Inside the block the experts `module` reports."""
    if isinstance(module, Experts):
        with LOCK:
            wanted = _wanted.setdefault(module, [])
            wanted.append(detail)
            module.watcher = OWN[max(wanted, key=DETAILS.index)]
        try:
            yield
        finally:
            with LOCK:
                wanted.remove(detail)
                module.watcher = OWN[max(wanted, key=DETAILS.index)] if wanted else None
        return
    found = table_of(module)
    assert found is not None
    with LOCK:
        table = _tables.setdefault(id(found), _Table(found))
        table.add(detail)
    try:
        yield
    finally:
        with LOCK:
            table.remove(detail)
