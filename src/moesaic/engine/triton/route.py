"""Routing in one kernel, one program a token. Twin of `rules.route`; `route_backward` has the gradient.

A row of logits stays in the registers of one warp, laid out [groups, experts of a group], both padded to powers of two;
where nothing needs the whole row (a replay of sigmoid scores, its gradient) the compiler drops the load.
What is ranked are int32 keys that order as the float32 scores do: integer maxima over a warp are one instruction each.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.engine.route_op import RouteSpec
from moesaic.engine.triton.route_backward import backward
from moesaic.engine.triton.weigh import nobody_beyond, score_of, softmax_terms, warps, weigh, weighing
from moesaic.types import Routing

__all__ = ["backward", "forward", "route"]

INFINITY = tl.constexpr(0x7F800000)  # the keys of +inf and -inf
MINUS_INFINITY = tl.constexpr(-0x7F800001)
TAKEN = tl.constexpr(-0x80000000)  # below the key of every float: chosen already, masked out, or padding


def route(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, " E"] | None,
    config: MoEConfig,
    *,
    replay: Int[Tensor, "..."] | None = None,
) -> Routing:
    """`rules.route` with scores in float32, for what `route_op.serves`. Without a gradient: `route_op` gives it one."""
    return Routing(logits, *forward(logits, bias, replay, RouteSpec.of(config)))


def forward(
    logits: Float[Tensor, "T E"], bias: Float[Tensor, " E"] | None, replay: Int[Tensor, "T K"] | None, spec: RouteSpec
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """(weights, expert ids), best expert first, or those of `replay`."""
    n_tokens, n_experts = logits.shape
    weights = torch.empty(n_tokens, spec.k, dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty(n_tokens, spec.k, dtype=torch.int64, device=logits.device)
    if n_tokens:
        with torch.cuda.device_of(logits):
            _route[(n_tokens,)](
                logits,
                *logits.stride(),
                None if bias is None else bias.contiguous(),
                None if replay is None else replay.contiguous(),
                weights,
                expert_ids,
                spec.eps,
                spec.scale,
                EXPERTS=n_experts,
                GROUPS=spec.n_group,
                PADDED_GROUPS=triton.next_power_of_2(spec.n_group),
                PADDED_MEMBERS=triton.next_power_of_2(n_experts // spec.n_group),
                KEPT=spec.topk_group,
                COUNTED=spec.counted,
                ZERO_MASK=spec.zero_mask,
                **weighing(spec),
                num_warps=warps(n_experts),
            )
    return weights, expert_ids


@triton.jit
def _route(
    logits,
    row_stride,
    column_stride,
    bias,
    replay,
    weights,
    expert_ids,
    eps,
    scale,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_MEMBERS: tl.constexpr,
    KEPT: tl.constexpr,
    COUNTED: tl.constexpr,
    ZERO_MASK: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    SCORING: tl.constexpr,
    AFTER: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    slot = tl.arange(0, SLOTS)
    group = tl.arange(0, PADDED_GROUPS)
    member = tl.arange(0, PADDED_MEMBERS)
    expert = group[:, None] * (EXPERTS // GROUPS) + member[None, :]
    real = (group < GROUPS)[:, None] & (member < EXPERTS // GROUPS)[None, :]
    x = tl.load(row + expert.to(tl.int64) * column_stride, mask=real, other=-float("inf")).to(tl.float32)
    highest, total = 0.0, 1.0
    if SCORING == "softmax" and not AFTER:
        highest, total = softmax_terms(x)
    if replay is None:
        choice = x
        if not AFTER:
            choice = score_of(x, highest, total, SCORING)
        if bias is not None:
            choice += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
        key = tl.where(real, _key(choice), TAKEN)
        if GROUPS > 1:
            inside = _best_groups(key, group, member, GROUPS, KEPT, COUNTED)
            key = tl.where(inside[:, None] | ~real, key, 0 if ZERO_MASK else TAKEN)
        chosen = _best(key, expert, slot, EXPERTS, K)
        asked = chosen.to(tl.int64)
    else:
        asked = tl.load(replay + token * K + slot, mask=slot < K, other=EXPERTS).to(tl.int64)
        chosen = nobody_beyond(asked, EXPERTS)
    present = chosen < EXPERTS
    _x, score, divisor = weigh(row, column_stride, chosen, present, slot, highest, total, eps, K, SCORING, AFTER, NORM)
    place = token * K + slot
    tl.store(weights + place, tl.div_rn(score, divisor) * scale, mask=slot < K)
    tl.store(expert_ids + place, asked, mask=slot < K)


@triton.jit
def _key(value):
    """The order of float32 as int32: -0.0 is 0.0, any NaN is +inf. `_value` is its inverse."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == TAKEN, 0, bits)  # -0.0 has the bits of the lowest integer
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards as integers
    return tl.where((bits > INFINITY) | (bits < MINUS_INFINITY), INFINITY, bits)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_groups(key, group, member, GROUPS: tl.constexpr, KEPT: tl.constexpr, COUNTED: tl.constexpr):
    """True for the KEPT groups whose COUNTED best scores, added best first, make the largest sums; and for padding."""
    best = tl.max(key, axis=1)
    score = _value(best)
    for _ in tl.static_range(COUNTED - 1):
        first = tl.min(tl.where(key == best[:, None], member[None, :], key.shape[1]), axis=1)
        key = tl.where(member[None, :] == first[:, None], TAKEN, key)
        best = tl.max(key, axis=1)
        score += _value(best)
    key = tl.where(group < GROUPS, _key(score), TAKEN)
    for _ in tl.static_range(KEPT):
        first = tl.min(tl.where(key == tl.max(key, axis=0), group, GROUPS), axis=0)
        key = tl.where(group == first, TAKEN, key)
    return key == TAKEN


@triton.jit
def _best(key, expert, slot, EXPERTS: tl.constexpr, K: tl.constexpr):
    """The experts with the K largest keys, one to a slot, best first; the lower one of equals."""
    chosen = tl.full(slot.shape, EXPERTS, tl.int32)
    for k in range(K):
        first = tl.min(tl.where(key == tl.max(key), expert, EXPERTS))
        chosen = tl.where(slot == k, first, chosen)
        key = tl.where(expert == first, TAKEN, key)
    return chosen
