"""When a language model is called, with which tokens, and whether the call came to its end; eager and compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.engine.tracing import is_traced, no_graph_of_its_own
from moesaic.hf.modules import is_recompute
from moesaic.trace.recording.forwards import read_arguments
from moesaic.trace.recording.telling import LOCK, forget_copied, reported, telling

KEY = "_moesaic_model_key"  # on a watched model: its number, as a tensor
IDLE, CACHED = 1, 2  # the flag of a call in a graph, added up: it does not train; it goes on from a cache
# Graphs are guarded by the numbers of hooks that are called after errors too. Theirs is new for each hook, ours is not,
# so that the graph of an earlier recording fits again.
HOOK = -20117


class Listener(Protocol):
    """Who is told of calls."""

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None: ...

    def close(self, output: Any, *, failed: bool) -> None: ...

    def opened_in_graph(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, flag: int) -> None: ...


_listeners: dict[nn.Module, tuple[Listener, ...]] = {}  # tuples are replaced, not changed: other threads read them


@contextmanager
def listening(
    model: nn.Module, listener: Listener, begun_in_graph: Callable[..., None] | None = None
) -> Iterator[None]:
    """Inside the block `listener` hears of every call of `model`; in a compiled graph only of its begin.

    begun_in_graph: who hears of that, instead of the listener's own `opened_in_graph`.
    """
    with LOCK:
        _replace(model, lambda heard: (*heard, listener))
    try:
        with telling(model, begun_in_graph or listener.opened_in_graph, KEY):
            yield
    finally:
        with LOCK:
            _replace(model, lambda heard: tuple(one for one in heard if one is not listener))


def _replace(model: nn.Module, change: Callable[[tuple[Listener, ...]], tuple[Listener, ...]]) -> None:
    """Give `model` other listeners, and hooks while it has any."""
    while True:
        before = _listeners.get(model, ())
        after = change(before)
        if after and not before:
            _hook(model)
        if _listeners.get(model, ()) is before:  # else garbage collection has taken one off in between: once more
            break
    if after:
        _listeners[model] = after
    else:
        del _listeners[model]
        _unhook(model)


def _hook(model: nn.Module) -> None:
    forget_copied(model, _before, mark_end, _after)
    before = model.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
    mark = model.register_forward_hook(mark_end)
    after = model.register_forward_hook(_after, always_call=True)
    model._forward_hooks[HOOK] = model._forward_hooks.pop(after.id)
    model._forward_hooks_always_called[HOOK] = model._forward_hooks_always_called.pop(after.id)
    model.__dict__["_moesaic_hooks"] = (before, mark)


def _unhook(model: nn.Module) -> None:
    model._forward_hooks.pop(HOOK)
    model._forward_hooks_always_called.pop(HOOK)
    for hook in model.__dict__.pop("_moesaic_hooks"):
        hook.remove()
    for call in list(_opened):
        if call[1] is model:
            _opened.pop(call, None)


def _before(model: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    if kwargs is None:  # torch leaves them out where another thread takes the hook off just now
        return None
    if is_traced():
        return _begun_in_graph(model, args, kwargs)
    call = threading.get_ident(), model
    _ended.discard(call)  # of a call that another thread began to watch in its midst
    _opened[call] = _opened.get(call, 0) + 1
    if not is_recompute():
        for listener in _listeners.get(model, ()):
            listener.open(model, args, kwargs)
    return None


# thread and module, and how many calls of it go on whose begin was heard outside of a graph: dynamo makes graphs of the
# hook before a call, and of so many calls only
_opened: dict[tuple[int, nn.Module], int] = {}
# thread and module of calls that came to their end and whose next hook does not know it yet
_ended: set[tuple[int, nn.Module]] = set()


@no_graph_of_its_own
def mark_end(module: nn.Module, _args: tuple, _output: Any) -> None:
    """A forward hook for just before one with always_call=True, which may then ask `came_to_end`.

    torch hands that one None after an error, and None is also what a forward may return.
    """
    if not is_traced():
        _ended.add((threading.get_ident(), module))


def came_to_end(module: nn.Module) -> bool:
    """Whether the call after which a hook with always_call=True runs ended without an error. Ask once a call."""
    call = threading.get_ident(), module
    ended = call in _ended
    _ended.discard(call)
    return ended


@no_graph_of_its_own
def _after(model: nn.Module, _args: tuple, output: Any) -> None:
    if is_traced():
        return
    call = threading.get_ident(), model
    failed, opened = not came_to_end(model), _opened.pop(call, 0)
    if opened > 1:
        _opened[call] = opened - 1
    if opened and not is_recompute():
        for listener in _listeners.get(model, ()):
            listener.close(output, failed=failed)


def _begun_in_graph(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Put the report of a call into the graph: the tokens that go on are the copy that it makes."""
    found = read_arguments(model, args, kwargs)
    key = getattr(model, KEY, None)
    if key is None or found is None:
        return None
    tokens, mask, cache, positions = found
    flag = 0 if model.training and torch.is_grad_enabled() else IDLE  # a graph is guarded by both
    if cache is not None and mask is not None and mask.shape[1] > tokens.shape[1]:
        flag += CACHED
    copy = reported(key, tokens, mask, positions, flag)
    return (
        tuple(copy if value is tokens else value for value in args),
        {name: copy if value is tokens else value for name, value in kwargs.items()},
    )
