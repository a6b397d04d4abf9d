"""Callbacks for the Hugging Face Trainer. (This file imports transformers: a callback has to be a TrainerCallback.)"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from moesaic.layer.balance import nudge_bias
from moesaic.train.routers import Balanced, LoadCounter, balanced_layers


class BiasBalance(TrainerCallback):
    """Aux-loss-free balancing (arXiv 2408.15664) for any model whose router has a buffer `e_score_correction_bias`.

        trainer.add_callback(BiasBalance(speed=1e-3))

    After every optimizer step each bias moves by `speed` towards balance, by the load of that whole step: all
    micro-batches and all ranks, counted from the ids that the model handed to its experts. Evaluation, padding (a 2-D
    attention_mask) and the recomputation of activation checkpointing do not count.

    `speed` is a number or a function of training progress (0 to 1), such as `fading(1e-3)`; 0 freezes the bias.
    `centred` takes the mean off after each step, which changes no selection and keeps the bias from drifting.
    `load` has the counts of the last step, by layer. Raises ValueError at the start of training for a model without
    such a router, or whose bias is not float32 (a step of 0.001 is lost in bfloat16). The Trainer tells no callback of
    an error: after one, the counting hooks stay on the model until this callback trains again.
    """

    def __init__(self, speed: float | Callable[[float], float] = 1e-3, *, centred: bool = False) -> None:
        if not callable(speed) and speed < 0:
            raise ValueError(f"speed={speed} would drive experts apart: use a positive number, 0.001 is usual")
        self.speed = speed
        self.centred = centred
        self.load: dict[str, Float[Tensor, " E"]] = {}
        self._layers: dict[str, Balanced] = {}
        self._counter: LoadCounter | None = None

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        layers = balanced_layers(kwargs["model"])
        for name, layer in layers.items():
            dtype = layer.bias.dtype
            if dtype != torch.float32:
                raise ValueError(
                    f"{name}: e_score_correction_bias is {dtype}, where steps of 0.001 are lost: load the model with "
                    "from_pretrained(dtype=...), which keeps it float32, or call .float() on the buffer"
                )
        self._stop()
        self._layers = layers
        self._counter = LoadCounter(kwargs["model"], layers, training=True)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        assert self._counter is not None, "on_train_begin comes first"
        speed = self.speed(state.global_step / max(1, state.max_steps)) if callable(self.speed) else self.speed
        self.load = self._counter.take()
        for name, layer in self._layers.items():
            bias = layer.bias
            moved = nudge_bias(bias, self.load[name], speed=speed)
            bias.copy_(moved - moved.mean() if self.centred else moved)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self._stop()

    def _stop(self) -> None:
        if self._counter is not None:
            self._counter.remove()
        self._counter = None


def fading(speed: float, *, start: float = 0.7) -> Callable[[float], float]:
    """Constant up to the share `start` of training, then down to 0 in a straight line: the bias comes to rest.

    With a constant speed it keeps stepping around its place, by `speed`, up to the last step.
    """
    return lambda progress: speed * min(1.0, max(0.0, (1 - progress) / (1 - start)))
