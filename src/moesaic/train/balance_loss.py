"""A balancing loss for any model: its gradient joins at the routers, the loss that is reported stays the task's."""

import warnings
import weakref
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from moesaic.config import MoEConfig
from moesaic.hf.modules import MoELayer, added_rule, moe_layers
from moesaic.layer.losses import LOSSES, devices, reachable
from moesaic.layer.router import Router
from moesaic.trace.recording.calls import listening
from moesaic.trace.recording.forwards import bodies_in, outermost_in, parts_in
from moesaic.train.balance_operators import after_model, after_router
from moesaic.train.injection import Ledger, is_heard, ledger_of
from moesaic.train.own_loss import warn_of_own_loss


class BalanceLoss(TrainerCallback):
    """A balancing loss for any MoE model, as if `alpha * sum of it over layers` had been added to the loss.

        Trainer(..., callbacks=[ms.BalanceLoss("sequence", 1e-4)])   # of transformers

        balance = ms.BalanceLoss("switch", 1e-2).attach(model)       # a loop of your own
        for batch in batches:
            loss = model(**batch).loss                               # or: loss = balance(my_loss(model(x), y))
            loss.backward()
            optimizer.step()
            balance.step()

    kind: "switch", "sequence", "global_batch", "device", "communication" or "z" (see moesaic.layer.losses; all but z
        are 1 at perfect balance). Several kinds may be attached to one model.
    alpha: how much of it, over 0. May be set anew at any time.
    n_devices, max_devices: of "device" and "communication"; the config's groups, and how many of them a token may
        reach, unless given.
    group: the data-parallel process group of "global_batch"; all ranks unless given. Each of its ranks has to run as
        many training forwards as the others, which wait for it in every layer.

    Forward values do not change: the gradient is added where the router's weights pass, times the gradient that the
    model's loss gets (GradScaler, accumulation). That loss is the model's own, what TRL's SFTTrainer makes of its
    log-probabilities, or what `balance(loss)` was given; a backward with none raises ValueError. Sequences are rows of
    the batch, or what position_ids makes of packed rows. Padding (a 2-D attention_mask) and forwards without gradients
    or in evaluation mode take no part. `values` has each layer's mean value in the last step. Raises
    ValueError for a model without MoE layers, one whose routing rule is not known, and one with a BalanceLoss of this
    kind. A copy of the model (EMA, teacher) takes no part.
    """

    def __init__(
        self,
        kind: str,
        alpha: float,
        *,
        n_devices: int | None = None,
        max_devices: int | None = None,
        group: Any = None,
    ) -> None:
        if kind not in LOSSES:
            raise ValueError(f"kind={kind!r} is no balancing loss known here: use {', '.join(LOSSES)}")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha} does not balance: use a positive number, such as 0.001")
        _check_devices(kind, n_devices, max_devices)
        self.kind, self.alpha, self.group = kind, alpha, group
        given = {"n_devices": n_devices, "max_devices": max_devices}
        self.options = {name: value for name, value in given.items() if value is not None}
        self.values: dict[str, Float[Tensor, ""]] = {}
        self._hooks = ExitStack()
        self._ledger: Ledger | None = None
        self._key: Tensor | None = None
        self._stepped = False
        self._training: Any = None  # the state of the Trainer that attached it
        self._summed = False  # while a Trainer attaches it that makes its loss of log_probs

    # a loop of your own

    def attach(self, model: nn.Module) -> "BalanceLoss":
        """Balance the model's training forwards from now on. Returns self."""
        self.detach()
        layers = moe_layers(model)
        for layer in layers:
            _check_layer(layer, self.kind, self.options)
        if any(other.kind == self.kind for other in _balancing(layers)):
            raise ValueError(
                f"{type(model).__name__} has a BalanceLoss of kind {self.kind!r} already: its gradient would count "
                "twice; call its detach() first"
            )
        torch.compiler.reset()  # guards of graphs that were compiled before do not notice hooks that come after
        ledger = Ledger(self)
        with ExitStack() as hooks:
            hooks.callback(ledger.remove)
            self._hook(hooks, model, layers, ledger)
            self._key = ledger.key("")
            self._hooks = hooks.pop_all()
        self._ledger, self._stepped = ledger, False
        return self

    def _hook(self, hooks: ExitStack, model: nn.Module, layers: list[MoELayer], ledger: Ledger) -> None:
        """Put hooks and keys on the model, to be taken off together: graphs are guarded by the keys.

        By what is called too, so that it is the same for equal layers: they may then share a graph.
        """
        attribute = self._attribute

        def mark(module: nn.Module, name: str) -> None:
            _forget_copied(module, attribute)
            module.__dict__[attribute] = ledger.key(name)
            hooks.callback(module.__dict__.pop, attribute, None)

        outermost, ledger.parts = outermost_in(model), parts_in(model, layers)
        bodies = bodies_in(model, [layer.router for layer in layers if layer.router is not None])
        for called in (*outermost, *ledger.parts, *bodies):
            opened = partial(ledger.opened_in_graph, nested=called in bodies, part=called in ledger.parts)
            hooks.enter_context(listening(called, ledger, opened))
        for called in outermost:
            mark(called, "")
            after = partial(after_model, attribute=attribute, summed=self._summed)
            hooks.callback(called.register_forward_hook(after, with_kwargs=True).remove)
        after_routers: dict[tuple[MoEConfig, bool], partial] = {}
        for layer in layers:
            assert layer.router is not None
            mark(layer.router, layer.name)
            biased = added_rule(layer.router) is not None
            after = partial(
                after_router, attribute=attribute, kind=self.kind, config=layer.config, options=self.options,
                biased=biased,
            )  # fmt: skip
            after = after_routers.setdefault((layer.config, biased), after)
            hooks.callback(layer.router.register_forward_hook(after).remove)

    @property
    def _attribute(self) -> str:
        return f"{KEY}{self.kind}"

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()
        self._ledger = self._key = self._training = None

    def __call__(self, loss: Float[Tensor, ""], *, share: float | Tensor | None = None) -> Float[Tensor, ""]:
        """The same loss, by whose gradient the balancing is scaled: of all forwards since the last one given.

        share: which part of the optimizer step's batch it stands for, where it is a part of a sum over that batch and
        not the mean of a micro-batch.
        """
        if self._key is None:
            raise ValueError("this BalanceLoss is attached to no model: call attach(model) before the first forward")
        if loss.numel() != 1:
            raise ValueError(f"the loss has shape {tuple(loss.shape)}: give one number, such as its mean")
        part = None if share is None else torch.as_tensor(share, dtype=torch.float64).detach()
        return torch.ops.moesaic.balance_note(self._key, loss, part, True)[0]

    def step(self) -> None:
        """Close an optimizer step: `values` are those of its forwards. Call it after each optimizer step."""
        if self._ledger is None:
            raise ValueError("this BalanceLoss is attached to no model: call attach(model) before the first forward")
        self.values = self._ledger.take()
        if not self.values and not self._stepped:
            warnings.warn(NOTHING_SEEN, stacklevel=2)
        self._stepped = True

    # transformers' Trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        for other in _balancing(moe_layers(kwargs["model"])):
            if other._training is not None and other._training is not state:
                other.detach()  # an error or Ctrl-C ended its Trainer, which tells no callback
        self._summed = getattr(args, "loss_type", None) == "nll"  # TRL's SFT alone; others weight them
        try:
            self.attach(kwargs["model"])
        finally:
            self._summed = False  # a loop that attaches it next has the model's loss
        self._training = state
        assert self._ledger is not None
        self._ledger.owner = weakref.ref(self)  # so it goes with a Trainer that ended so and is dropped
        weakref.finalize(self, self._hooks.close)
        if self.kind != "z":  # which balances nothing
            warn_of_own_loss(kwargs["model"], args)

    def on_optimizer_step(self, args, state, control, **kwargs):  # noqa: ARG002
        self.step()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self.detach()


