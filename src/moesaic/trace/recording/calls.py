"""When a language model is called, with which tokens, and whether the call came to its end; eager and compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.hf.modules import is_recompute
from moesaic.trace.recording.forwards import read_arguments
from moesaic.trace.recording.watch import reported, telling

KEY = "_moesaic_model_key"  # on a watched model: its number, as a tensor
# Graphs are guarded by the numbers of hooks that are called after errors too. Theirs is new for each hook, ours is not,
# so that the graph of an earlier recording fits again.
HOOK = -20117


class Listener(Protocol):
    """Who is told of calls."""

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None: ...

    def close(self, output: Any, *, failed: bool) -> None: ...

    def opened_in_graph(self, tokens: Tensor, mask: Tensor | None, unused: None, cached: bool) -> None: ...


_listeners: dict[nn.Module, list[Listener]] = {}


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Inside the block `listener` hears of every call of `model`; in a compiled graph only of its begin."""
    here = _listeners.setdefault(model, [])
    if not here:
        before = model.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)
        mark = model.register_forward_hook(mark_end)
        after = model.register_forward_hook(_after, always_call=True)
        model._forward_hooks[HOOK] = model._forward_hooks.pop(after.id)
        model._forward_hooks_always_called[HOOK] = model._forward_hooks_always_called.pop(after.id)
        model.__dict__["_moesaic_hooks"] = (before, mark)
    here.append(listener)
    try:
        with telling(model, listener.opened_in_graph, KEY):
            yield
    finally:
        here.remove(listener)
        if not here:
            del _listeners[model]
            model._forward_hooks.pop(HOOK)
            model._forward_hooks_always_called.pop(HOOK)
            for hook in model.__dict__.pop("_moesaic_hooks"):
                hook.remove()


def _before(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if torch.compiler.is_compiling():
        return _begun_in_graph(model, args, kwargs)
    if not is_recompute():
        for listener in tuple(_listeners.get(model, ())):
            listener.open(model, args, kwargs)
    return None


_ended: set[nn.Module] = set()  # modules whose call came to its end and whose next hook does not know it yet


def mark_end(module: nn.Module, _args: tuple, _output: Any) -> None:
    """A forward hook for just before one with always_call=True, which may then ask `came_to_end`.

    torch hands that one None after an error, and None is also what a forward may return.
    """
    if not torch.compiler.is_compiling():
        _ended.add(module)


def came_to_end(module: nn.Module) -> bool:
    """Whether the call after which a hook with always_call=True runs ended without an error. Ask once a call."""
    ended = module in _ended
    _ended.discard(module)
    return ended


def _after(model: nn.Module, _args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    failed = not came_to_end(model)
    if not is_recompute():
        for listener in tuple(_listeners.get(model, ())):
            listener.close(output, failed=failed)


def _begun_in_graph(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Put the report of a call into the graph: the tokens that go on are the copy that it makes."""
    found = read_arguments(model, args, kwargs)
    if KEY not in model.__dict__ or found is None:
        return None
    tokens, mask, cache = found
    cached = cache is not None and mask is not None and mask.shape[1] > tokens.shape[1]
    copy = reported(model.__dict__[KEY], tokens, mask, None, cached)
    return (
        tuple(copy if value is tokens else value for value in args),
        {name: copy if value is tokens else value for name, value in kwargs.items()},
    )
