"""How far a token was from other experts: the change of scores that would turn one choice into another."""

import torch
from torch import Tensor

from moesaic.config import MoEConfig

NOISE = 16  # units of rounding that arithmetic of a precision may move a logit by, after all layers before it


def margin_between(derived: dict[str, Tensor], target: Tensor, config: MoEConfig) -> Tensor:
    """By how much scores must move until the rule takes the experts `target` [T, K] and not its own, float32 [T].

    The widest pair of an expert lost and one gained, in biased scores; where a gained expert lies in a group that was
    not kept, the distance of that group's score to the least one kept. NaN where nothing changes, an expert is missing
    or a score is NaN.
    """
    biased, n_experts = derived["biased"], config.n_routed_experts
    here, there = chosen(derived["derived_ids"], n_experts), chosen(target, n_experts)
    lost, gained = here & ~there, there & ~here
    margin = _highest(biased, lost) - _lowest(biased, gained)
    if "group_scores" in derived:
        group_scores, kept = derived["group_scores"], derived["group_mask"]
        by_group = (-1, (config.n_group, config.experts_per_group))
        entered = gained.unflatten(*by_group).any(-1) & ~kept
        left = lost.unflatten(*by_group).any(-1) & ~there.unflatten(*by_group).any(-1)
        # a group that lost all its experts may have been shut for one that took none of the places
        shut = _highest(group_scores, left) - _highest(group_scores, ~kept)
        margin = torch.where(left.any(-1) & ~kept.all(-1) & (shut < margin), shut, margin)
        margin = torch.where(entered.any(-1), _lowest(group_scores, kept) - _lowest(group_scores, entered), margin)
    fine = lost.any(-1) & gained.any(-1) & (target < n_experts).all(-1) & ~biased.isnan().any(-1)
    return margin.masked_fill(~fine, torch.nan)


def rounding_bound(derived: dict[str, Tensor], config: MoEConfig, dtype: torch.dtype) -> Tensor:
    """The widest margin that rounding in `dtype` explains, float32 [T]: NOISE units of rounding of a typical logit,
    as they reach the score of the steepest expert among those chosen and the best one left."""
    logits, scores = derived["logits"], derived["scores"]
    slope = torch.ones_like(scores) if config.score_after_topk else SLOPES[config.scoring_func](logits, scores)
    near = derived["masked"].topk(min(config.num_experts_per_tok + 1, config.n_routed_experts), dim=-1).indices
    steepest = slope.gather(-1, near).amax(-1)
    summed = config.scores_of_group if "group_scores" in derived else 1
    rounding = torch.finfo(dtype).eps * _shut_as_zero(logits).pow(2).mean(-1).sqrt() * steepest
    largest = _shut_as_zero(derived["biased"]).abs().amax(-1)
    smallest = torch.finfo(torch.float32).eps * largest  # the sum with the bias rounds too
    return NOISE * summed * torch.maximum(rounding, smallest)


SLOPES = {
    "sigmoid": lambda _, scores: scores * (1 - scores),
    "softmax": lambda _, scores: scores * (1 - scores),
    "sqrtsoftplus": lambda logits, scores: logits.sigmoid() / (2 * scores),
}


def chosen(expert_ids: Tensor, n_experts: int) -> Tensor:
    """True for the experts among the ids [T, K], bool [T, E]; the id E is none of them."""
    full = torch.zeros(len(expert_ids), n_experts + 1, dtype=torch.bool, device="cpu")
    return full.scatter(-1, expert_ids, True)[:, :n_experts]


def same_experts(expert_ids: Tensor, others: Tensor) -> Tensor:
    """Whether two choices [T, K] are of the same experts, in whatever order, bool [T]."""
    return (expert_ids.sort(-1).values == others.sort(-1).values).all(-1)


def _shut_as_zero(values: Tensor) -> Tensor:
    """An infinite value shuts an expert out, or in; it does not round."""
    return values.masked_fill(values.isinf(), 0.0)


def _highest(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, -torch.inf).amax(-1)


def _lowest(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, torch.inf).amin(-1)
