"""What the scores of a layer say about the choices of two traces: how near they were, and whether a rule gives them."""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.rule.derive import (
    bias_of,
    compare,
    derive,
    dtype_of,
    follows,
    logits_of,
    slices,
    weight_tolerance,
    weights_follow,
    why_not_derived,
)
from moesaic.trace.rule.margins import margin_between, rounding_bound
from moesaic.trace.store import Trace

OWN = 0.01  # of a trace's tokens may fail to follow from its own scores; with more, its rule is not the one it says
NOT_OWN = {"en": "its picks do not follow from its scores by its rule", "zh": "按它记录的规则，由分数推不出它的选择"}


class Finding(NamedTuple):
    """What the scores of one layer say, per token; None where they say nothing.

    why: for each trace why nothing can be derived from it, or None. Of first splits alone: tied: the other choice is
    one of exact ties; margins: how far scores were from it, the smaller of both; near: rounding explains that.
    broken: the picks of one do not follow from its scores by the other's rule. weights_broken: nor do its weights.
    weights_apart: relative differences of weights of tokens with equal sets and an equal past.
    """

    why: tuple[dict[str, str] | None, dict[str, str] | None]
    tied: Tensor
    margins: Tensor | None = None
    near: Tensor | None = None
    broken: Tensor | None = None
    weights_broken: Tensor | None = None
    weights_apart: Tensor | None = None


def explain_layer(a: Trace, b: Trace, layer: int, precision: torch.dtype, origins: Tensor) -> Finding:
    """What the scores of a layer say about the choices of both traces. `origins` [T]: where they first split."""
    finding = Finding((None, None), torch.zeros(len(a), dtype=torch.bool, device="cpu"))
    why = [why_not_derived(trace, layer) for trace in (a, b)]
    own = [None if reason else _against(trace, trace, layer) for reason, trace in zip(why, (a, b), strict=True)]
    same_rule = a.configs[layer] == b.configs[layer] and _equal(bias_of(a, layer), bias_of(b, layer))
    for side, (mine, other) in enumerate(((a, b), (b, a))):
        found = own[side]
        if found is None:
            continue
        if share_of(found[0]) > OWN:
            why[side] = NOT_OWN
            continue
        finding = _seen_from(finding, mine, other, layer, precision, origins.nonzero().flatten())
        if other.logits is None:
            continue
        strays, off = (same_rule and own[1 - side]) or _against(mine, other, layer)
        finding = finding._replace(broken=_either(finding.broken, strays))
        if off is not None and (found[1] is None or share_of(found[1]) <= OWN):  # else mine weighs by another rule
            finding = finding._replace(weights_broken=_either(finding.weights_broken, off))
    return finding._replace(why=(why[0], why[1]))


def share_of(marked: Tensor) -> float:
    """The share of tokens that are marked; 0 of none."""
    return float(marked.float().mean()) if len(marked) else 0.0


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and torch.equal(one, two))


def _seen_from(
    finding: Finding, mine: Trace, other: Trace, layer: int, precision: torch.dtype, rows: Tensor
) -> Finding:
    """Add how far the scores of a trace whose rule is known were from the other's choice, where the two differ."""
    config = mine.configs[layer]
    tied = torch.zeros(len(mine), dtype=torch.bool, device="cpu")
    near, margins = tied.clone(), torch.full((len(mine),), torch.nan, device="cpu")
    for here in slices(len(rows)):
        some = rows[here]
        target = other.picks[layer][some].long()
        derived = derive(logits_of(mine, layer, some), bias_of(mine, layer), config, target)
        margins[some] = margin_between(derived, target, config)
        near[some] = margins[some] <= rounding_bound(derived, config, precision)
        check = compare(derived, target, None, config)
        tied[some] = check.experts & check.tied
    return finding._replace(
        tied=finding.tied | tied,
        margins=margins if finding.margins is None else torch.fmin(finding.margins, margins),
        near=_either(finding.near, near),
    )


def _against(ruler: Trace, trace: Trace, layer: int) -> tuple[Tensor, Tensor | None]:
    """Tokens of `trace` whose picks do not follow from its own scores by the rule of `ruler`, by more than the scores'
    own rounding, and those whose weights do not, bool [T]; None where no weights were recorded."""
    config, bias = ruler.configs[layer], _bias_for(ruler, trace, layer)
    dtype = dtype_of(trace.dtypes.get("logits")) or torch.float32
    tolerance = weight_tolerance(dtype_of(trace.dtypes.get("weights")))

    def rounded(derived: dict[str, Tensor], target: Tensor, config: MoEConfig) -> Tensor:
        nan = derived["biased"].isnan().any(-1)
        return nan | (margin_between(derived, target, config) <= rounding_bound(derived, config, dtype))

    strays, off = [], []
    for here in slices(len(trace)):
        ids = trace.picks[layer][here].long()
        scores, _, _, allowed = follows(logits_of(trace, layer, here), ids, config, bias, rounded)
        whole = (ids < config.n_routed_experts).all(-1)  # the weight of the id E means nothing
        strays.append(~allowed & whole)
        if trace.weights is not None:
            fits = weights_follow(rules.weigh(scores, ids, config), trace.weights[layer][here], tolerance)
            off.append(whole & ~fits)
    return torch.cat(strays), torch.cat(off) if off else None


def _bias_for(mine: Trace, other: Trace, layer: int) -> Tensor | None:
    """The bias of my rule; in the other's narrower dtype where it only was cast down, which is rounding."""
    bias = bias_of(mine, layer)
    if bias is None or other.bias is None:
        return bias
    return other.bias[layer] if is_rounded(bias, other.bias[layer]) else bias


def is_rounded(one: Tensor, two: Tensor) -> bool:
    """One of two biases is the other cast to bfloat16 or float16."""
    narrow = (torch.bfloat16, torch.float16)
    return any(torch.equal(x.to(dtype).float(), y) for dtype in narrow for x, y in ((one, two), (two, one)))


def _either(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else before | now
