"""What explains that two traces chose different experts: rounding, other scores, or another rule."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.trace.compare.finding import Finding, is_rounded, share_of
from moesaic.trace.rule.derive import dtype_of
from moesaic.trace.shown import counted, listed, short_layers
from moesaic.trace.store import Trace

VERDICTS = ("identical", "near-ties", "different scores", "different rule", "cannot tell")
WIDE = 0.1  # of the flips may be wider than rounding allows: the bound is a multiple of it and not its limit
BROKEN = 0.1  # of the flips may break the other trace's rule
UNEVEN = 0.1  # of a layer's tokens have other weights for the same experts: then weights are made by another rule
RULE_FIELDS = (
    "scoring_func", "score_after_topk", "topk_method", "n_group", "topk_group", "group_score_rule", "group_mask",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip


class Judgement(NamedTuple):
    """A verdict with its reasons, each {"en": ..., "zh": ...}, the weightiest first."""

    verdict: str
    reasons: tuple[dict[str, str], ...]


def precision_of(a: Trace, b: Trace) -> tuple[torch.dtype, bool]:
    """The coarser dtype that the models of two traces may have run in, and whether that is an assumption.

    Logits of a router that computes in the model's dtype tell it; one that computes in float32 hides it.
    """
    told = [trace.configs[0].rule_is_known and trace.configs[0].router_dtype == "model" for trace in (a, b)]
    dtypes = [dtype_of(trace.dtypes.get("logits")) or torch.float32 for trace in (a, b)]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return (coarsest, False) if all(told) or coarsest is torch.bfloat16 else (torch.bfloat16, True)


def judge(
    findings: Sequence[Finding], found: dict[str, Any], a: Trace, b: Trace, precision: torch.dtype, assumed: bool
) -> Judgement:
    """The verdict of a Diff from what its layers showed. `found` holds its fields by name."""
    flips, origins, incomplete = found["flips"], found["origins"], found["incomplete"]
    if weights := _weights_rule(findings, precision):
        return Judgement("different rule", (weights, *_rule_differences(a, b)))
    if not flips.any():
        return _unflipped(incomplete, found["weight_differences"], _uneven(findings, a.layers, precision))
    if reasons := _broken_rule(findings, flips, a, b):
        return Judgement("different rule", reasons)
    if all(finding.near is None for finding in findings):
        return Judgement("cannot tell", _no_scores(findings))
    known = torch.stack([torch.full_like(flips[0], finding.near is not None) for finding in findings])
    seen = origins & known & ~found["ties"]
    near = torch.stack([torch.zeros_like(flips[0]) if f.near is None else f.near for f in findings])
    name = str(precision).removeprefix("torch.")
    if not (origins & known).any():
        text = "the first flips are in layers without scores: record both with detail='scores'"
        return Judgement("cannot tell", ({"en": text, "zh": "最先分歧的层没有记录分数：请用 detail='scores' 记录"},))
    wide, total = int((seen & ~near).sum()), int((origins & known).sum())
    assumption = {"en": " (assumed: routers compute in float32 whatever the model does)" if assumed else "",
                  "zh": "（假定：路由器总用 float32 计算，看不出模型的精度）" if assumed else ""}  # fmt: skip
    counts = {
        "en": f"{total - wide} of {total} first splits lie within the rounding of {name}{assumption['en']}",
        "zh": f"{total} 处最初分歧中有 {total - wide} 处在 {name} 的舍入误差之内{assumption['zh']}",
    }
    if wide <= WIDE * total:
        return Judgement("near-ties", (counts, *_rule_differences(a, b)))
    if any(finding.broken is not None for finding in findings):
        same = {
            "en": "one rule explains both choices, each from its own scores: weights, inputs or arithmetic differ",
            "zh": "同一规则由各自的分数解释了双方的选择：权重、输入或计算不同",
        }
        return Judgement("different scores", (same, counts))
    one = {
        "en": "or other scores: only one of the two recorded them, so this cannot be told apart",
        "zh": "也可能是分数不同：只有一方记录了分数，无法区分",
    }
    return Judgement("different rule", (counts, one, *_rule_differences(a, b)))


def _unflipped(incomplete: Tensor, weights: Tensor | None, uneven: dict[str, str] | None) -> Judgement:
    if uneven is not None:
        return Judgement("different scores", (uneven,))
    if count := int(incomplete.sum()):
        reason = {
            "en": f"{count} of {incomplete.numel()} (layer, token) pairs have fewer experts in one trace; "
            "all others are the same",
            "zh": f"{incomplete.numel()} 个（层，token）中有 {count} 个在一方的专家较少，其余相同",
        }
        return Judgement("cannot tell", (reason,))
    largest = None if weights is None else float(weights.max())
    reason = {"en": "every token has the same experts in every layer", "zh": "每个 token 在每一层的专家都相同"}
    if largest == 0:
        reason = {"en": f"{reason['en']}, with the same weights", "zh": f"{reason['zh']}，权重也相同"}
    elif largest is not None:
        reason = {
            "en": f"{reason['en']}; weights differ by at most {largest:.1e} of the largest",
            "zh": f"{reason['zh']}；权重最多相差最大权重的 {largest:.1e}",
        }
    return Judgement("identical", (reason,))


def _broken_rule(findings: Sequence[Finding], flips: Tensor, a: Trace, b: Trace) -> tuple[dict[str, str], ...]:
    checked = [(f.broken & flip, flip) for f, flip in zip(findings, flips, strict=True) if f.broken is not None]
    broken, total = sum(int(x.sum()) for x, _ in checked), sum(int(flip.sum()) for _, flip in checked)
    if not total or broken <= BROKEN * total:
        return ()
    reason = {
        "en": f"{broken} of {total} flips do not follow from the trace's own scores by the other's rule",
        "zh": f"{total} 处分歧中有 {broken} 处，由自己的分数按对方的规则推不出来",
    }
    return (reason, *_rule_differences(a, b))


def _weights_rule(findings: Sequence[Finding], precision: torch.dtype) -> dict[str, str] | None:
    """Weights that differ where experts and past are the same: by their own scores, or, where no rule gives those of
    one, by more than rounding. Judged layer by layer: a fault of one layer is a fault, however many are right."""
    off = [f.weights_broken for f in findings if f.weights_broken is not None]
    if (share := max(map(share_of, off), default=0.0)) > UNEVEN:
        return {
            "en": f"{100 * share:.0f} % of the weights of a layer do not follow from the trace's own scores by the "
            "other's rule",
            "zh": f"有一层 {100 * share:.0f}% 的权重，由自己的分数按对方的规则推不出来",
        }
    apart = [f.weights_apart for f in findings if f.weights_apart is not None and f.weights_broken is None]
    shares = [share_of(_beyond(layer, precision)) for layer in apart]
    if shares and max(shares) > UNEVEN:
        median = float(apart[shares.index(max(shares))].median())
        return {
            "en": f"weights of the same experts differ by {100 * median:.0f} % (median of the worst layer)",
            "zh": f"相同专家的权重相差 {100 * median:.0f}%（最差一层的中位数）",
        }
    return None


def _beyond(apart: Tensor, precision: torch.dtype) -> Tensor:
    """Relative differences of weights that rounding does not explain; a NaN on one side is infinitely far."""
    return apart > 16 * torch.finfo(precision).eps


def _uneven(findings: Sequence[Finding], layers: Sequence[str], precision: torch.dtype) -> dict[str, str] | None:
    """Weights that differ for some tokens with the same experts, too few to be a rule."""
    counts = [0 if f.weights_apart is None else int(_beyond(f.weights_apart, precision).sum()) for f in findings]
    if not any(counts):
        return None
    here = [name for name, count in zip(layers, counts, strict=True) if count]
    return {
        "en": f"the same experts everywhere, but the weights of {counted(sum(counts), '(layer, token) pair')} differ "
        f"by more than rounding, in {listed(here)}",
        "zh": f"专家处处相同，但有 {sum(counts)} 处权重相差超过舍入误差：{listed(here, 'zh')}",
    }


def _rule_differences(a: Trace, b: Trace) -> tuple[dict[str, str], ...]:
    """What the traces themselves say is different: fields of the rule, the correction bias."""
    out = []
    for layer, (one, two) in enumerate(zip(a.configs, b.configs, strict=True)):
        if not (one.rule_is_known and two.rule_is_known):
            continue
        unlike = [name for name in RULE_FIELDS if getattr(one, name) != getattr(two, name)]
        if unlike:
            told = [f"{name} {getattr(one, name)} / {getattr(two, name)}" for name in unlike]
            en, zh = (short_layers(a.layers, lang)[layer] for lang in ("en", "zh"))
            out.append({"en": f"{en}: {', '.join(told)}", "zh": f"{zh}：{'，'.join(told)}"})
            break
    if a.logits is None or b.logits is None:
        return tuple(out)
    if (a.bias is None) != (b.bias is None):
        out.append({"en": "a correction bias is recorded in one only", "zh": "只有一方记录了选择偏置"})
    elif a.bias is not None and b.bias is not None and not torch.equal(a.bias, b.bias):
        shut = a.bias.isneginf() != b.bias.isneginf()  # as a what-if leaves dropped experts
        if shut.any():
            names = " ".join(f"e{expert}" for expert in shut.any(0).nonzero().flatten().tolist())
            out.append({"en": f"never chosen in one of the two: {names}", "zh": f"只在一方从不选用：{names}"})
        apart = (a.bias - b.bias).abs().masked_fill(shut | a.bias.isneginf(), 0.0)
        if largest := float(apart.max()):
            cast = all(is_rounded(one, two) for one, two in zip(a.bias, b.bias, strict=True))
            en, zh = (", as much as a cast to 16 bits does", "，即转为 16 位的误差") if cast else ("", "")
            out.append({
                "en": f"correction biases differ by up to {largest:.3g}{en}",
                "zh": f"选择偏置最多相差 {largest:.3g}{zh}",
            })  # fmt: skip
    return tuple(out)


def _no_scores(findings: Sequence[Finding]) -> tuple[dict[str, str], ...]:
    names = ("a", "b")
    told = dict.fromkeys(
        (name, why["en"], why["zh"]) for f in findings for name, why in zip(names, f.why, strict=True) if why
    )
    return tuple({"en": f"trace {name}: {en}", "zh": f"记录 {name}：{zh}"} for name, en, zh in told)
