"""What a Hugging Face MoE model hands to its experts, counted while it trains or is judged."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.hf.modules import routed_blocks
from moesaic.layer.balance import expert_load
from moesaic.trace.recording.record import Forward, describe_forward, observe
from moesaic.types import Routing


class Balanced(NamedTuple):
    """One MoE layer whose selection a bias steers: its router and the module that receives the selected ids."""

    router: nn.Module
    experts: nn.Module

    @property
    def bias(self) -> Float[Tensor, " E"]:
        """The router's own buffer."""
        return self.router.get_buffer("e_score_correction_bias")


def balanced_layers(model: nn.Module) -> dict[str, Balanced]:
    """Every MoE layer with a buffer `e_score_correction_bias` in its router, by module name, in the model's order.

    Raises ValueError if there is none: the model then balances in another way or not at all.
    """
    layers = {
        name: Balanced(router, experts)
        for name, router, experts in routed_blocks(model)
        if "e_score_correction_bias" in dict(router.named_buffers(recurse=False))
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no router with a buffer e_score_correction_bias: bias balancing needs a "
            "DeepSeek-V3-style model; for others use a balancing loss"
        )
    return layers


class LoadCounter:
    """Adds up the load of every layer from the ids that the experts modules receive; never re-derives a selection.

    `training` says which forwards count: those of modules in training mode, or those in evaluation mode. Tokens with
    0 in a 2-D `attention_mask` that the model was called with are padding and are left out; the recomputation of
    activation checkpointing does not count again.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Balanced], *, training: bool) -> None:
        self.training = training
        self.layers = layers
        self.load = {name: torch.zeros_like(layer.bias, dtype=torch.float32) for name, layer in layers.items()}
        self._model = model
        self._forward: Forward | None = None
        self._hooks = ExitStack()
        self._hooks.callback(model.register_forward_pre_hook(self._open, with_kwargs=True).remove)
        self._hooks.enter_context(observe({name: layer.experts for name, layer in layers.items()}, self._count))

    def take(self) -> dict[str, Float[Tensor, " E"]]:
        """The load since the last take, by layer, over all ranks if torch.distributed runs; starts again from zero."""
        load = {name: count.clone() for name, count in self.load.items()}
        for count in self.load.values():
            count.zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for count in load.values():
                torch.distributed.all_reduce(count)
        return load

    def remove(self) -> None:
        self._hooks.close()

    def _open(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._forward = describe_forward(self._model, args, kwargs)

    def _count(self, name: str, routing: Routing) -> None:
        if self.layers[name].experts.training != self.training:
            return
        ids, forward = routing.expert_ids.detach(), self._forward
        if forward is not None and len(forward.rows) == len(ids):
            ids = forward.kept(ids)
        load = self.load[name]
        load += expert_load(ids, len(load)).to(load.device)


@contextmanager
def counting_loads(model: nn.Module, *, training: bool) -> Generator[LoadCounter]:
    """Count inside a with-block; the hooks are gone after it, also after an error."""
    counter = LoadCounter(model, balanced_layers(model), training=training)
    try:
        yield counter
    finally:
        counter.remove()
