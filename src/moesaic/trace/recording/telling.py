"""Who is told of the calls of a module, from any thread; in a compiled graph, by an operator that reports."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.engine.tracing import is_traced
from moesaic.hf.modules import is_recompute

# on a watched module: its number, as a tensor, so that one graph serves all layers alike
KEY = "_moesaic_key"
LOCK = threading.RLock()  # held while anything changes that says who watches what: records begin and end in any thread
_numbers = itertools.count()


class Told(NamedTuple):
    """Who is told of one module. key: the tensor on it; a copy of the module has a copy of it, at another place."""

    key: Tensor
    observers: tuple[Callable[..., None], ...]  # never changed but replaced: other threads read it


_told: dict[int, Told] = {}  # by the number of the module

# The copy is what the experts, or the model, then use: an operator whose result nobody uses would be removed from a
# graph. Ids have no gradient, embeddings do, and it passes through; what is only reported is detached before.
torch.library.define(
    "moesaic::watch",
    "(Tensor key, Tensor used, Tensor? first, Tensor? second, int flag) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _watch(key: Tensor, used: Tensor, first: Tensor | None, second: Tensor | None, flag: int) -> Tensor:
    tell(key, used, first, second, flag)
    return used.clone()


torch.library.impl("moesaic::watch", "CompositeExplicitAutograd")(_watch)
torch.library.register_fake("moesaic::watch")(lambda _key, used, *_: torch.empty_like(used))
torch.library.register_autograd("moesaic::watch", lambda _ctx, grad: (None, grad, None, None, None))


def tell(key: Tensor, used: Tensor, first: Tensor | None = None, second: Tensor | None = None, flag: int = 0) -> None:
    """Report one call to everybody who watches this module, unless it is the second forward of checkpointing.

    A copy of a watched module (copy.deepcopy, pickle) carries a copy of its key; nobody watches the copy.
    """
    told = _told.get(int(key))
    if told is None or told.key.data_ptr() != key.data_ptr() or is_recompute():
        return
    for observer in told.observers:
        observer(used, first, second, flag)


def reported(
    key: Tensor | None, used: Tensor, first: Tensor | None = None, second: Tensor | None = None, flag: int = 0
) -> Tensor:
    """`used` itself, reported; in a graph, which alone is told `flag`, a copy made by the operator that reports.

    key None: another thread has just ended the watching.
    """
    if key is None:
        return used
    if not is_traced():
        tell(key, used, first, second)
        return used
    # in float32 a value of its own: the one that goes on may stay fused with what follows, unrounded (bfloat16)
    first = None if first is None else first.detach().float()
    second = None if second is None else second.detach().float()
    return torch.ops.moesaic.watch(key, used, first, second, flag)


@contextmanager
def telling(module: nn.Module, observer: Callable[..., None], attribute: str = KEY) -> Iterator[None]:
    """Inside the block `observer` hears of every call of this module that is `reported`."""
    with LOCK:
        number = _number_of(module, attribute)
        told = _told[number]
        _told[number] = told._replace(observers=(*told.observers, observer))
    try:
        yield
    finally:
        with LOCK:
            told = _told[number]
            left = list(told.observers)
            left.remove(observer)
            if left:
                _told[number] = told._replace(observers=tuple(left))
            else:
                del _told[number]
                module.__dict__.pop(attribute, None)


def _number_of(module: nn.Module, attribute: str) -> int:
    """The number under which the module is watched; a new one where its key is none or a copy of another module's."""
    key = module.__dict__.get(attribute)
    if key is not None and (told := _told.get(int(key))) is not None and told.key is key:
        return int(key)
    number = next(_numbers)
    with torch.inference_mode(False):
        key = torch.tensor(number, device="cpu")
    module.__dict__[attribute] = key
    _told[number] = Told(key, ())
    return number


def forget_copied(module: nn.Module, *ours: Any) -> None:
    """Take off the hooks of ours that came with a copy of a watched module: they would report a second time."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in ours]:
            del hooks[number]
