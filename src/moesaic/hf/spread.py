"""Experts that transformers' expert parallelism spreads over ranks, and which of them are told what was chosen."""

from typing import Any

from torch import nn

# where it deals tokens out inside of the experts' call, which is then given the ids of this rank's own batch; before
# (5.17), routers gave each rank its experts numbered from 0, and one id for all others
DEALS_INSIDE = "transformers.distributed.expert_parallel"


def is_spread(experts: Any) -> bool:
    """Whether this rank has a part of them: the stack has the size of the whole, `num_experts` is of what is here."""
    here = getattr(experts, "num_experts", None)
    stacks = (p for p in experts.parameters(recurse=False) if p.dim() == 3)
    return isinstance(here, int) and any(len(stack) > here for stack in stacks)


def check_told(name: str, experts: nn.Module) -> None:
    """ValueError where experts are spread and what they or their router say is of this rank's experts only."""
    if is_spread(experts) and getattr(experts.forward, "__module__", "") != DEALS_INSIDE:
        raise ValueError(
            f"{name}: its experts are spread over ranks, and this transformers gives each rank the ids of its own "
            "experts alone, so who is chosen cannot be told: use transformers 5.24, or load the model without expert "
            "parallelism"
        )


def shared_by(model: nn.Module) -> int:
    """How many ranks run the same batch, as those of transformers' tensor parallelism do."""
    return max(getattr(part, "_tp_size", None) or 1 for part in model.modules())
