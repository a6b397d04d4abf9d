"""Keeping experts alive: how load is counted and how the selection bias answers to it. Pure functions."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


def expert_load(expert_ids: Int[Tensor, "*tokens"], num_experts: int) -> Float[Tensor, " {num_experts}"]:
    """Assignments per expert, a float32 count. The sentinel id `num_experts` ("no expert") is not counted.

    Written with `index_add`, because `bincount` breaks a compiled graph. Exact up to 2**24 assignments an expert.
    """
    ids = expert_ids.flatten().long()
    load = torch.zeros(num_experts + 1, device=ids.device, dtype=torch.float32)
    return load.index_add(0, ids, torch.ones_like(ids, dtype=load.dtype))[:num_experts]


BiasRule = Callable[..., Tensor]  # (bias, load, *, speed) -> a new bias


def nudge_bias(bias: Float[Tensor, " E"], load: Num[Tensor, " E"], *, speed: float) -> Float[Tensor, " E"]:
    """One aux-loss-free step: raise underused experts, lower overused ones (arXiv 2408.15664, alg. 1).

    `load` counts assignments of the whole optimizer step over all ranks. An expert exactly at the mean stays.
    """
    return bias + speed * _shortage(load).sign().to(bias.dtype)


def nudge_centred(bias: Float[Tensor, " E"], load: Num[Tensor, " E"], *, speed: float) -> Float[Tensor, " E"]:
    """`nudge_bias` without drift: the mean of the step is taken off (Moonlight, torchtitan).

    More experts are underused than overused as a rule, and a bias moved by signs alone rises for ever. What is added
    to all experts changes no choice, unless groups that were shut are filled with zeros.
    """
    step = speed * _shortage(load).sign().to(bias.dtype)
    return bias + (step - step.mean())


def nudge_proportionally(bias: Float[Tensor, " E"], load: Num[Tensor, " E"], *, speed: float) -> Float[Tensor, " E"]:
    """A step of `speed` times the shortage over the mean load: large while balance is far, small when it is near.

    An idle expert moves by `speed`, one at twice the mean by -`speed`. No load at all moves nothing.
    """
    shortage = _shortage(load)
    mean = load.double().mean()
    return bias + speed * torch.where(mean > 0, shortage / mean, 0.0).to(bias.dtype)


def _shortage(load: Num[Tensor, " E"]) -> Float[Tensor, " E"]:
    """Mean minus load, in float64: exact where the mean is a whole number, which decides who is exactly at it."""
    load = load.double()
    return load.mean() - load


RULES: dict[str, BiasRule] = {"sign": nudge_bias, "centred": nudge_centred, "proportional": nudge_proportionally}
