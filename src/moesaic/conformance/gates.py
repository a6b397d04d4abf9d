"""What is judged: a gate as something that answers logits (and a bias) with ids and weights.

Two adapters: `ModuleGate` for a module with one [E, D] weight (ours, transformers', yours), `FunctionGate` for a plain
function `(logits, bias, config) -> (ids, weights)`.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.conformance.parts import (
    Answer,
    call,
    check_shape,
    find_parts,
    read_answer,
    read_logits,
    slot_of,
    tensor_of,
    through_linear,
)
from moesaic.conformance.verdict import NotApplicable, gate_code
from moesaic.layer.router import Router

F32 = torch.float32


class Ready(NamedTuple):
    """A gate with its weights set, so that `run(inputs)` sees the wanted logits.

    inputs: hidden states [T, D], or the logits themselves [T, E] where the gate is a function of logits.
    logits_gradient: after a backward, the gradient that arrived at the logits, [T, E], or None.
    """

    run: Callable[[Tensor], Answer]
    inputs: Tensor
    module: nn.Module | None
    logits_gradient: Callable[[], Tensor | None]


class FunctionGate:
    """A plain function `(logits [T, E], bias [E] or None, config) -> (ids [T, K], weights [T, K])`."""

    module = None
    refuses_itself = False  # unlawful sizes may reach it

    def __init__(self, function: Callable[..., Any], config: MoEConfig, name: str = "") -> None:
        self.function, self.config = function, config
        self.name = name or getattr(function, "__qualname__", type(function).__name__)

    def ready(self, logits: Tensor, bias: Tensor | None = None) -> Ready:
        leaf = logits.clone().requires_grad_()
        inputs = leaf.clone()  # a function may work in place, which no leaf allows

        def run(rows: Tensor) -> Answer:
            given = None if bias is None else bias.clone()
            with gate_code():
                answer = read_answer(self.function(rows, given, self.config), self.config)
            return check_shape(answer, len(rows), self.config)

        return Ready(run, inputs, None, lambda: leaf.grad)

    def answer(self, logits: Tensor, bias: Tensor | None = None) -> Answer:
        with torch.no_grad():
            ready = self.ready(logits, bias)
            return ready.run(ready.inputs)

    def changed(self, *, checked: bool = True, **fields: Any) -> "FunctionGate":
        if not checked:
            raise NotApplicable(
                "a function is handed a MoEConfig, which refuses it first", "函数拿到的 MoEConfig 已先行拒绝"
            )
        return FunctionGate(self.function, replace(self.config, fields), self.name)


class ModuleGate:
    """A module whose forward takes hidden states [T, D] and returns ids and weights, in any of the usual tuples.

    It holds one [E, D] weight; logits are set through it, because a linear with the identity as weight hands them on
    exactly. Its correction bias is the [E] tensor that is named as a bias, or an argument of `forward` so named.
    `rebuild` makes the same class with other settings. The module that is given is copied, never changed.

    Raises ValueError where the module holds no such weight or bias.
    """

    def __init__(
        self,
        module: nn.Module,
        config: MoEConfig,
        name: str = "",
        rebuild: Callable[[dict[str, Any], bool], tuple[nn.Module, MoEConfig]] | None = None,
    ) -> None:
        self.module, self.config, self.name = module, config, name or type(module).__name__
        self._rebuild, self._changes = rebuild, dict[str, Any]()  # rebuilt from the first config, with all changes
        self.refuses_itself = isinstance(module, Router)  # its MoEConfig refuses unlawful sizes
        self._parts = find_parts(module, config)

    @property
    def bias_name(self) -> str | None:
        """The correction bias among the module's tensors."""
        return self._parts.bias

    @property
    def weight(self) -> Tensor:
        """The module's own weight, [E, D] however and wherever it keeps it."""
        weight = tensor_of(self.module, self._parts.weight).cpu()
        return weight.T if self._parts.transposed else weight

    def no_weight(self) -> Tensor:
        return torch.zeros(self.config.n_routed_experts, self.config.hidden_size)

    def weight_gradient(self, module: nn.Module) -> Tensor | None:
        """What a backward left at the weight of a prepared module, [E, D]."""
        gradient = slot_of(module, self._parts.weight).grad
        return gradient.T if gradient is not None and self._parts.transposed else gradient

    def prepared(self, weight: Tensor, bias: Tensor | None = None, linear_bias: Tensor | None = None) -> nn.Module:
        """A copy with this [E, D] weight in its own dtype; the other tensors are float32. A bias left out is zero."""
        with gate_code():  # a module may hold what cannot be copied
            module = copy.deepcopy(self.module).cpu().eval().to(F32)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        given = {self._parts.weight: weight, self._parts.linear_bias: linear_bias, self._parts.bias: bias}
        with torch.no_grad():
            for name, value in given.items():
                if name is not None:
                    slot = tensors[name]
                    value = torch.zeros(slot.numel()) if value is None else value
                    value = value.T if name == self._parts.weight and self._parts.transposed else value
                    slot.data = value.detach().clone().reshape(slot.shape).contiguous()
        return module

    def run(self, module: nn.Module, hidden: Tensor, bias: Tensor | None = None) -> Answer:
        """What a prepared module answers to hidden states. GateRaised where its code raises, Fault by a wrong shape."""
        output = self.call(module, hidden, bias)
        with gate_code():  # not what a gate returns
            answer = read_answer(output, self.config)
        return check_shape(answer, hidden.shape[:-1].numel(), self.config)

    def call(self, module: nn.Module, hidden: Tensor, bias: Tensor | None = None) -> Any:
        """What the module returns, as it is. GateRaised where its code raises."""
        extra = {}
        if self._parts.bias_argument:
            extra[self._parts.bias_argument] = torch.zeros(self.config.n_routed_experts) if bias is None else bias
        with gate_code():
            return call(module, hidden, extra)

    def check_logits(self) -> None:
        """ValueError where the module says logits that are not those it was given: then nothing can be asked of it."""
        logits = torch.linspace(-2.0, 2.0, self.config.n_routed_experts)[None]
        hidden, weight = through_linear(logits, self.config.hidden_size)
        with torch.no_grad():
            got = read_logits(self.call(self.prepared(weight), hidden), self.config)
        meant = (logits, logits.sigmoid(), logits.softmax(-1))  # some families return probabilities
        if got is not None and not any(torch.allclose(got.float(), m, rtol=1e-2, atol=1e-2) for m in meant):
            raise ValueError(
                f"{self.name}: its logits are not its weight times the hidden states (2 came out as "
                f"{got[0, -1].item():.4g}), so they cannot be set: give a function (logits, bias, config) instead"
            )

    def ready(self, logits: Tensor, bias: Tensor | None = None) -> Ready:
        """NaN and inf are put into the hidden states: the linear makes a row of NaN of them, as in a model."""
        hidden, weight = through_linear(logits, self.config.hidden_size)
        module = self.prepared(weight, bias)
        inputs = hidden.requires_grad_()

        def gradient() -> Tensor | None:
            return None if inputs.grad is None else inputs.grad[:, : logits.shape[1]]

        return Ready(lambda rows: self.run(module, rows, bias), inputs, module, gradient)

    def answer(self, logits: Tensor, bias: Tensor | None = None) -> Answer:
        with torch.no_grad():
            ready = self.ready(logits, bias)
            return ready.run(ready.inputs.detach())

    def changed(self, *, checked: bool = True, **fields: Any) -> "ModuleGate":
        if self._rebuild is None:
            raise NotApplicable("this gate cannot be built with other settings", "这个门控无法用其他设置重建")
        changes = {**self._changes, **fields}
        module, config = self._rebuild(changes, checked)
        gate = ModuleGate(module, config, self.name, self._rebuild)
        gate._changes = changes
        return gate


Gate = FunctionGate | ModuleGate


def replace(config: MoEConfig, fields: dict[str, Any], *, checked: bool = True) -> Any:
    """The config with other fields; unchecked as other libraries' configs are. NotApplicable where it refuses them."""
    if not checked:
        made = copy.copy(config)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made
    try:
        return dataclasses.replace(config, **fields)
    except ValueError as error:
        raise NotApplicable(str(error), str(error)) from None
