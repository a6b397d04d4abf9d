"""What families of experts differ in, beside their weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.types import ExpertWeights


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
}


@dataclass(frozen=True)
class ExpertSpec:
    """The shape of one expert's MLP: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where not gated.

    limit clamps the gate from above and up from both sides; alpha is the slope inside SiLU's sigmoid; up_offset is
    added to up (gpt-oss: limit 7, alpha 1.702, offset 1). Softcaps bound SiLU's factor beside the sigmoid, and up, to
    `cap * tanh(x / cap)`, in float32 where the dtype is narrower (Inkling 2: 4 and 25). interleaved: gate and up rows
    alternate. transposed: weights are stored [E, in, out].
    """

    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0
    gate_softcap: float | None = None
    up_softcap: float | None = None
    interleaved: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
        if not self.gated:
            plains = {"limit": None, "up_offset": 0.0, "gate_softcap": None, "up_softcap": None, "interleaved": False}
            for name, plain in plains.items():
                if (value := getattr(self, name)) != plain:
                    raise ValueError(f"{name}={value} is for gated experts: use gated=True or leave it")
        if self.alpha != 1.0 and self.activation != "silu":
            raise ValueError(f"alpha={self.alpha} is the slope of SiLU: use activation='silu' or leave it")
        if self.gate_softcap is not None and self.activation != "silu":
            raise ValueError(f"gate_softcap={self.gate_softcap} is for SiLU: use activation='silu' or leave it")
        for name in ("limit", "gate_softcap", "up_softcap"):
            if (bound := getattr(self, name)) is not None and not 0 < bound < math.inf:
                raise ValueError(f"{name}={bound} is no bound: use a positive finite number, or None")

    @classmethod
    def of(cls, config: MoEConfig) -> "ExpertSpec":
        return cls(
            activation=config.hidden_act,
            gated=config.gated,
            limit=config.swiglu_limit,
            alpha=config.swiglu_alpha,
            up_offset=config.swiglu_up_offset,
            interleaved=config.interleaved,
            transposed=config.transposed,
        )

    @property
    def fields(self) -> tuple[str, bool, float | None, float, float, float | None, float | None, bool, bool]:
        """All of it in order, as an operator takes it: `ExpertSpec(*spec.fields) == spec`. (astuple takes 36 µs.)"""
        return (
            self.activation,
            self.gated,
            self.limit,
            self.alpha,
            self.up_offset,
            self.gate_softcap,
            self.up_softcap,
            self.interleaved,
            self.transposed,
        )

    def activate(self, projected: Float[Tensor, "n U"]) -> Float[Tensor, "n I"]:
        """What lies between the two projections of an expert."""
        if not self.gated:
            return self._activation(projected)
        if self._widens(projected):
            return self.activate(projected.float()).to(projected.dtype)
        gate, up = (projected[..., ::2], projected[..., 1::2]) if self.interleaved else projected.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        up = softcap(up, self.up_softcap)
        return self._activation(gate) * (up + self.up_offset if self.up_offset else up)

    def activate_backward(
        self, projected: Float[Tensor, "n U"], grad: Float[Tensor, "n I"]
    ) -> tuple[Float[Tensor, "n I"], Float[Tensor, "n U"]]:
        """(activate(projected), the gradient of projected) for a gradient of what `activate` returns.

        At the edge of a clamp and at the kink of relu the gradient is torch's own: it passes at a limit, not at 0.
        """
        if not self.gated:
            return self._activation(projected), self._activation_backward(projected, grad)
        if self._widens(projected):
            activated, grad_projected = self.activate_backward(projected.float(), grad.float())
            return activated.to(projected.dtype), grad_projected.to(projected.dtype)
        gate, up = (projected[..., ::2], projected[..., 1::2]) if self.interleaved else projected.chunk(2, dim=-1)
        grad_projected = torch.empty_like(projected)
        halves = (
            (grad_projected[..., ::2], grad_projected[..., 1::2])
            if self.interleaved
            else (grad_projected.chunk(2, dim=-1))
        )
        inside_gate = inside_up = None
        if self.limit is not None:
            inside_gate, inside_up = gate <= self.limit, up.abs() <= self.limit
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        capped = softcap(up, self.up_softcap)
        shifted = capped + self.up_offset if self.up_offset else capped
        activated = self._activation(gate)
        grad_gate, grad_up = self._activation_backward(gate, grad * shifted), grad * activated
        if self.up_softcap is not None:
            grad_up = grad_up * softcap_slope(capped, self.up_softcap)
        halves[0].copy_(grad_gate if inside_gate is None else grad_gate * inside_gate)
        halves[1].copy_(grad_up if inside_up is None else grad_up * inside_up)
        return activated * shifted, grad_projected

    def project(
        self, x: Float[Tensor, "n a"], weight: Float[Tensor, "b c"], bias: Tensor | None
    ) -> Float[Tensor, "n d"]:
        """x through one expert's matrix, in whichever orientation it is stored."""
        return F.linear(x, weight.mT if self.transposed else weight, bias)

    def as_in_out(self, experts: ExpertWeights) -> tuple[Float[Tensor, "E D U"], Float[Tensor, "E I O"]]:
        """Views of up and down by which rows are multiplied from the left."""
        return (experts.up, experts.down) if self.transposed else (experts.up.mT, experts.down.mT)

    def up_size(self, experts: ExpertWeights) -> int:
        return experts.up.shape[-1 if self.transposed else -2]

    def output_size(self, experts: ExpertWeights) -> int:
        return experts.down.shape[-1 if self.transposed else -2]

    def _widens(self, projected: Tensor) -> bool:
        """Whether softcaps want more than projected's 16 bits."""
        return (self.gate_softcap or self.up_softcap) is not None and projected.dtype.itemsize == 2

    def _activation(self, x: Tensor) -> Tensor:
        if self.gate_softcap is not None or self.alpha != 1.0:
            return softcap(x, self.gate_softcap) * torch.sigmoid(self.alpha * x)
        return ACTIVATIONS[self.activation](x)

    def _activation_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        match self.activation:
            case "silu" if self.gate_softcap is not None or self.alpha != 1.0:
                sigmoid, capped = torch.sigmoid(self.alpha * x), softcap(x, self.gate_softcap)
                slope = softcap_slope(capped, self.gate_softcap)
                return grad * sigmoid * (slope + self.alpha * capped * (1 - sigmoid))
            case "silu":
                return torch.ops.aten.silu_backward(grad, x)
            case "gelu":
                return torch.ops.aten.gelu_backward(grad, x)
            case "gelu_pytorch_tanh":
                return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
            case "relu":
                return torch.ops.aten.threshold_backward(grad, x, 0)
            case "relu2":
                return grad * 2 * F.relu(x)
        raise AssertionError(f"no derivative for {self.activation!r}")


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """x, bent so that it stays within the cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def softcap_slope(capped: Tensor, cap: float | None) -> Tensor | float:
    """The derivative of `softcap` where it gave `capped`."""
    return 1.0 if cap is None else 1 - (capped / cap).square()
