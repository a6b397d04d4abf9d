"""The second half of a layer for a handful of tokens: down projection, routing weights and sum in one launch.

Decoding waits for weights to stream past. A program has some columns of one token's result and walks over its K experts
in slot order, so nothing is stored between and no second launch waits for the first. Weights are asked for before those
that are there are multiplied. Products are added up element by element, and across the depth once, at the end: a sum
for each expert would be a barrier for each, which no load passes.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.triton.tile import even, load_bias, offsets, strided

# (columns, depth) of a program of 4 warps: up to 16 KiB of weights on their way, and the next 16. Columns that lie side
# by side are as many as a sector of memory holds; else the depth is such that no warp needs what another has loaded.
DEEP, BROAD = (8, 1024), (16, 512)


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
    columns, deepest = BROAD if matrix.stride(2) == 1 else DEEP
    block = min(deepest, triton.next_power_of_2(depth))
    _down_and_combine[(n_tokens, triton.cdiv(width, columns))](
        activated,
        expert_ids.contiguous(),
        weights,
        strided(matrix),
        strided(bias),
        out,
        n_experts,
        depth,
        width,
        k,
        STEPS=triton.cdiv(depth, block),
        OFFSETS=offsets(matrix),
        EVEN=even(depth, block) and even(width, columns),
        COLUMNS=columns,
        DEPTH=block,
        num_warps=max(1, columns * block // 2048),
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
    k,
    STEPS: tl.constexpr,
    OFFSETS: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * k
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.zeros((COLUMNS, DEPTH), dtype=tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    given = (a, ids, weights, matrices, bias, num_experts, depth, width)
    matrix, value, of_bias = _fetch(given, first, 0, column, STEPS, OFFSETS, EVEN, DEPTH)
    for step in range(1, k * STEPS):
        following = _fetch(given, first, step, column, STEPS, OFFSETS, EVEN, DEPTH)
        parts += matrix.to(tl.float32) * value
        total += of_bias
        matrix, value, of_bias = following
    total += of_bias + tl.sum(parts + matrix.to(tl.float32) * value, axis=1)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _fetch(
    given, first, step, column, STEPS: tl.constexpr, OFFSETS: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr
):
    """A part of one expert's columns [COLUMNS, DEPTH], what to multiply it with [1, DEPTH], and with the first part of
    an expert its weighed bias [COLUMNS]. Of no expert: zeros."""
    a, ids, weights, matrices, bias, num_experts, depth, width = given
    w, w_expert, w_depth, w_column = matrices
    assignment = first + step // STEPS
    expert = tl.load(ids + assignment).to(tl.int64)
    present = (expert >= 0) & (expert < num_experts)
    expert = tl.where(present, expert, 0)
    scale = tl.where(present, tl.load(weights + assignment).to(tl.float32), 0.0)
    at_depth = step % STEPS * DEPTH + tl.arange(0, DEPTH)
    # `&` with a scalar makes int32 in the interpreter of Triton 3.9, which is no mask; a limit of 0 says the same
    inside, there = column < width, at_depth < tl.where(present, depth, 0)
    at = w + expert * w_expert
    at += column.to(OFFSETS)[:, None] * w_column + at_depth.to(OFFSETS)[None, :] * w_depth
    matrix = tl.load(at, mask=there[None, :] if EVEN else inside[:, None] & there[None, :], other=0.0)
    value = tl.load(a + assignment * depth + at_depth[None, :], mask=there[None, :], other=0.0).to(tl.float32)
    of_bias = tl.zeros(column.shape, dtype=tl.float32)
    if bias is not None:
        weighed = present & (step % STEPS == 0)
        of_bias = tl.where(weighed, scale * load_bias(bias, expert, column, inside), 0.0)
    return matrix, scale * value, of_bias
