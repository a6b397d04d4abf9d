"""Numbers of single tokens whose mean or median is a statistic of a layer. Whatever cannot be known is None."""

import numpy as np

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import overlap
from moesaic.trace.rule.derive import bias_of, derive, logits_of, slices, why_not_derived
from moesaic.trace.rule.margins import same_experts
from moesaic.trace.store import Trace

TINY = np.finfo(np.float32).tiny
AGREE = 0.99  # of the tokens must be derived as recorded; else the rule is not the one that chose


def routed(trace: Trace, layer: int) -> np.ndarray:
    """True for tokens that have an expert, bool [T]."""
    return np.any(trace.picks[layer].numpy() < trace.n_experts, axis=-1)


def overlap_of(trace: Trace, layer: int) -> np.ndarray:
    """How many experts of each token plain top-k of the unbiased scores, which must be known, would take too, [T]."""
    config = trace.configs[layer]
    picks = trace.picks[layer].numpy()
    parts = [
        overlap(
            picks[here],
            rules.largest(rules.score(logits_of(trace, layer, here), config), config.num_experts_per_tok).numpy(),
        )
        for here in slices(len(picks))
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def margins_of(trace: Trace, layer: int) -> np.ndarray | None:
    """By how much the last expert chosen beats the best one left, in masked biased scores, [T].

    None where scores or rule are not known, no expert is left, or the rule does not lead to the recorded picks.
    """
    config = trace.configs[layer]
    k, open_experts = config.num_experts_per_tok, _open_experts(config)
    if why_not_derived(trace, layer) or k >= open_experts or config.topk_method == "balanced":
        return None
    ids = trace.picks[layer].long()
    bias = bias_of(trace, layer)
    margins, same = [np.zeros(0)], 0
    for here in slices(len(ids)):
        derived = derive(logits_of(trace, layer, here), bias, config, ids[here])
        best = derived["masked"].topk(k + 1, dim=-1).values.double()
        margins.append((best[:, k - 1] - best[:, k]).numpy())
        same += int(same_experts(ids[here], derived["derived_ids"]).sum())
    return np.concatenate(margins) if same >= AGREE * len(ids) else None


def weight_entropy_of(trace: Trace, layer: int) -> np.ndarray | None:
    """Entropy of each token's combine weights over log K, [T]: 1 where all are equal, 0 where one has it all.

    None without weights and for K = 1; NaN for a token without positive weights.
    """
    k = trace.top_k
    if trace.weights is None or k < 2:
        return None
    weights = trace.weights[layer].numpy()
    absent = trace.picks[layer].numpy() >= trace.n_experts
    if absent.any():
        weights = np.where(absent, np.float32(0), weights)
    ones = np.ones(k, np.float32)  # a product with ones sums short rows 5x as fast as sum(-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        total = weights @ ones
        entropy = np.log(total) - (weights * np.log(np.maximum(weights, TINY))) @ ones / total
    fine = np.isfinite(total) & (total > 0) & (weights.min(-1) >= 0)
    return np.where(fine, entropy / np.log(k), np.nan)


def _open_experts(config: MoEConfig) -> int:
    if config.limits_groups and config.group_mask == "-inf":
        return config.topk_group * config.experts_per_group
    return config.n_routed_experts
