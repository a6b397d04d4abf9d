"""What every kernel computes, in plain torch: the same names and signatures, expert by expert, obviously right.

`group_by_expert` has its twin in `engine.plan`, `route` in `rules`. Rows of no expert are NaN here: nobody
may read them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.plan import Plan
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.d_hidden import HiddenGradients
from moesaic.engine.triton.layout import Layout, most_tiles
from moesaic.engine.triton.up import Projected
from moesaic.types import ExpertWeights


def layout(plan: Plan, k: int, block_rows: int) -> Layout:
    counts = plan.counts.tolist()
    ends = plan.counts.cumsum(0)
    row_of = torch.empty(len(plan.assignments), dtype=torch.int32)
    row_of[plan.assignments] = torch.arange(len(plan.assignments), dtype=torch.int32)
    row_of[row_of >= ends[-1]] = -1
    tiles = [
        (expert, int(ends[expert]) - count + first)
        for expert, count in enumerate(counts)
        for first in range(0, count, block_rows)
    ]
    surplus = most_tiles(len(plan.assignments), len(counts), block_rows) - len(tiles)
    expert_of_tile, start_of_tile = torch.tensor(
        tiles + [(len(counts), 0)] * surplus, dtype=torch.int32
    ).mT.contiguous()
    token_of = (plan.assignments // k).int()
    return Layout(expert_of_tile, start_of_tile, ends.int(), token_of, plan.assignments, row_of)


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
    del blocks
    matrix = experts.up if spec.transposed else experts.up.mT
    hidden = _by_expert(tokens[_assignment_of_row(layout) // k], matrix, experts.up_bias, layout)
    return Projected(hidden if keep_hidden else None, spec.activate(hidden) if keep_activated else None)


def matmul(
    rows: Float[Tensor, "S a"], matrix: Float[Tensor, "E a b"], bias: Tensor | None, layout: Layout, blocks: Blocks
) -> Float[Tensor, "S b"]:
    del blocks
    return _by_expert(rows, matrix, bias, layout)


def combine(
    rows: Float[Tensor, "S n"],
    weights: Float[Tensor, "T K"] | None,
    k: int,
    layout: Layout,
    out: Float[Tensor, "T n"] | None = None,
) -> Float[Tensor, "T n"]:
    assert layout.row_of is not None
    out = rows.new_zeros(len(rows) // k, rows.shape[1]) if out is None else out.zero_()
    for assignment, row in enumerate(layout.row_of.tolist()):
        if row >= 0:
            token, slot = divmod(assignment, k)
            out[token] += rows[row] if weights is None else weights[token, slot] * rows[row]
    return out


def down_and_combine(
    activated: Float[Tensor, "S I"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    matrix: Float[Tensor, "E I O"],
    bias: Float[Tensor, "E O"] | None,
) -> Float[Tensor, "T O"]:
    out = activated.new_zeros(len(expert_ids), matrix.shape[2])
    for token, ids in enumerate(expert_ids.tolist()):
        for slot, expert in enumerate(ids):
            if 0 <= expert < len(matrix):
                row = activated[token * len(ids) + slot] @ matrix[expert]
                out[token] += weights[token, slot] * (row if bias is None else row + bias[expert])
    return out


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
    assignment = _assignment_of_row(layout)
    scale, g = weights.flatten()[assignment, None], grad_out[assignment // weights.shape[1]]
    matrix = experts.down.mT if spec.transposed else experts.down
    d_activated = _by_expert(g, matrix, None, layout)
    activated, d_projected = spec.activate_backward(hidden, d_activated * scale)
    d_scale = d_activated * activated
    if experts.down_bias is not None:
        d_scale[:, 0] += (g * _of_rows(experts.down_bias, layout)).sum(dim=1)
    parts = torch.stack([part.sum(dim=1) for part in d_scale.split(blocks.columns, dim=1)])
    grads = (d_projected, activated * scale, parts)
    return HiddenGradients(*(grad if want else None for grad, want in zip(grads, wanted, strict=True)))


def d_weights(partials: Float[Tensor, "p S"], layout: Layout, like: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    assert layout.row_of is not None
    total = partials.sum(dim=0)[layout.row_of.clamp(min=0)]
    return torch.where(layout.row_of < 0, 0.0, total).view(like.shape).to(like.dtype)


def outer(
    left: Float[Tensor, "l a"],
    right: Float[Tensor, "r b"],
    out: Float[Tensor, "E a b"],
    layout: Layout,
    blocks: Blocks,
    *,
    gather: str,
    accumulate: bool = False,
) -> Float[Tensor, "E a b"]:
    del blocks
    if not accumulate:
        out.zero_()
    token = layout.token_of
    assert token is not None
    for expert, rows in _rows_of_experts(layout):
        lines = torch.arange(rows.start, rows.stop)
        of_left, of_right = (token[rows], lines) if gather == "left" else (lines, token[rows])
        out[expert] += left[of_left].mT @ right[of_right]
    return out


def sum_rows(
    rows: Float[Tensor, "r n"], weights: Float[Tensor, "T K"] | None, layout: Layout, like: Float[Tensor, "E n"]
) -> Float[Tensor, "E n"]:
    if weights is not None:
        assignment = _assignment_of_row(layout)
        rows = rows[assignment // weights.shape[1]] * weights.flatten()[assignment, None]
    out = torch.zeros_like(like)
    for expert, here in _rows_of_experts(layout):
        out[expert] = rows[here].sum(dim=0)
    return out


def _assignment_of_row(layout: Layout) -> Tensor:
    return torch.arange(len(layout.expert_of_tile)) if layout.assignments is None else layout.assignments


def _rows_of_experts(layout: Layout) -> list[tuple[int, slice]]:
    if layout.ends is None:
        return [(expert, slice(row, row + 1)) for row, expert in enumerate(layout.expert_of_tile.tolist())]
    ends = layout.ends.tolist()
    return [(expert, slice(start, stop)) for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False))]


def _by_expert(rows: Tensor, matrix: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    out = rows.new_full((len(rows), matrix.shape[2]), torch.nan)
    for expert, here in _rows_of_experts(layout):
        if 0 <= expert < len(matrix):
            out[here] = rows[here] @ matrix[expert]
            if bias is not None:
                out[here] += bias[expert]
    return out


def _of_rows(bias: Tensor, layout: Layout) -> Tensor:
    out = bias.new_full((len(_assignment_of_row(layout)), bias.shape[1]), torch.nan)
    for expert, here in _rows_of_experts(layout):
        if 0 <= expert < len(bias):
            out[here] = bias[expert]
    return out
