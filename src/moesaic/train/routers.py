"""What a Hugging Face MoE model hands to its experts, counted while it trains or is judged."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.layer.balance import expert_load


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
    layers = {}
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        for router in block.children():
            if "e_score_correction_bias" in dict(router.named_buffers(recurse=False)):
                layers[name] = Balanced(router, experts)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no router with a buffer e_score_correction_bias: bias balancing needs a "
            "DeepSeek-V3-style model; for others use a balancing loss"
        )
    return layers


def in_recompute() -> bool:
    """True while activation checkpointing repeats a forward inside the backward pass: its tokens were counted before.

    torch has no public name for this; -1 means that no backward is running in this thread.
    """
    return torch._C._current_graph_task_id() != -1


class LoadCounter:
    """Adds up the load of every layer from the ids that the experts modules receive; never re-derives a selection.

    `training` says which forwards count: those of modules in training mode, or those in evaluation mode. Tokens with
    0 in a 2-D `attention_mask` that the model was called with are padding and are left out.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Balanced], *, training: bool) -> None:
        self.training = training
        self.load = {name: torch.zeros_like(layer.bias, dtype=torch.float32) for name, layer in layers.items()}
        self._real: Tensor | None = None
        self._handles = [model.register_forward_pre_hook(self._remember_mask, with_kwargs=True)]
        for name, layer in layers.items():
            hook = self._counting(name)
            self._handles.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))

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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _remember_mask(self, _model: nn.Module, _args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        self._real = mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _counting(self, name: str):
        def count(experts: nn.Module, args: tuple, kwargs: dict) -> None:
            if experts.training != self.training or in_recompute():
                return
            ids = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach()
            # In decoding with a cache the mask is longer than the tokens: then all tokens are real ones.
            if self._real is not None and len(self._real) == len(ids):
                ids = ids[self._real]
            load = self.load[name]
            self.load[name] = load + expert_load(ids, len(load)).to(load.device)

        return count


@contextmanager
def counting_loads(model: nn.Module, *, training: bool) -> Generator[LoadCounter]:
    """Count inside a with-block; the hooks are gone after it, also after an error."""
    counter = LoadCounter(model, balanced_layers(model), training=training)
    try:
        yield counter
    finally:
        counter.remove()
