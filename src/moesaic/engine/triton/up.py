"""The up projection: rows gathered while they are loaded, gate and up in two accumulators, activation in registers."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.activation import activate
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import (
    dot,
    even,
    halves,
    load_tile,
    offsets,
    place,
    precision,
    strides,
    tile_rows,
    tokens_of,
    unzipped,
)
from moesaic.types import ExpertWeights


class Projected(NamedTuple):
    """hidden [S, U]: the projections of every row.  activated [S, I]: what the activation makes of them. None where it
    was not to be kept; rows of no expert are not written."""

    hidden: Any
    activated: Any


def up(
    tokens: Float[Tensor, "T D"],
    k: int,
    layout: Layout,
    experts: ExpertWeights,
    spec: ExpertSpec,
    blocks: Blocks,
    *,
    keep_hidden: bool,
    keep_activated: bool = True,
) -> Projected:
    """A tensor that is not to be kept is not made."""
    n, d = k * len(tokens), tokens.shape[1]
    u = spec.up_size(experts)
    i = u // 2 if spec.gated else u
    hidden = tokens.new_empty(n, u) if keep_hidden else None
    activated = tokens.new_empty(n, i) if keep_activated else None
    matrix = experts.up if spec.transposed else experts.up.mT  # [E, D, U]
    tiles = len(layout.expert_of_tile)
    _up[(tiles * triton.cdiv(i, blocks.columns),)](
        tokens,
        k,
        *layout.pointers,
        matrix,
        *matrix.stride(),
        experts.up_bias,
        *strides(experts.up_bias, 2),
        hidden,
        activated,
        tiles,
        len(matrix),
        d,
        i,
        SORTED=layout.sorted,
        ACTIVATION=spec.activation,
        GATED=spec.gated,
        INTERLEAVED=spec.gated and spec.interleaved,
        LIMIT=spec.limit,
        ALPHA=spec.alpha,
        OFFSET=spec.up_offset,
        PRECISION=precision(tokens.dtype),
        OFFSETS=offsets(matrix),
        EVEN_DEPTH=even(d, blocks.depth),
        EVEN=even(d, blocks.depth) and even(i, blocks.columns),
        **blocks.arguments,
    )
    return Projected(hidden, activated)


@triton.jit(do_not_specialize=["tiles"])
def _up(
    x,
    k,
    expert_of_tile,
    start_of_tile,
    ends,
    token_of,
    w,
    w_expert,
    w_depth,
    w_column,
    bias,
    bias_expert,
    bias_column,
    hidden,
    activated,
    tiles,
    num_experts,
    depth,
    width,
    SORTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSETS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # a pair of gate and up is two columns that are apart, each with its accumulator, or neighbours in one accumulator
    APART: tl.constexpr = GATED and not INTERLEAVED
    ACROSS: tl.constexpr = 2 * COLUMNS if INTERLEAVED else COLUMNS
    across = 2 * width if INTERLEAVED else width

    tile, block = place(tl.program_id(0), tiles, tl.cdiv(width, COLUMNS), GROUP)
    expert, start, stop = tile_rows(tile, expert_of_tile, start_of_tile, ends, num_experts, SORTED)
    if (expert < 0) | (expert >= num_experts):
        return
    rows = start + tl.arange(0, ROWS)
    valid = rows < stop
    token = tokens_of(rows, valid, token_of, k, SORTED)
    column = block * ACROSS + tl.arange(0, ACROSS)
    inside = column < across

    steps = tl.arange(0, DEPTH)
    x_tile = x + token[:, None] * depth + steps[None, :]
    w += expert.to(tl.int64) * w_expert
    ahead = tl.full((), DEPTH, OFFSETS) * w_depth
    w_steps = steps.to(OFFSETS)[:, None] * w_depth
    gate_tile = w + (w_steps + column.to(OFFSETS)[None, :] * w_column)
    up_tile = w + (w_steps + (column + width).to(OFFSETS)[None, :] * w_column)
    gate = tl.zeros((ROWS, ACROSS), dtype=tl.float32)
    up = tl.zeros((ROWS, ACROSS), dtype=tl.float32)
    for done in range(0, depth, DEPTH):
        left = steps < depth - done
        x_now = load_tile(x_tile, valid, left, EVEN_DEPTH)
        gate = dot(x_now, load_tile(gate_tile, left, inside, EVEN), gate, PRECISION)
        x_tile += DEPTH
        gate_tile += ahead
        if APART:
            up = dot(x_now, load_tile(up_tile, left, inside, EVEN), up, PRECISION)
            up_tile += ahead

    if bias is not None:
        bias += expert.to(tl.int64) * bias_expert
        gate += tl.load(bias + column * bias_column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if APART:
            up += tl.load(bias + (column + width) * bias_column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if hidden is not None:
        hidden += start.to(tl.int64) * (2 * width if GATED else width)
    if activated is not None:
        activated += start.to(tl.int64) * width
    gates, ups = halves(gate), halves(up)
    for half in tl.static_range(2):
        first = block * ACROSS + half * (ACROSS // 2)
        _store(
            gates[half],
            ups[half],
            hidden,
            activated,
            valid,
            first,
            width,
            ACTIVATION,
            GATED,
            INTERLEAVED,
            LIMIT,
            ALPHA,
            OFFSET,
        )


@triton.jit
def _store(
    gate,
    up,
    hidden,
    activated,
    valid,
    first,
    width,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Columns from `first` on: as they lie in H, and what the activation makes of them."""
    row = tl.arange(0, gate.shape[0])[:, None]
    if hidden is not None:
        column = first + tl.arange(0, gate.shape[1])[None, :]
        there = valid[:, None] & (column < (2 * width if INTERLEAVED else width))
        at = hidden + (row * (2 * width if GATED else width) + column)
        tl.store(at, gate.to(hidden.dtype.element_ty), mask=there)
        if GATED and not INTERLEAVED:
            tl.store(at + width, up.to(hidden.dtype.element_ty), mask=there)
    if activated is not None:
        if INTERLEAVED:
            gate, up = unzipped(gate)
            first = first // 2
        column = first + tl.arange(0, gate.shape[1])[None, :]
        result = activate(gate, up, ACTIVATION, GATED, LIMIT, ALPHA, OFFSET)
        there = valid[:, None] & (column < width)
        tl.store(activated + (row * width + column), result.to(activated.dtype.element_ty), mask=there)
