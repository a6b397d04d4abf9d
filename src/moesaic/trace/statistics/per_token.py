"""Numbers of single tokens whose mean or median is a statistic of a layer. Whatever cannot be known is None."""

import numpy as np
import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import overlap
from moesaic.trace.rule.derive import bias_of, derive, logits_of, slices, why_not_derived
from moesaic.trace.rule.margins import lead_of, same_experts
from moesaic.trace.slots import twice
from moesaic.trace.store import Trace

TINY = np.finfo(np.float32).tiny
AGREE = 0.99  # of the tokens must be derived as recorded; else the rule is not the one that chose


def routed(trace: Trace, layer: int) -> np.ndarray:
    """True for tokens that have an expert, bool [T]."""
    return np.any(trace.picks[layer].numpy() < trace.n_experts, axis=-1)


def overlap_of(trace: Trace, layer: int) -> np.ndarray:
    """How many experts of each token plain top-k of the unbiased scores, which must be known, would take too, [T]."""
    config, ids, found = trace.configs[layer], trace.picks[layer].long(), [np.zeros(0)]
    for here in slices(len(ids)):
        found.append(_among_best(rules.score(logits_of(trace, layer, here), config), ids[here]))
    return np.concatenate(found)


def _among_best(scores: Tensor, ids: Tensor) -> np.ndarray:
    """How many of the ids [T, K] are among the K experts of the largest scores, [T]; ranked only where scores tie."""
    n_experts, k = scores.shape[-1], ids.shape[-1]
    parted = np.partition(scores.float().numpy(), n_experts - k, axis=-1)
    least, best_left = parted[:, n_experts - k], parted[:, : n_experts - k].max(-1, initial=-np.inf)
    worse = scores.float().gather(-1, ids.clamp(max=n_experts - 1)).numpy() < least[:, None]  # a NaN is not: it is best
    found = (~worse & (ids.numpy() < n_experts)).sum(-1).astype(float)
    rows = np.flatnonzero(~(least > best_left))
    found[rows] = overlap(ids.numpy()[rows], rules.largest(scores[rows], k).numpy())
    return found


def margins_of(trace: Trace, layer: int) -> np.ndarray | None:
    """By how much the last expert chosen beats the best one left, in masked biased scores, [T].

    None where scores or rule are not known, no expert is left, or the rule does not lead to the recorded picks.
    """
    config = trace.configs[layer]
    k, open_experts = config.num_experts_per_tok, _open_experts(config)
    if why_not_derived(trace, layer) or k >= open_experts or config.topk_method == "balanced":
        return None
    ids, bias = trace.picks[layer].long(), bias_of(trace, layer)
    repeat = torch.from_numpy(twice(trace.picks[layer].numpy(), trace.n_experts))
    margins, same = [np.zeros(0)], 0
    for here in slices(len(ids)):
        logits, some = logits_of(trace, layer, here), ids[here]
        scores = rules.score(logits, config).float()
        lead = lead_of(scores if bias is None else scores + bias, some, config)
        rows = (~(lead > 0) | repeat[here]).nonzero().flatten()
        derived = derive(logits[rows], bias, config, some[rows], scores[rows])
        best = derived["masked"].topk(k + 1, dim=-1).values.double()
        lead[rows] = best[:, k - 1] - best[:, k]
        margins.append(lead.numpy())
        same += len(some) - len(rows) + int(same_experts(some[rows], derived["derived_ids"]).sum())
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
