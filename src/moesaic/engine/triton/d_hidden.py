"""Back through the down projection and the activation in one pass (SonicMoE, arXiv 2512.14080, sec. 3): with
A = act(H) and s the routing weight, A' = g W2; dH = act'(H) s A'; ds = <A', A>; and s A, which dW2 needs. Neither the
experts' outputs nor their gradients are ever in memory."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.activation import Activation, activate_backward
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
    widened,
    zipped,
)
from moesaic.types import ExpertWeights


class HiddenGradients(NamedTuple):
    """d_hidden [S, U].  scaled [S, I]: s * A.  partials [column tiles, S] float32: they add up to ds. None where it was
    not wanted; rows of no expert are not written."""

    d_hidden: Any
    scaled: Any
    partials: Any


def d_hidden(
    grad_out: Float[Tensor, "T O"],
    hidden: Float[Tensor, "S U"],
    weights: Float[Tensor, "T K"],
    layout: Layout,
    experts: ExpertWeights,
    spec: ExpertSpec,
    blocks: Blocks,
    *,
    wanted: tuple[bool, bool, bool],
) -> HiddenGradients:
    """`wanted` says which of the three; where it is `scaled` alone, no matmul is computed."""
    matrix = experts.down.mT if spec.transposed else experts.down  # [E, O, I]
    n_experts, depth, width = matrix.shape
    column_tiles = triton.cdiv(width, blocks.columns)
    grads = HiddenGradients(
        hidden.new_empty(hidden.shape) if wanted[0] else None,
        hidden.new_empty(len(hidden), width) if wanted[1] else None,
        weights.new_empty(column_tiles, len(hidden), dtype=torch.float32) if wanted[2] else None,
    )
    tiles = len(layout.expert_of_tile)
    _d_hidden[(tiles * column_tiles,)](
        grad_out,
        layout,
        weights,
        strided(matrix),
        strided(experts.down_bias),
        hidden,
        *grads,
        tiles,
        n_experts,
        len(hidden),
        depth,
        width,
        ACT=Activation.of(spec),
        **product(blocks, grad_out.dtype, matrix, width),
    )
    return grads


@triton.jit(do_not_specialize=["tiles", "num_rows"])
def _d_hidden(
    g,
    layout,
    weights,
    matrix,
    bias,
    hidden,
    d_hidden,
    scaled,
    partials,
    tiles,
    num_experts,
    num_rows,
    depth,
    width,
    ACT: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    expert, start, valid, block = my_rows(layout, tiles, tl.cdiv(width, COLUMNS), num_experts, TILE)
    if (expert < 0) | (expert >= num_experts):
        return
    rows = start + tl.arange(0, ROWS)
    token = tokens_of(start, valid, layout, 1, TILE)
    steps = tl.arange(0, TILE.depth)
    g_tile = g + token[:, None] * depth + steps[None, :]
    if (d_hidden is not None) | (partials is not None):
        column, inside = columns_of(block, width, None, TILE)
        a_grad = multiply(g_tile, valid, matrix, expert, column, inside, depth, TILE)
    else:
        a_grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)

    assignment = tl.load(layout.assignments + rows, mask=valid, other=0)
    scale = tl.load(weights + assignment, mask=valid, other=0.0).to(tl.float32)
    above = start.to(tl.int64) * (2 * width if ACT.gated else width)
    hidden += above
    if d_hidden is not None:
        d_hidden += above
    if scaled is not None:
        scaled += start.to(tl.int64) * width
    part = tl.zeros((ROWS,), dtype=tl.float32)
    grads = halves(a_grad)
    for half in tl.static_range(2):
        first = block * COLUMNS + half * (COLUMNS // 2)
        part += _through_activation(grads[half], hidden, d_hidden, scaled, scale, valid, first, width, ACT)
    if partials is not None:
        if bias is not None:
            if block == 0:  # one of the column tiles adds <g, b2>
                for done in range(0, depth, TILE.depth):
                    left = steps < depth - done
                    offset = load_bias(bias, expert, done + steps, left)
                    grad = widened(tl.load(g_tile + done, mask=valid[:, None] & left[None, :], other=0.0))
                    part += tl.sum(grad.to(tl.float32) * offset[None, :], axis=1)
        tl.store(partials + block.to(tl.int64) * num_rows + rows, part, mask=valid)


@triton.jit
def _through_activation(
    a_grad,
    hidden,
    d_hidden,
    scaled,
    scale,
    valid,
    first,
    width,
    ACT: tl.constexpr,
):
    """Some columns of A' from `first` on: writes dH and s A there, gives each row's part of ds."""
    row = tl.arange(0, a_grad.shape[0])[:, None]
    column = first + tl.arange(0, a_grad.shape[1])[None, :]
    there = valid[:, None] & (column < width)
    at = row * (2 * width if ACT.gated else width) + column
    pair = 2 * first + tl.arange(0, 2 * a_grad.shape[1])[None, :]  # where gate and up are neighbours
    pair_at, pair_there = row * (2 * width) + pair, valid[:, None] & (pair < 2 * width)
    if ACT.interleaved:
        gate, up = unzipped(tl.load(hidden + pair_at, mask=pair_there, other=0.0).to(tl.float32))
    else:
        gate = tl.load(hidden + at, mask=there, other=0.0).to(tl.float32)
        up = gate
        if ACT.gated:
            up = tl.load(hidden + at + width, mask=there, other=0.0).to(tl.float32)
    activated, d_gate, d_up = activate_backward(gate, up, a_grad * scale[:, None], ACT)
    if d_hidden is not None:
        if ACT.interleaved:
            both = zipped(d_gate, d_up).to(d_hidden.dtype.element_ty)
            tl.store(d_hidden + pair_at, both, mask=pair_there)
        else:
            tl.store(d_hidden + at, d_gate.to(d_hidden.dtype.element_ty), mask=there)
            if ACT.gated:
                tl.store(d_hidden + at + width, d_up.to(d_hidden.dtype.element_ty), mask=there)
    if scaled is not None:
        value = (activated * scale[:, None]).to(scaled.dtype.element_ty)
        tl.store(scaled + (row * width + column), value, mask=there)
    return tl.sum(tl.where(there, a_grad * activated, 0.0), axis=1)
