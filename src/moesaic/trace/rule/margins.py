"""How far a token was from other experts: the change of scores that would turn one choice into another."""

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig

NOISE = 16  # units of rounding that arithmetic of a precision may move a logit by, after all layers before it


def lead_of(choice: Tensor, ids: Tensor, config: MoEConfig) -> Tensor:
    """By how much the last of the experts [T, K], none of them twice, beats the best one left, float64 [T], by biased
    scores [T, E]. Above 0 they are those of the rule, and nothing was sorted to know it. It says nothing, NaN or not
    above 0, where scores tie or are NaN, an expert is missing, or a better one was left.
    """
    if config.topk_method == "balanced":  # scores decide nothing
        return torch.full((len(ids),), torch.nan, dtype=torch.float64, device="cpu")
    inside = ids.clamp(max=config.n_routed_experts - 1)
    taken, left = choice.gather(-1, inside), choice.scatter(-1, inside, -torch.inf)
    if config.limits_groups:
        kept = rules.kept_groups(rules.group_scores(choice, config), config)
        taken = taken.masked_fill(~kept.gather(-1, inside // config.experts_per_group), config.mask_fill)
        left = left.unflatten(-1, (config.n_group, config.experts_per_group)).amax(-1)
        left = left.masked_fill(~kept, config.mask_fill)
    lead = taken.amin(-1).double() - left.amax(-1).double()
    return lead.masked_fill((ids >= config.n_routed_experts).any(-1), torch.nan)


def margin_between(derived: dict[str, Tensor], target: Tensor, config: MoEConfig) -> Tensor:
    """By how much scores must move until the rule takes the experts `target` [T, K] and not its own, float32 [T].

    The widest pair of an expert lost and one gained, in biased scores; where a gained expert lies in a group that was
    not kept, the distance of that group's score to the least one kept. NaN where nothing changes, an expert is missing
    or a score is NaN.
    """
    biased, mine, n_experts = derived["biased"], derived["derived_ids"], config.n_routed_experts
    inside, present = target.clamp(max=n_experts - 1), target < n_experts
    lost, gained = ~chosen(target, n_experts).gather(-1, mine), ~chosen(mine, n_experts).gather(-1, inside) & present
    margin = _highest(biased.gather(-1, mine), lost) - _lowest(biased.gather(-1, inside), gained)
    if "group_scores" in derived:
        group_scores, kept = derived["group_scores"], derived["group_mask"]
        entered = _groups(inside, gained, config) & ~kept
        left = _groups(mine, lost, config) & ~_groups(inside, present, config)
        # a group that lost all its experts may have been shut for one that took none of the places
        shut = _highest(group_scores, left) - _highest(group_scores, ~kept)
        margin = torch.where(left.any(-1) & ~kept.all(-1) & (shut < margin), shut, margin)
        margin = torch.where(entered.any(-1), _lowest(group_scores, kept) - _lowest(group_scores, entered), margin)
    fine = lost.any(-1) & gained.any(-1) & present.all(-1) & ~biased.isnan().any(-1)
    return margin.masked_fill(~fine, torch.nan)


def rounding_bound(derived: dict[str, Tensor], config: MoEConfig, dtype: torch.dtype) -> Tensor:
    """The widest margin that rounding in `dtype` explains, float32 [T]: NOISE units of rounding of a typical logit,
    as they reach the score of the steepest expert among those chosen and the best one left."""
    logits = derived["logits"]
    near = derived["masked"].topk(min(config.num_experts_per_tok + 1, config.n_routed_experts), dim=-1).indices
    logits_near, scores_near = logits.gather(-1, near), derived["scores"].gather(-1, near)
    slope = (
        torch.ones_like(scores_near)
        if config.score_after_topk
        else SLOPES[config.scoring_func](logits_near, scores_near)
    )
    steepest = slope.amax(-1)
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


def _groups(expert_ids: Tensor, where: Tensor, config: MoEConfig) -> Tensor:
    """True for the groups of those of the ids [T, K] that are marked, bool [T, G]."""
    return chosen((expert_ids // config.experts_per_group).masked_fill(~where, config.n_group), config.n_group)


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
