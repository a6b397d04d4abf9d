"""The second half of a layer for a handful of tokens: down projection, routing weights and sum in one launch.

Decoding waits for weights to stream past. A program has some columns of one token's result and walks over its K experts
in slot order, so nothing is stored between and no second launch waits for the first.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.triton.tile import even, load_bias, offsets, strided

COLUMNS, MOST_DEPTH = 16, 1024  # of a program: 32 KiB of weights on their way per expert


def down_and_combine(
    activated: Float[Tensor, "S I"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    matrix: Float[Tensor, "E I O"],
    bias: Float[Tensor, "E O"] | None,
) -> Float[Tensor, "T O"]:
    """sum over k of weights[t, k] * (activated[t * K + k] @ matrix[e] + bias[e]), where e is the expert of (t, k)."""
    (n_tokens, k), (n_experts, depth, width) = expert_ids.shape, matrix.shape
    out = activated.new_empty(n_tokens, width)
    block = min(MOST_DEPTH, triton.next_power_of_2(depth))
    _down_and_combine[(n_tokens, triton.cdiv(width, COLUMNS))](
        activated,
        expert_ids.contiguous(),
        weights,
        strided(matrix),
        strided(bias),
        out,
        n_experts,
        depth,
        width,
        K=k,
        OFFSETS=offsets(matrix),
        EVEN=even(depth, block) and even(width, COLUMNS),
        COLUMNS=COLUMNS,
        DEPTH=block,
        num_warps=8,
    )
    return out


@triton.jit
def _down_and_combine(
    a,
    ids,
    weights,
    matrices,
    bias,
    out,
    num_experts,
    depth,
    width,
    K: tl.constexpr,
    OFFSETS: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    w, w_expert, w_depth, w_column = matrices
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    steps = tl.arange(0, DEPTH)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(K):
        assignment = token * K + slot
        expert = tl.load(ids + assignment).to(tl.int64)
        present = (expert >= 0) & (expert < num_experts)
        expert = tl.where(present, expert, 0)  # no branch: loads of the next expert may overtake
        parts = tl.zeros((COLUMNS, DEPTH), dtype=tl.float32)
        for done in range(0, depth, DEPTH):
            at = w + expert * w_expert
            at += column.to(OFFSETS)[:, None] * w_column + (done + steps).to(OFFSETS)[None, :] * w_depth
            left = done + steps < depth
            if EVEN:
                matrix = tl.load(at).to(tl.float32)
            else:
                matrix = tl.load(at, mask=inside[:, None] & left[None, :], other=0.0).to(tl.float32)
            parts += (
                matrix * tl.load(a + assignment * depth + done + steps, mask=left, other=0.0).to(tl.float32)[None, :]
            )
        value = tl.sum(parts, axis=1)
        if bias is not None:
            value += load_bias(bias, expert, column, inside)
        scale = tl.load(weights + assignment).to(tl.float32)
        total += tl.where(present, scale * value, 0.0)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)
