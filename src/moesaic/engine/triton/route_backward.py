"""The gradient of the logits from that of the routing weights, one program a token."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.route_op import RouteSpec
from moesaic.engine.triton.weigh import nobody_beyond, score_of, softmax_terms, warps, weigh, weighing


def backward(
    grad_weights: Float[Tensor, "T K"], logits: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"], spec: RouteSpec
) -> Float[Tensor, "T E"]:
    """The gradient of the logits, in their dtype."""
    n_tokens, n_experts = logits.shape
    grad_logits = torch.empty(n_tokens, n_experts, dtype=logits.dtype, device=logits.device)
    if n_tokens:
        with torch.cuda.device_of(logits):
            _route_backward[(n_tokens,)](
                grad_weights.contiguous(),
                logits,
                *logits.stride(),
                expert_ids.contiguous(),
                grad_logits,
                spec.eps,
                spec.scale,
                EXPERTS=n_experts,
                PADDED_EXPERTS=triton.next_power_of_2(n_experts),
                **weighing(spec),
                num_warps=warps(n_experts),
            )
    return grad_logits


@triton.jit
def _route_backward(
    grad_weights,
    logits,
    row_stride,
    column_stride,
    expert_ids,
    grad_logits,
    eps,
    scale,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    SCORING: tl.constexpr,
    AFTER: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    slot = tl.arange(0, SLOTS)
    expert = tl.arange(0, PADDED_EXPERTS)
    chosen = nobody_beyond(tl.load(expert_ids + token * K + slot, mask=slot < K, other=EXPERTS), EXPERTS)
    grad = tl.load(grad_weights + token * K + slot, mask=slot < K, other=0.0).to(tl.float32)
    everyone = tl.load(row + expert.to(tl.int64) * column_stride, mask=expert < EXPERTS, other=-float("inf"))
    everyone = everyone.to(tl.float32)
    highest, total = 0.0, 1.0
    if SCORING == "softmax" and not AFTER:
        highest, total = softmax_terms(everyone)
    present = chosen < EXPERTS
    x, score, divisor = weigh(row, column_stride, chosen, present, slot, highest, total, eps, K, SCORING, AFTER, NORM)
    grad = tl.where(present, grad * scale, 0.0)  # of the shares, then of the scores; what the absent get lands nowhere
    if NORM:
        share = tl.div_rn(score, divisor)
        grad = tl.div_rn(grad - tl.sum(grad * share, axis=0), divisor)
    if SCORING == "softmax":
        mean = tl.sum(grad * score, axis=0)
        if AFTER:
            result = _spread(score * (grad - mean), chosen, expert, slot, K)
        else:
            result = score_of(everyone, highest, total, SCORING) * (_spread(grad, chosen, expert, slot, K) - mean)
    else:
        result = _spread(grad * _slope(x, score, SCORING), chosen, expert, slot, K)
    place = token * EXPERTS + expert
    tl.store(grad_logits + place, result.to(grad_logits.dtype.element_ty), mask=expert < EXPERTS)


@triton.jit
def _slope(x, score, SCORING: tl.constexpr):
    """The derivative of `score_of` for those functions in which each expert stands for itself."""
    if SCORING == "sigmoid":
        slope = score * (1.0 - score)
    else:
        slope = tl.sigmoid(x) / (2.0 * score)  # at most 1e-19 where the score is clamped, and there it ought to be 0
    return slope


@triton.jit
def _spread(values, chosen, expert, slot, K: tl.constexpr):
    """A row over all experts with the K values at the chosen ones, added where a replay names an expert twice."""
    spread = tl.zeros(expert.shape, tl.float32)
    for k in range(K):
        here = tl.sum(tl.where(slot == k, chosen, 0), axis=0)
        spread += tl.where(expert == here, tl.sum(tl.where(slot == k, values, 0.0), axis=0), 0.0)
    return spread
