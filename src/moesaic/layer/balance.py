"""Keeping experts alive: how load is counted and how the selection bias answers to it. Pure functions."""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


def expert_load(expert_ids: Int[Tensor, "*tokens"], num_experts: int) -> Float[Tensor, " {num_experts}"]:
    """Assignments per expert, a float32 count. The sentinel id `num_experts` ("no expert") is not counted.

    Written with `index_add`, because `bincount` breaks a compiled graph. Exact up to 2**24 assignments an expert.
    """
    ids = expert_ids.flatten().long()
    load = torch.zeros(num_experts + 1, device=ids.device)
    return load.index_add(0, ids, torch.ones_like(ids, dtype=load.dtype))[:num_experts]


def nudge_bias(bias: Float[Tensor, " E"], load: Num[Tensor, " E"], *, speed: float) -> Float[Tensor, " E"]:
    """One aux-loss-free step: raise underused experts, lower overused ones (arXiv 2408.15664, alg. 1).

    `load` counts assignments of the whole optimizer step over all ranks. An expert exactly at the mean stays.
    """
    load = load.to(bias.dtype)
    return bias + speed * (load.mean() - load).sign()
