"""Where a router has its selection bias, and how that is read and written."""

from typing import Any, NamedTuple

from torch import Tensor, nn

# as a name in the router, in a part of it, or in the block that hands it to the router
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "moe_statics.e_score_correction_bias")


class BiasHome(NamedTuple):
    """Where a selection bias is kept: `owner.name`, a buffer or a parameter."""

    owner: nn.Module
    name: str

    @property
    def bias(self) -> Tensor:
        """The live tensor in its own shape, [E] or [1, E]."""
        return getattr(self.owner, self.name)

    @property
    def is_sharded(self) -> bool:
        """By FSDP2, in families where it is a parameter."""
        return hasattr(self.bias, "full_tensor")

    @property
    def whole(self) -> Tensor:
        """[E]: the live tensor; a copy of all of it where it is sharded, for which every rank has to ask."""
        bias: Any = self.bias
        return (bias.full_tensor() if self.is_sharded else bias).flatten()

    def fill(self, values: Tensor) -> None:
        """Other values [E] in the live tensor."""
        bias: Any = self.bias
        values = values.view(bias.shape)
        if self.is_sharded:
            from torch.distributed.tensor import distribute_tensor

            values = distribute_tensor(values, bias.device_mesh, bias.placements)
        bias.copy_(values)

    def put(self, bias: Tensor) -> None:
        """Another tensor in its place, of another dtype, say."""
        if self.name in self.owner._parameters:
            bias = nn.Parameter(bias, requires_grad=False)
        setattr(self.owner, self.name, bias)


def bias_home(router: nn.Module, block: nn.Module | None = None) -> BiasHome | None:
    """Where a router has its selection bias: in itself, in a part of it, or in the `block` that hands it over."""
    for owner in (router, block):
        for path in BIAS_NAMES if owner is not None else ():
            *parts, name = path.split(".")
            found: Any = owner
            for part in parts:
                found = getattr(found, part, None)
            if isinstance(found, nn.Module) and isinstance(getattr(found, name, None), Tensor):
                return BiasHome(found, name)
    return None
