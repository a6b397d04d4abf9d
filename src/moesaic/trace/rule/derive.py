"""Every stage of routing derived from recorded logits, and whether it leads to what was recorded."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.rule.margins import chosen, lead_of, same_experts
from moesaic.trace.rule.stages import BIAS_NOT_RECORDED, NOT_RECORDED, RULE_UNKNOWN
from moesaic.trace.store import Trace

SLICE = 8192  # tokens whose scores are derived at once: 8 MB of 256 experts


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name such as "bfloat16"; ValueError for a name that is none."""
    if name is None:
        return None
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {name!r} is not one of torch: use float32, bfloat16, float16 or float64")
    return dtype


def why_not_derived(trace: Trace, layer: int = 0) -> dict[str, str] | None:
    """Why the picks of a recorded layer cannot be derived, {"zh": ..., "en": ...}; None where they can."""
    if not trace.configs[layer].rule_is_known:
        return RULE_UNKNOWN
    if trace.logits is None:
        return NOT_RECORDED
    return BIAS_NOT_RECORDED if trace.configs[layer].has_correction_bias and trace.bias is None else None


def slices(n_tokens: int) -> Iterator[slice]:
    """Tokens in the pieces in which scores are derived: a record may be longer than memory."""
    return (slice(start, start + SLICE) for start in range(0, n_tokens, SLICE))


def logits_of(trace: Trace, layer: int, tokens: slice | Tensor = slice(None)) -> Tensor:
    """Recorded logits [T, E] of a layer, or of some of its tokens, in the dtype in which the model computed them."""
    assert trace.logits is not None
    return trace.logits[layer][tokens].to(dtype_of(trace.dtypes.get("logits")) or torch.float32)


def check_can_derive(trace: Trace, layer: int = 0) -> None:
    """ValueError, with the reason, where the picks of a recorded layer cannot be derived."""
    if reason := why_not_derived(trace, layer):
        what = {
            RULE_UNKNOWN["en"]: "give the trace a config that says how it routes",
            NOT_RECORDED["en"]: "the trace has picks only: record with detail='scores'",
            BIAS_NOT_RECORDED["en"]: "record again with detail='scores'",
        }[reason["en"]]
        subject = "logits were " if reason is NOT_RECORDED else ""
        raise ValueError(f"nothing can be derived for layer {trace.layers[layer]!r}: {subject}{reason['en']}; {what}")


def bias_of(trace: Trace, layer: int) -> Tensor | None:
    """The correction bias of a recorded layer, [E], or None."""
    return None if trace.bias is None else trace.bias[layer]


