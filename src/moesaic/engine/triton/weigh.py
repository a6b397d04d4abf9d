"""From logits to scores, and from the chosen experts' scores to their weights: what routing and its gradient share."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from moesaic.engine.route_op import RouteSpec
from moesaic.engine.triton.tile import INTERPRETED

LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
TINY = tl.constexpr(float(torch.finfo(torch.float32).tiny))


def warps(n_experts: int) -> int:
    """One up to 512 experts, so that nothing waits at a barrier; then one for each 512."""
    return min(8, max(1, triton.next_power_of_2(n_experts) // 512))


def weighing(spec: RouteSpec) -> dict[str, int | str | bool]:
    """What `weigh` takes, for a kernel that calls it."""
    return {
        "K": spec.k,
        "SLOTS": triton.next_power_of_2(spec.k),
        "SCORING": spec.scoring_func,
        "AFTER": spec.score_after_topk,
        "NORM": spec.norm,
    }


@triton.jit
def softmax_terms(x):
    """(what to subtract, what to divide by) for the softmax of a whole row."""
    highest = tl.max(x)
    return highest, tl.sum(_exp(x - highest))


@triton.jit
def _exp(x):
    """As exact as torch's own: Triton's is two steps faster and some last bits off, enough to change near ties."""
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)


@triton.jit
def score_of(x, highest, total, SCORING: tl.constexpr):
    if SCORING == "sigmoid":
        score = tl.div_rn(1.0, 1.0 + _exp(-x))
    elif SCORING == "softmax":
        score = tl.div_rn(_exp(x - highest), total)
    else:
        softplus = _softplus(x)
        score = tl.sqrt(tl.where(softplus < TINY, TINY, softplus))  # not tl.maximum, which loses NaN
    return score


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact to the last bits where exp(x) is small: the error of 1 + u cancels (Kahan)."""
    u = _exp(-tl.abs(x))
    w = 1.0 + u
    return tl.where(x > 0.0, x, 0.0) + tl.where(w == 1.0, u, tl.div_rn(tl.log(w) * u, w - 1.0))


@triton.jit
def nobody_beyond(ids, EXPERTS: tl.constexpr):
    """ids as int32, E for all that name no expert: of an id that is cut to 32 bits nobody knows what it named."""
    return tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS).to(tl.int32)


@triton.jit
def weigh(
    row,
    column_stride,
    chosen,
    present,
    slot,
    highest,
    total,
    eps,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    AFTER: tl.constexpr,
    NORM: tl.constexpr,
):
    """(logits, scores, what the scores are divided by) of the chosen experts: what `rules.weigh` does before scaling.

    Logits are read again, now that they are in the cache: finding each among the registers of a warp costs more.
    """
    x = tl.load(row + chosen.to(tl.int64) * column_stride, mask=present, other=0.0).to(tl.float32)
    if SCORING == "softmax" and AFTER:
        highest, total = softmax_terms(tl.where(present, x, tl.where(slot < K, LOWEST, -float("inf"))))
    score = tl.where(present, score_of(x, highest, total, SCORING), 0.0)
    divisor = 1.0
    if NORM:
        divisor = 0.0
        for k in range(K):  # in the order of the slots, as TileKernels does
            divisor += tl.sum(tl.where(slot == k, score, 0.0), axis=0)
        anybody = tl.max(present.to(tl.int32), axis=0)
        divisor = tl.where(anybody != 0, divisor + eps, 1.0)
    return x, score, divisor
