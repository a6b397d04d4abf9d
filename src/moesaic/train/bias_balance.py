"""Aux-loss-free balancing: after every optimizer step each selection bias moves by the load of that step."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from moesaic.hf.added_bias import add_bias, check_not_lost
from moesaic.hf.bias_home import BiasHome
from moesaic.hf.modules import MoELayer, moe_layers, unwrapped
from moesaic.layer.balance import RULES, BiasRule
from moesaic.train.counting import LoadCounter, Loads
from moesaic.train.own_loss import warn_of_own_loss

Speed = float | Callable[[float], float]


class BiasBalance(TrainerCallback):
    """Aux-loss-free balancing (arXiv 2408.15664) for any model whose routers have a selection bias.

        Trainer(..., callbacks=[ms.BiasBalance(speed=1e-3)])   # of transformers

        balance = ms.BiasBalance(speed=1e-3).attach(model)     # a loop of your own
        for batch in batches:
            ...
            optimizer.step()
            balance.step()

    Each step takes the load of that whole optimizer step: all micro-batches and all ranks, counted from the ids that
    the model handed to its experts. Evaluation, forwards without gradients, padding (a 2-D attention_mask), forwards
    that failed, the recomputation of activation checkpointing and steps that a GradScaler skipped do not count.

    speed: a number, a function of progress (0 to 1; see schedules.py), or either of them by a pattern of layer names,
        {"model.layers.1.*": 1e-2, "*": 1e-3}; the first that fits counts. 0 freezes a bias.
    rule: "sign" (the paper), "centred" (Moonlight: no drift), "proportional", or a function (bias, load, *, speed).
    add_bias: give routers that have no bias one (added_bias.py); it is saved with the model, and `ms.attach` reads it.
    total_steps: what progress is measured by in a loop of your own; the Trainer knows.
    group: the data-parallel process group; all ranks unless given.

    A bias in half precision becomes float32 first: in bfloat16 0.5 + 0.001 is 0.5. `load` has the counts of the last
    step, by layer. Raises ValueError where there is nothing to balance, naming what to do, and for a model that another
    BiasBalance is attached to.
    """

    def __init__(
        self,
        speed: Speed | Mapping[str, Speed] = 1e-3,
        *,
        rule: str | BiasRule = "sign",
        add_bias: bool = False,
        total_steps: int | None = None,
        group: Any = None,
    ) -> None:
        self.speeds: Mapping[str, Speed] = speed if isinstance(speed, Mapping) else {"*": speed}
        for each in self.speeds.values():
            if not callable(each):
                _check_speed(each)
        if speed == 0:
            raise ValueError(
                "speed=0 moves no bias: use a positive number, 0.001 is usual; {pattern: 0} freezes a layer"
            )
        found = RULES.get(rule) if isinstance(rule, str) else rule
        if not callable(found):
            raise ValueError(f"rule={rule!r} is unknown: use {', '.join(RULES)}, or a function (bias, load, *, speed)")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} is no length of training: use 1 or more")
        self.rule: BiasRule = found
        self.add_bias, self.total_steps, self.group = add_bias, total_steps, group
        self.steps = 0
        self.load: dict[str, Float[Tensor, " E"]] = {}
        self._homes: dict[str, BiasHome] = {}
        self._counter: LoadCounter | None = None
        self._counted: bool | None = None  # whether the last step counted a token
        self._training: Any = None  # the state of the Trainer that attached it

    # a loop of your own

    def attach(self, model: nn.Module) -> "BiasBalance":
        """Count the model's training forwards from now on; its biases become float32. Returns self."""
        self.detach()
        layers = _layers_to_balance(model, add=self.add_bias)
        for layer in layers:
            self._speed_of(layer.name)
        if _balancing(_homes_in(model)):
            raise ValueError(
                f"{type(model).__name__} is balanced by another BiasBalance already: two would move each bias twice; "
                "call its detach() first"
            )
        if self.add_bias:
            add_bias(model)
        _warn_of_adapters(model, layers)
        homes = {layer.name: home for layer in layers if (home := layer.home) is not None}
        self._counter = LoadCounter(model, layers, training=True)
        self._uncount = weakref.finalize(self, self._counter.remove)  # hooks keep the model alive
        for home in homes.values():
            _widen(home)
            _attached[home.owner] = weakref.ref(self)
        self._homes, self._counted, self.load = homes, None, {}
        return self

    def detach(self) -> None:
        """Take the counting off the model; the biases stay as they are."""
        if self._counter is not None:
            self._uncount()
            for home in self._homes.values():
                _attached.pop(home.owner, None)
        self._counter = self._training = None

    @torch.no_grad()
    def step(self, *, skipped: bool = False) -> None:
        """Move every bias by the load since the last step. Call it after each optimizer step, on every rank.

        skipped: the optimizer did not move, as a GradScaler decides where gradients overflowed (its scale has fallen:
        `scaler.get_scale() < before`); then what was counted is dropped, and no bias moves either.
        """
        if self._counter is None:
            raise ValueError("this BiasBalance is attached to no model: call attach(model) before the first forward")
        for layer in self._counter.layers.values():
            _check_in_place(layer)
        loads = self._counter.take(self.group)
        if skipped:
            return
        progress = self.steps / self.total_steps if self.total_steps else 0.0
        self._warn_of_nothing(loads, heard=self._counter.heard)
        self._move(loads, min(progress, 1.0))
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        """What schedules go by; the biases are in the model's own state.

        Save it after a step: micro-batches since then are no part of it, as their gradients are none of an optimizer's.
        """
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there. What was counted since the last step is dropped."""
        self.steps = state["steps"]
        if self._counter is not None:
            self._counter.forget()

    # transformers' Trainer

    def on_init_end(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        model = kwargs["model"]  # before a checkpoint is loaded into it: that needs places, wide enough
        if self.add_bias:
            add_bias(model)
        for home in _homes_in(model):
            _widen(home)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        model = kwargs["model"]
        if self.add_bias and state is not None and state.global_step and any(not x.has_bias for x in moe_layers(model)):
            raise ValueError(
                f"the checkpoint that training goes on from was loaded before its added biases had a place: {IN_TIME}"
            )
        homes = _homes_in(model)
        if state is not None and state.global_step and any(_is_narrow(home) for home in homes):
            warnings.warn(ROUNDED, stacklevel=2)
        for other in _balancing(homes):
            if other._training is not None and other._training is not state:
                other.detach()  # an error or Ctrl-C ended its Trainer, which tells no callback
        self.attach(model)
        self._training = state
        warn_of_own_loss(model, args)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        self.total_steps = max(1, state.max_steps) if state is not None else self.total_steps
        self.steps = state.global_step if state is not None else self.steps
        self.step(skipped=bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False)))

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self.detach()

    # inside

    def _warn_of_nothing(self, loads: Loads, *, heard: bool) -> None:
        """Once, where steps without a token begin. After the first step the device is waited for only where this rank
        heard of no forward; others may have."""
        counted = (heard and self._counted is not None) or any(load.any() for load in loads.values())
        if self._counted is not False and not counted:
            warnings.warn(NOTHING_COUNTED.format(step=self.steps + 1), stacklevel=4)
        self._counted = counted

    def _move(self, loads: Loads, progress: float) -> None:
        self.load = loads
        speeds = {name: self._speed_at(name, progress) for name in self._homes}
        for name, home in self._homes.items():
            _widen(home, name)  # the model may have been cast since
        for name, home in self._homes.items():
            bias = home.whole.detach()
            home.fill(self.rule(bias, loads[name].to(bias.device), speed=speeds[name]))

    def _speed_at(self, layer: str, progress: float) -> float:
        speed = self._speed_of(layer)
        return _check_speed(speed(progress)) if callable(speed) else speed

    def _speed_of(self, layer: str) -> Speed:
        for pattern, speed in self.speeds.items():
            if fnmatch(layer, pattern):
                return speed
        raise ValueError(f"no speed fits layer {layer!r}: add '*' to {list(self.speeds)}, with 0 to leave a bias alone")


# whose biases are moved by which
_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[BiasBalance]] = weakref.WeakKeyDictionary()
# with model_init the Trainer makes the model anew as training begins, after what callbacks did to the one before
IN_TIME = "use Trainer(model, callbacks=[BiasBalance(...)]), without model_init and add_callback"
ROUNDED = f"the biases of the checkpoint were read into half precision and lost their last bits: {IN_TIME}"
SKIPPING = "balancing_biases"  # of Zaya's routers, which have one class more than there are experts
NOTHING_COUNTED = (
    "BiasBalance counted no token in step {step}: is the model that trains the one it is attached to, in training mode "
    "and with gradients on?"
)


def _check_speed(speed: Any) -> float:
    value = float(speed) if isinstance(speed, Real) else math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"speed={speed!r} is no speed: use a positive number, 0.001 is usual")
    return value


def _balancing(homes: Iterable[BiasHome]) -> list[BiasBalance]:
    """Every BiasBalance that moves one of these biases."""
    found = (_attached.get(home.owner) for home in homes)
    return list({id(each): each for ref in found if ref is not None and (each := ref()) is not None}.values())


def _layers_to_balance(model: nn.Module, *, add: bool) -> list[MoELayer]:
    """The layers with a bias; all of them where one is to be added."""
    check_not_lost(model)
    if any(hasattr(layer.router, SKIPPING) for layer in moe_layers(model)):
        raise ValueError(
            f"{type(model).__name__} lets tokens skip all experts and hands those to expert 0: no load tells how to "
            f"move its {SKIPPING}; train it without BiasBalance"
        )
    layers = [layer for layer in moe_layers(model) if add or layer.has_bias]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no router with a selection bias (e_score_correction_bias): use "
            "BiasBalance(add_bias=True), or a balancing loss"
        )
    return layers


def _warn_of_adapters(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Where PEFT adapts the model, its checkpoints hold what `modules_to_save` names and no bias beside it."""
    adapted = unwrapped(model)
    saved = {id(module) for name, module in adapted.named_modules() if "modules_to_save" in name.split(".")}
    if hasattr(adapted, "peft_config") and any(id(layer.router) not in saved for layer in layers):
        warnings.warn(
            f"the biases that move are not in what {type(adapted).__name__} saves, and with its adapters off, as DPO's "
            "reference, the model routes by them too: name the routers in LoraConfig(modules_to_save=...), such as "
            "'gate', or save the whole model where nothing compares with it",
            stacklevel=3,
        )


def _check_in_place(layer: MoELayer) -> None:
    """ValueError where PEFT has put a copy of the router in its place since (modules_to_save), which has a bias too."""
    parts = () if layer.block is None else layer.block.children()
    aside = [part._modules.get("original_module") for part in parts]
    if layer.home is not None and any(layer.home.owner in part.modules() for part in aside if part is not None):
        raise ValueError(
            f"{layer.name}: PEFT trains a copy of its router now (modules_to_save), and the bias that moves is not in "
            "it: attach BiasBalance after get_peft_model"
        )


def _homes_in(model: nn.Module) -> list[BiasHome]:
    return [home for layer in moe_layers(model) if (home := layer.home) is not None]


def _widen(home: BiasHome, name: str | None = None) -> None:
    """Make a bias in half precision float32, in which small steps arrive. `name` is given while it trains."""
    if not _is_narrow(home):
        return
    if name is not None and home.is_sharded:
        raise ValueError(
            f"{name}: FSDP2 holds its bias in {home.bias.dtype}, where small steps are lost, and takes no other after "
            "the first forward: attach BiasBalance before it"
        )
    home.put(home.bias.detach().float())


def _is_narrow(home: BiasHome) -> bool:
    return home.bias.dtype not in (torch.float32, torch.float64)
