"""What a gate should answer, from the definition: one token at a time, plain Python floats (float64), no tensors.

Slow and obvious on purpose. It shares no code with `rules`, because it judges our own gate as well.
"""

import math
from typing import NamedTuple

from moesaic.config import MoEConfig

Floats = list[float]
COUNTED = {"max": lambda _: 1, "top2_sum": lambda _: 2, "k_over_m_sum": lambda c: c.num_experts_per_tok // c.topk_group}


class Decision(NamedTuple):
    """What the definition decides for one token.

    experts: the K chosen ones, best first, ties to the lower id.  weights: what combine multiplies by, per expert.
    groups: the groups kept, all of them where nothing is masked.  ranked_by: biased score per expert.
    margin: how far the choice is from another one: the smaller of the gaps between the last kept and the first lost
    group and expert; infinite where nothing is lost.
    """

    experts: list[int]
    weights: dict[int, float]
    groups: list[int]
    ranked_by: Floats
    margin: float


def decide(logits: Floats, bias: Floats | None, config: MoEConfig) -> Decision:
    """Route one token (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2; V2, arXiv 2405.04434, sec. 2.2).

    Masked experts cannot be chosen, whatever `group_mask` says: filling with 0 is the bug that is looked for.
    """
    scores = logits if config.score_after_topk else score(logits, config.scoring_func)
    ranked_by = [s + b for s, b in zip(scores, bias, strict=True)] if bias is not None else list(scores)
    groups, group_margin = list(range(config.n_group)), math.inf
    if config.limits_groups:
        groups, group_margin = best(group_scores(ranked_by, config), config.topk_group)
    candidates = [e for e in range(len(scores)) if e // config.experts_per_group in groups]
    places, margin = best([ranked_by[e] for e in candidates], config.num_experts_per_tok)
    experts = [candidates[place] for place in places]
    return Decision(experts, weigh(scores, experts, config), sorted(groups), ranked_by, min(margin, group_margin))


def score(logits: Floats, scoring_func: str) -> Floats:
    """Affinity of the token to each expert."""
    if scoring_func == "sigmoid":
        return [sigmoid(z) for z in logits]
    if scoring_func == "softmax":
        largest = max(logits)
        exponentials = [math.exp(z - largest) for z in logits]
        total = math.fsum(exponentials)
        return [x / total for x in exponentials]
    if scoring_func == "sqrtsoftplus":  # DeepSeek-V4
        return [math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))) for z in logits]
    raise ValueError(f"scoring_func={scoring_func!r} has no definition here: use sigmoid, softmax or sqrtsoftplus")


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def group_scores(ranked_by: Floats, config: MoEConfig) -> Floats:
    """The sum of the best biased scores of each group: as many of them as `group_score` says."""
    size, counted = config.experts_per_group, COUNTED[config.group_score_rule](config)
    members = [ranked_by[group * size : (group + 1) * size] for group in range(config.n_group)]
    return [math.fsum(sorted(values, reverse=True)[:counted]) for values in members]


def best(values: Floats, count: int) -> tuple[list[int], float]:
    """Places of the `count` largest, best first, ties to the lower place; and the gap to the first that is lost."""
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    gap = values[order[count - 1]] - values[order[count]] if count < len(order) else math.inf
    return order[:count], gap


def weigh(scores: Floats, experts: list[int], config: MoEConfig) -> dict[int, float]:
    """Unbiased scores of the chosen experts, normalised where the config says so, then scaled once."""
    kept = [scores[e] for e in experts]
    if config.score_after_topk:
        kept = score(kept, config.scoring_func)
    if config.norm_topk_prob and (len(experts) > 1 or config.norm_single_expert):
        total = math.fsum(kept) + config.norm_eps
        kept = [s / total for s in kept]
    return {e: s * config.routed_scaling_factor for e, s in zip(experts, kept, strict=True)}
