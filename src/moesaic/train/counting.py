"""What a model hands to its experts, counted while it trains or is judged."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moesaic.hf.modules import MoELayer, moe_layers
from moesaic.layer.balance import expert_load
from moesaic.trace.recording.calls import listening
from moesaic.trace.recording.forwards import models_in, read_arguments
from moesaic.trace.recording.watch import observe
from moesaic.types import Routing

Loads = dict[str, Float[Tensor, " E"]]  # by the layer's name, float64 counts


class LoadCounter:
    """Adds up the load of every layer from the ids that its experts receive; never re-derives a selection.

    `training` says which forwards count: those of a model in training mode with gradients on, or those in evaluation
    mode. Tokens with 0 in a 2-D `attention_mask` that the model was called with are padding and are left out. A
    recomputation of activation checkpointing does not count again, a forward that failed not at all. Nothing waits for
    the device before `take`. The model may be compiled, before or after.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], *, training: bool) -> None:
        self.training = training
        self.layers = {layer.name: layer for layer in layers}
        self.chosen: dict[str, int] = {}  # by layer, how many experts a token was given; configs do not always say
        self._sum: Loads = {}
        self._running = 0  # calls of models, inside each other
        self._current: Forward | None = None
        self._pending: list[tuple[str, Tensor]] = []  # loads of the forward that runs
        self._hooks = ExitStack()
        seen_at = {
            layer.name: layer.experts if layer.origin == "experts" and layer.experts is not None else layer.router
            for layer in layers
        }
        watched = {name: module for name, module in seen_at.items() if module is not None}
        self._hooks.enter_context(observe(watched, self._count, "ids"))
        for part in models_in(model):
            self._hooks.enter_context(listening(part, self))

    def take(self, group: Any = None) -> Loads:
        """The load since the last take, by layer, over the ranks of `group` (all) where torch.distributed runs.

        Starts again from zero. Every rank has to call it: it is one all-reduce, of all layers together.
        """
        self._settle()
        loads = {name: self._sum.pop(name, None) for name in self.layers}
        device = next((load.device for load in loads.values() if load is not None), _device_of(self.layers.values()))
        sizes = [layer.config.n_routed_experts for layer in self.layers.values()]
        flat = torch.cat(
            [
                torch.zeros(n, device=device, dtype=torch.float64) if load is None else load.to(device)
                for n, load in zip(sizes, loads.values(), strict=True)
            ]
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        return dict(zip(loads, flat.split(sizes), strict=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    # calls of the model

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of the model begins."""
        if not self._running:
            self._settle()
            counts = model.training == self.training and (torch.is_grad_enabled() or not self.training)
            found = read_arguments(model, args, kwargs)
            self._current = Forward(counts, None if found is None else token_mask(found.tokens, found.mask))
        self._running += 1

    def close(self, output: Any, *, failed: bool) -> None:
        """It is over, by an error if `failed`."""
        del output
        if not self._running:  # it began before anybody counted
            return
        self._running -= 1
        if failed:
            self._pending.clear()
        if not self._running:
            self._settle()
            self._current = None

    def opened_in_graph(self, tokens: Tensor, mask: Tensor | None, unused: None, cached: bool) -> None:
        """A call begins whose end nobody will tell. Its layers say whether they train."""
        del unused, cached
        if not self._running:
            self._settle()
            self._current = Forward(None, token_mask(tokens, mask))

    def _count(self, name: str, routing: Routing) -> None:
        layer, forward = self.layers[name], self._current or Forward()
        if not (self._trains(layer) if forward.counts is None else forward.counts):
            return
        ids, n_experts = routing.expert_ids.detach(), layer.config.n_routed_experts
        if forward.mask is not None and len(forward.mask) == len(ids):  # else padding was cut out, or a part ran alone
            ids = ids.masked_fill(~forward.mask.to(ids.device).unsqueeze(-1), n_experts)
        self.chosen[name] = ids.shape[-1]
        self._pending.append((name, expert_load(ids, n_experts)))

    def _trains(self, layer: MoELayer) -> bool:
        module = layer.router if layer.experts is None else layer.experts
        return module is not None and module.training == self.training

    def _settle(self) -> None:
        """Add what is pending: its forward came to an end."""
        for name, load in self._pending:
            self._sum[name] = self._sum[name] + load if name in self._sum else load.double()
        self._pending.clear()


class Forward(NamedTuple):
    """One call of a model. counts: whether its tokens do, None where the layers say. mask: [T], False is padding."""

    counts: bool | None = None
    mask: Bool[Tensor, " T"] | None = None


def token_mask(tokens: Tensor, mask: Tensor | None) -> Bool[Tensor, " T"] | None:
    """A 2-D attention mask as one flag a token of this call; None where it does not fit, so that all are tokens.

    With a cache it covers the past too, of which no token is here.
    """
    shape = tokens.shape[:2]
    if mask is None or len(mask) != shape[0] or mask.shape[1] < shape[1]:
        return None
    return mask[:, mask.shape[1] - shape[1] :].detach().bool().flatten()


def _device_of(layers: Iterable[MoELayer]) -> torch.device:
    """Where the first of the layers has its weights."""
    for layer in layers:
        for module in (layer.router, layer.experts):
            for tensor in () if module is None else module.parameters():
                return tensor.device
    return torch.device("cpu")


@contextmanager
def counting_loads(model: nn.Module, *, training: bool) -> Generator[LoadCounter]:
    """Count inside a with-block; the hooks are gone after it, also after an error."""
    counter = LoadCounter(model, moe_layers(model), training=training)
    try:
        yield counter
    finally:
        counter.remove()
