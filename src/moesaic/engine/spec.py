"""What families of experts differ in, beside their weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.types import ExpertWeights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class ExpertSpec:
    """The shape of one expert's MLP: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where not gated.

    limit clamps the gate from above and up from both sides; alpha is the slope inside SiLU's sigmoid; up_offset is
    added to up (gpt-oss: limit 7, alpha 1.702, offset 1). interleaved: gate and up rows alternate.
    transposed: weights are stored [E, in, out].
    """

    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0
    interleaved: bool = False
    transposed: bool = False

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

    def activate(self, projected: Float[Tensor, "n U"]) -> Float[Tensor, "n I"]:
        """What lies between the two projections of an expert."""
        if not self.gated:
            return self._activation(projected)
        gate, up = (projected[..., ::2], projected[..., 1::2]) if self.interleaved else projected.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._activation(gate) * (up + self.up_offset if self.up_offset else up)

    def project(
        self, x: Float[Tensor, "n a"], weight: Float[Tensor, "b c"], bias: Tensor | None
    ) -> Float[Tensor, "n d"]:
        """x through one expert's matrix, in whichever orientation it is stored."""
        return F.linear(x, weight.mT if self.transposed else weight, bias)

    def output_size(self, experts: ExpertWeights) -> int:
        return experts.down.shape[-1 if self.transposed else -2]

    def _activation(self, x: Tensor) -> Tensor:
        if self.activation == "silu" and self.alpha != 1.0:
            return x * torch.sigmoid(self.alpha * x)
        return ACTIVATIONS[self.activation](x)