def follows(
    logits: Tensor,
    ids: Tensor,
    config: MoEConfig,
    bias: Tensor | None,
    tolerance: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which recorded ids [T, K] follow from logits by a rule: (scores [T, E], derived ids [T, K], same, allowed).

    same: the derived set is the recorded one, bool [T]. Derived ids are in the order of the record where it clearly
    leads, else in the rule's. allowed: the same, or it differs by exact ties only, or, where a `tolerance` is given, by
    what it allows: it is called with the stages of those tokens, their ids and the config.
    """
    scores = rules.score(logits, config).float()
    choice = scores if bias is None else scores + bias
    derived_ids, same = ids.clone(), lead_of(choice, ids, config) > 0
    allowed = same.clone()
    if len(rows := (~same).nonzero().flatten()):  # few: all the stages are derived for these alone
        derived = derive(logits[rows], bias, config, ids[rows], scores[rows])
        derived_ids[rows] = derived["derived_ids"]
        same[rows] = same_experts(ids[rows], derived_ids[rows])
        allowed[rows] = compare(derived, ids[rows], None, config).experts
        if tolerance is not None:
            allowed[rows] |= tolerance(derived, ids[rows], config)
    return scores, derived_ids, same, allowed


def derive(
    logits: Tensor, bias: Tensor | None, config: MoEConfig, expert_ids: Tensor, scores: Tensor | None = None
) -> dict[str, Tensor]:
    """All stages of `rules.route` by key, for logits [T, E] and the recorded ids [T, K]; `scores` where at hand."""
    scores = rules.score(logits, config).float() if scores is None else scores
    biased = scores if bias is None else scores + bias.cpu().float()
    out = {"logits": logits.float(), "scores": scores, "biased": biased, **limited(biased, config)}
    out["derived_ids"] = rules.select(biased, config)
    out["normalised"] = rules.weigh(scores, expert_ids, replace(config, routed_scaling_factor=1.0))
    out["scaled"] = rules.weigh(scores, expert_ids, config)
    return out


def limited(biased: Tensor, config: MoEConfig) -> dict[str, Tensor]:
    """The stages that keep some groups, by key, for biased scores [T, E]; without groups "masked" alone, the same."""
    if not config.limits_groups:
        return {"masked": biased}
    scores = rules.group_scores(biased, config)
    kept = rules.kept_groups(scores, config)
    mask = rules.expand_groups(kept, config)
    return {
        "grouped": biased.unflatten(-1, (config.n_group, config.experts_per_group)),
        "group_scores": scores,
        "group_mask": kept,
        "groups": kept.nonzero()[:, 1].view(len(biased), config.topk_group),
        "expert_mask": mask,
        "masked": biased.masked_fill(~mask, config.mask_fill),
    }


class Check(NamedTuple):
    """Whether the rule, given the recorded logits, allows what was recorded, per token, bool [T].

    experts: the ids are those of the rule, or differ only among scores that tie. tied: such a tie is there, so that
    another machine may choose otherwise. weights: the weights follow from the recorded ids; True where none were
    recorded.
    """

    experts: Tensor
    weights: Tensor
    tied: Tensor


def compare(
    derived: dict[str, Tensor], expert_ids: Tensor, weights: Tensor | None, config: MoEConfig, tolerance: float = 1e-6
) -> Check:
    """Recorded ids and weights against the derived ones; `tolerance` is relative to the row's largest weight.

    Scores tie that differ by less than 4 units in the last place of float32: the vector and the scalar code of one
    machine differ by that much.
    """
    same = same_experts(expert_ids, derived["derived_ids"])
    tied = _margin_is_nil(derived["masked"], config.num_experts_per_tok)
    if "group_scores" in derived:
        tied |= _margin_is_nil(derived["group_scores"], config.topk_group)
    experts = same.clone()
    if len(rows := (tied & ~same).nonzero().flatten()):
        ranked = {name: derived[name][rows] for name in ("biased", "group_scores") if name in derived}
        experts[rows] = _allowed_by_ties(ranked, expert_ids[rows], config)
    if weights is None:
        return Check(experts, torch.ones_like(experts), tied)
    return Check(experts, weights_follow(derived["scaled"], weights, tolerance), tied)


def weights_follow(expected: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    """Whether weights [T, K] are the expected ones, bool [T]; `tolerance` is relative to the row's largest."""
    expected = expected.float()
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    close = ((weights - expected).abs() <= tolerance * scale) | (weights.isnan() & expected.isnan())
    return close.all(-1)


def _allowed_by_ties(derived: dict[str, Tensor], expert_ids: Tensor, config: MoEConfig) -> Tensor:
    """Ids that some order of tied scores gives, bool [T]: none better left out, none worse taken in."""
    biased, taken = derived["biased"], chosen(expert_ids, config.n_routed_experts)
    if "group_scores" not in derived:
        return _could_be_best(biased, taken, config.num_experts_per_tok)
    by_group = (-1, (config.n_group, config.experts_per_group))
    least, slack = _least_kept(derived["group_scores"], config.topk_group)
    reached = taken.unflatten(*by_group).any(-1)
    opened = reached | (derived["group_scores"] > least + slack)
    lawful = (~reached | (derived["group_scores"] >= least - slack)).all(-1)
    # groups kept but not reached must be tied ones without a better expert than the worst taken
    worst = biased.masked_fill(~taken, torch.inf).amin(-1, keepdim=True)
    tied = (derived["group_scores"] >= least - slack) & ~opened
    idle = tied & (biased.unflatten(*by_group).amax(-1) <= worst + slack)
    fits = (opened.sum(-1) <= config.topk_group) & (opened.sum(-1) + idle.sum(-1) >= config.topk_group)
    masked = biased.masked_fill(~rules.expand_groups(opened, config), config.mask_fill)
    return lawful & fits & _could_be_best(masked, taken, config.num_experts_per_tok)


def _could_be_best(values: Tensor, taken: Tensor, k: int) -> Tensor:
    least, slack = _least_kept(values, k)
    fair = torch.where(taken, values >= least - slack, values <= least + slack)
    return fair.all(-1) & (taken.sum(-1) == k)


def _least_kept(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest of each row, [T, 1], and by how much another may differ and still tie with it."""
    least = values.nan_to_num(nan=torch.inf).topk(k, dim=-1).values[:, -1:]
    return least, _slack(least)


def _slack(least: Tensor) -> Tensor:
    return 4 * 2.0**-23 * least.abs().clamp(min=torch.finfo(torch.float32).tiny)


def _margin_is_nil(values: Tensor, k: int) -> Tensor:
    if k >= values.shape[-1]:
        return torch.zeros(len(values), dtype=torch.bool, device="cpu")
    best = values.nan_to_num(nan=torch.inf).topk(k + 1, dim=-1).values
    least, best_left = best[:, -2], best[:, -1]
    return (least - best_left <= _slack(least)) & best_left.isfinite()


def weight_tolerance(dtype: torch.dtype | None) -> float:
    """How far derived weights may lie from recorded ones, relative to the largest: 1e-6, or two units of the dtype."""
    return max(1e-6, 2 * torch.finfo(dtype or torch.float32).eps)
