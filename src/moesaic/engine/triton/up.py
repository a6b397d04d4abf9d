"""The up projection: rows gathered while they are loaded, gate and up side by side in one tile, so that one
instruction takes both where tiles are large, activation in registers."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.activation import Activation, activate
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.engine.triton.tile import (
    columns_of,
    halves,
    load_bias,
    multiply,
    my_rows,
    product,
    strided,
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
        layout,
        strided(matrix),
        strided(experts.up_bias),
        hidden,
        activated,
        tiles,
        len(matrix),
        d,
        i,
        ACT=Activation.of(spec),
        **product(blocks, tokens.dtype, matrix, i),
    )
    return Projected(hidden, activated)


@triton.jit(do_not_specialize=["tiles"])
def _up(
    x,
    k,
    layout,
    matrix,
    bias,
    hidden,
    activated,
    tiles,
    num_experts,
    depth,
    width,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    APART: tl.constexpr = ACT.gated and not ACT.interleaved
    PAIRS: tl.constexpr = "apart" if APART else "neighbours" if ACT.gated else None
    ACROSS: tl.constexpr = 2 * TILE.columns if PAIRS == "neighbours" else TILE.columns  # of what lies together
    expert, start, valid, block = my_rows(layout, tiles, tl.cdiv(width, TILE.columns), num_experts, TILE)
    if (expert < 0) | (expert >= num_experts):
        return
    token = tokens_of(start, valid, layout, k, TILE)
    column, inside = columns_of(block, width, PAIRS, TILE)
    x_tile = x + token[:, None] * depth + tl.arange(0, TILE.depth)[None, :]
    total = multiply(x_tile, valid, matrix, expert, column, inside, depth, TILE)
    if bias is not None:
        total += load_bias(bias, expert, column, inside)[None, :]
    if hidden is not None:
        hidden += start.to(tl.int64) * (2 * width if ACT.gated else width)
    if activated is not None:
        activated += start.to(tl.int64) * width
    if APART:
        gate, up = halves(total)
    else:
        gate, up = total, total
    gates, ups = halves(gate), halves(up)
    for half in tl.static_range(2):
        first = block * ACROSS + half * (ACROSS // 2)
        _store(gates[half], ups[half], hidden, activated, valid, first, width, ACT)


@triton.jit
def _store(gate, up, hidden, activated, valid, first, width, ACT: tl.constexpr):
    """Columns from `first` on: as they lie in H, and what the activation makes of them."""
    row = tl.arange(0, gate.shape[0])[:, None]
    if hidden is not None:
        column = first + tl.arange(0, gate.shape[1])[None, :]
        there = valid[:, None] & (column < (2 * width if ACT.interleaved else width))
        at = hidden + (row * (2 * width if ACT.gated else width) + column)
        tl.store(at, gate.to(hidden.dtype.element_ty), mask=there)
        if ACT.gated and not ACT.interleaved:
            tl.store(at + width, up.to(hidden.dtype.element_ty), mask=there)
    if activated is not None:
        if ACT.interleaved:
            gate, up = unzipped(gate)
            first = first // 2
        column = first + tl.arange(0, gate.shape[1])[None, :]
        result = activate(gate, up, ACT)
        there = valid[:, None] & (column < width)
        tl.store(activated + (row * width + column), result.to(activated.dtype.element_ty), mask=there)
