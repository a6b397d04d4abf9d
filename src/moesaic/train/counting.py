"""What a model hands to its experts, counted while it trains or is judged."""

import threading
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moesaic.hf.modules import MoELayer, moe_layers
from moesaic.hf.spread import shared_by
from moesaic.layer.balance import expert_load
from moesaic.trace.recording.calls import IDLE, listening
from moesaic.trace.recording.forwards import bodies_in, outermost_in, parts_in, read_arguments, token_mask
from moesaic.trace.recording.running import Running, Threads
from moesaic.trace.recording.watch import observe
from moesaic.train.ranks import has_ranks
from moesaic.types import Routing

Loads = dict[str, Float[Tensor, " E"]]  # by the layer's name, float64 counts


class LoadCounter:
    """Adds up the load of every layer from the ids that its experts receive; never re-derives a selection.

    `training` says which forwards count: those of a model in training mode with gradients on, or those in evaluation
    mode. Tokens with 0 in a 2-D `attention_mask` that the model was called with are padding and are left out. A
    recomputation of activation checkpointing does not count again, a forward that failed not at all. Nothing waits for
    the device before `take`. The model may be compiled, before or after; of a compiled forward nobody hears that it
    failed. Forwards may run in several threads at once: they add up. Replicas of nn.DataParallel are warned of.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], *, training: bool) -> None:
        self.training = training
        self.layers = {layer.name: layer for layer in layers}
        self.chosen: dict[str, int] = {}  # by layer, how many experts a token was given; configs do not always say
        self.heard = False  # whether a forward of this rank counted in what `take` gave last
        self._sum: Loads = {}
        self._lock = threading.Lock()  # held while that changes
        self._threads = Threads()
        self._copies = shared_by(model)
        self._hooks = ExitStack()
        experts = {x.name: x.experts for x in layers if x.origin == "experts" and x.experts is not None}
        routers = {x.name: x.router for x in layers if x.name not in experts and x.router is not None}
        self._hooks.enter_context(observe(experts, self._count, "ids"))
        self._hooks.enter_context(observe(routers, self._count, "ids", routers=True))
        self._parts = parts_in(model, layers)
        for outer in outermost_in(model):
            self._hooks.enter_context(listening(outer, self))
        for part in self._parts:
            self._hooks.enter_context(listening(part, self, partial(self.opened_in_graph, part=True)))
        for body in bodies_in(model, [*experts.values(), *routers.values()]):
            self._hooks.enter_context(listening(body, self, partial(self.opened_in_graph, nested=True)))

    def take(self, group: Any = None) -> Loads:
        """The load since the last take, by layer, over the ranks of `group` (all) where torch.distributed runs.

        Starts again from zero. Every rank has to call it: it is one all-reduce, of all layers together. A batch that
        ranks of tensor parallelism share counts once, unless a `group` says who shares none.
        """
        for running in self._threads.ended():
            self._settle(running)
        with self._lock:
            loads = {name: self._sum.pop(name, None) for name in self.layers}
        self.heard = any(load is not None for load in loads.values())
        device = self._device(loads, group)
        sizes = [layer.config.n_routed_experts for layer in self.layers.values()]
        flat = torch.cat(
            [
                torch.zeros(n, device=device, dtype=torch.float64) if load is None else load.to(device)
                for n, load in zip(sizes, loads.values(), strict=True)
            ]
        )
        if has_ranks():
            torch.distributed.all_reduce(flat, group=group)
            flat /= self._copies if group is None else 1
        return dict(zip(loads, flat.split(sizes), strict=True))

    def _device(self, loads: dict[str, Tensor | None], group: Any) -> torch.device:
        """Where loads are added up. With ranks it must not depend on what one of them heard: with a backend for each
        kind of device two kinds are two collectives, and each waits for the other."""
        weights = _device_of(self.layers.values())
        if not has_ranks():
            return next((load.device for load in loads.values() if load is not None), weights)
        kinds = [pair.split(":")[0] for pair in torch.distributed.get_backend_config(group).split(",")]
        return weights if weights.type in kinds else torch.device(kinds[0])  # offloaded weights, and NCCL alone

    def forget(self) -> None:
        """Drop what was counted on this rank since the last take."""
        with self._lock:
            self._sum.clear()
            for running in self._threads.all():
                running.pending.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    # calls of the model

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of the model begins."""
        running = self._threads.here
        if not running.depth:
            self._settle(running)
        if not running.depth or model in self._parts:
            counts = model.training == self.training and (torch.is_grad_enabled() or not self.training)
            found = read_arguments(model, args, kwargs)
            running.forward = Forward(counts, None if found is None else token_mask(found.tokens, found.mask))
        running.depth += 1

    def close(self, output: Any, *, failed: bool) -> None:
        """It is over, by an error if `failed`."""
        del output
        running = self._threads.here
        if not running.depth:  # it began before anybody counted
            return
        running.depth -= 1
        if not running.depth:
            if failed:  # and not a part of it whose error it caught
                running.pending.clear()
            self._settle(running)

    def opened_in_graph(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        flag: int,
        *,
        nested: bool = False,
        part: bool = False,
    ) -> None:
        """A call begins whose end nobody will tell. Its layers say whether they train."""
        del positions
        running = self._threads.here
        if running.depth and not part:
            return
        known = token_mask(tokens, mask)
        if known is None and nested and running.forward is not None and running.silent:
            known = running.forward.mask  # it is a part of the call that began last
        if not running.depth:
            self._settle(running)
        running.forward = Forward(False if self.training and flag & IDLE else None, known)
        running.silent = True

    def _count(self, name: str, routing: Routing) -> None:
        layer, running = self.layers[name], self._threads.here
        running.silent = False
        forward = running.forward or Forward()
        if not (self._trains(layer) if forward.counts is None else forward.counts):
            return
        if running.forward is None and not self._threads.at_home:
            warnings.warn(REPLICA, stacklevel=2)
        ids, n_experts = routing.expert_ids.detach(), layer.config.n_routed_experts
        if forward.mask is not None and len(forward.mask) == len(ids):  # else padding was cut out, or a part ran alone
            ids = ids.masked_fill(~forward.mask.to(ids.device).unsqueeze(-1), n_experts)
        self.chosen[name] = ids.shape[-1]
        running.pending.append((name, expert_load(ids, n_experts)))

    def _trains(self, layer: MoELayer) -> bool:
        module = layer.router if layer.experts is None else layer.experts
        return module is not None and module.training == self.training

    def _settle(self, running: Running) -> None:
        """Add what is pending: its forward came to an end."""
        with self._lock:
            for name, load in running.pending:
                self._sum[name] = (
                    self._sum[name] + load.to(self._sum[name].device) if name in self._sum else load.double()
                )
            running.pending.clear()
        running.forward = None


class Forward(NamedTuple):
    """One call of a model. counts: whether its tokens do, None where the layers say. mask: [T], False is padding."""

    counts: bool | None = None
    mask: Bool[Tensor, " T"] | None = None


REPLICA = (
    "a MoE layer ran in another thread and in no call of the model, as replicas of nn.DataParallel do: its tokens are "
    "counted, and padding with them; start one process a device (torchrun), so that DistributedDataParallel is used"
)


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