KEY = "_moesaic_loss_"  # on a balanced module, with the kind after it: by which the operators find who balances it
NOTHING_SEEN = (
    "BalanceLoss saw no router in this step: is the model that trains the one it is attached to, in training mode and "
    "with gradients on?"
)


def _check_devices(kind: str, n_devices: int | None, max_devices: int | None) -> None:
    for name, value, kinds in (
        ("n_devices", n_devices, ("device", "communication")),
        ("max_devices", max_devices, ("communication",)),
    ):
        if value is not None and kind not in kinds:
            raise ValueError(f"{name}={value} does not matter to kind={kind!r}: leave it out, or use {kinds[-1]!r}")


def _check_layer(layer: MoELayer, kind: str, options: dict[str, int]) -> None:
    """Refuse a layer whose scores cannot be told from what its router returns."""
    if layer.router is None:
        raise ValueError(f"{layer.name}: no router of its own returns the picks, so there is no loss to make of them")
    routes_by_itself = isinstance(layer.router, Router) and type(layer.router).forward is not Router.forward
    if routes_by_itself or not layer.config.rule_is_known:
        raise ValueError(
            f"{layer.name}: how {type(layer.router).__name__} scores is not known here, so there is no loss to make of "
            "it: use the model's own, where it has one, or a function of moesaic.layer.losses on its logits"
        )
    if kind in ("device", "communication"):
        d = devices(layer.config, options.get("n_devices"))
        if d == 1:
            raise ValueError(
                f"{layer.name}: all experts are on one device, which is always balanced: use n_devices=2 or more"
            )
        reachable(layer.config, d, options.get("max_devices"))


def _balancing(layers: list[MoELayer]) -> list[BalanceLoss]:
    """Every BalanceLoss, of any kind, that these layers have."""
    found = (item for layer in layers if layer.router is not None for item in vars(layer.router).items())
    keys = (value for name, value in found if name.startswith(KEY) and is_heard(value))
    return list(dict.fromkeys(ledger_of(key)[0].owner() for key in keys))


def _forget_copied(module: nn.Module, attribute: str) -> None:
    """Take off the hooks that came with a copy of a balanced module: they would do their work a second time."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [n for n, hook in hooks.items() if getattr(hook, "keywords", {}).get("attribute") == attribute]:
            del hooks[number]
