"""One layer of a record routed again by another rule, some tokens at a time: a record may be longer than memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.rule.derive import bias_of, dtype_of, follows, limited, logits_of, slices
from moesaic.trace.rule.margins import same_experts
from moesaic.trace.store import Trace


class Rerouted(NamedTuple):
    """A layer by another rule, or some tokens of it. flipped: tokens that would get other experts. tied: those whose
    record differs from the recorded rule's choice by exact ties only; astray: by more; empty: that have no experts.
    left: from how many experts each could choose. scores: summed unbiased ones of the recorded choice and of the other,
    float64 [pieces, 2], tokens with NaN left out.
    """

    ids: Tensor
    weights: Tensor
    flipped: Tensor
    tied: Tensor
    astray: Tensor
    empty: Tensor
    left: Tensor
    scores: Tensor


def reroute(trace: Trace, layer: int, config: MoEConfig, bias: Tensor | None, *, anyway: bool) -> Rerouted:
    """A layer by the rule of `config` and `bias`. ValueError where the recorded rule does not give the recorded picks,
    unless `anyway`, and where too few experts are left to choose from."""
    pieces = [_piece(trace, layer, here, config, bias) for here in slices(len(trace))]
    whole = Rerouted(*map(torch.cat, zip(*pieces, strict=True)))
    if not anyway:
        _check_reproduced(trace, layer, whole.astray)
    k, short = config.num_experts_per_tok, (whole.left < config.num_experts_per_tok) & ~whole.empty
    if short.any():
        raise ValueError(
            f"too few experts are left for num_experts_per_tok={k}: {int(short.sum())} tokens of layer "
            f"{trace.layers[layer]!r} have as few as {int(whole.left[short].min())} experts in their groups: drop "
            "fewer, keep more groups or use a smaller k"
        )
    return whole


def _check_reproduced(trace: Trace, layer: int, astray: Tensor) -> None:
    if not astray.any():
        return
    n, first = int(astray.sum()), int(astray.nonzero()[0])
    partly = bool(((trace.picks[layer] >= trace.n_experts).any(-1) & astray).any())
    why = "experts are missing there" if partly else "the recorded rule is not this one"
    raise ValueError(
        f"layer {trace.layers[layer]!r}: unchanged settings do not give the recorded picks of {n} of {len(trace)} "
        f"tokens, such as token {first}: {why}; correct the trace's configs, or ask anyway (anyway=True, --anyway)"
    )


def _piece(trace: Trace, layer: int, here: slice, config: MoEConfig, bias: Tensor | None) -> Rerouted:
    """Where nobody flipped, the record stays as it is."""
    logits, recorded, own = logits_of(trace, layer, here), trace.picks[layer][here].long(), trace.configs[layer]
    scores, derived_ids, same, allowed = follows(logits, recorded, own, bias_of(trace, layer))
    empty = (recorded >= own.n_routed_experts).all(-1)
    tied = allowed & ~same & ~empty
    ids, left = _choose(logits, config, bias)
    ids = ids.masked_fill(empty[:, None], config.n_routed_experts)
    one_size, flipped = ids.shape == recorded.shape, ~empty
    if one_size:
        base = torch.where(tied[:, None], derived_ids, recorded)  # a tie may fall as it fell: that is no flip
        flipped = ~same_experts(ids, base)
        ids = torch.where(flipped[:, None], ids, recorded)
    weights = rules.weigh(rules.score(logits, config), ids, config)  # narrow where the model weighs in its own dtype
    weights = weights.to(dtype_of(trace.dtypes.get("weights")) or torch.float32).float()
    if one_size and trace.weights is not None:
        weights = torch.where(flipped[:, None], weights, trace.weights[layer][here])
    sums = _summed_scores(scores, own, recorded, ids)
    ids, left = (numbers.to(trace.picks.dtype) for numbers in (ids, left))
    return Rerouted(ids, weights, flipped, tied, ~allowed & ~empty, empty, left, sums)


def _choose(logits: Tensor, config: MoEConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids [n, K] by a rule, and from how many experts each token could choose, [n]."""
    scores = rules.score(logits, config).float()
    biased = scores if bias is None else scores + bias
    if bias is None or not bias.isneginf().any():
        return rules.select(biased, config), torch.full((len(logits),), config.n_routed_experts, device="cpu")
    masked = limited(biased, config)["masked"]
    masked = masked.masked_fill(bias.isneginf(), -torch.inf)  # the mask "zero" would bring dropped experts back
    return rules.largest(masked, config.num_experts_per_tok), (masked != -torch.inf).sum(-1)


def _summed_scores(scores: Tensor, config: MoEConfig, *choices: Tensor) -> Tensor:
    affinity = scores.softmax(-1) if config.score_after_topk else scores
    fine = ~scores.isnan().any(-1, keepdim=True)
    taken = ((ids.clamp(max=scores.shape[1] - 1), fine & (ids < scores.shape[1])) for ids in choices)
    return torch.stack([torch.where(there, affinity.gather(-1, ids), 0.0).double().sum() for ids, there in taken])[None]
