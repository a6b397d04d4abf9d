"""Tokens grouped by expert: the one sort that every fast engine starts from."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Plan(NamedTuple):
    """Assignments sorted by expert, the order inside an expert that of the tokens.

    assignments: [S] flat (token, slot) numbers; token = assignment // K.  counts: [E] assignments per expert.
    Assignments of the sentinel id E come last and no count covers them.
    """

    assignments: Int[Tensor, " S"]
    counts: Int[Tensor, " E"]


def no_plan(expert_ids: Int[Tensor, "T K"], num_experts: int) -> tuple[Tensor, Tensor]:
    """What an operator must return where nobody will read it: the shapes of a plan, and no values."""
    like = {"dtype": torch.int64, "device": expert_ids.device}
    return torch.empty(expert_ids.numel(), **like), torch.empty(num_experts, **like)


def group_by_expert(expert_ids: Int[Tensor, "T K"], num_experts: int) -> Plan:
    """Sort the assignments of a routing by expert; stable, hence the same on every device."""
    ids = expert_ids.flatten().long()
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device)
    counts = counts.index_add(0, ids, torch.ones_like(ids))[:num_experts]
    return Plan(torch.sort(ids, stable=True).indices, counts)
