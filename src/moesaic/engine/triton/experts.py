"""The GPU engine: the kernels in order, forward and backward. Nothing here waits for the device or asks it a value, and
every shape follows from the inputs' shapes, so a CUDA graph can hold it.

Kept for the backward: the tokens, the up projection's output H and the order of assignments; with `recompute` not
even H (SonicMoE, arXiv 2512.14080).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.op import Gradients, Keep
from moesaic.engine.plan import Plan, no_plan
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton.blocks import INTERPRETED, INVARIANT_ROWS, Tiles, capability_of, suited, tiles_for
from moesaic.engine.triton.combine import combine
from moesaic.engine.triton.d_hidden import HiddenGradients, d_hidden
from moesaic.engine.triton.d_weights import d_weights
from moesaic.engine.triton.few import down_and_combine
from moesaic.engine.triton.layout import Layout, layout, unsorted
from moesaic.engine.triton.matmul import matmul
from moesaic.engine.triton.outer import d_matrix
from moesaic.engine.triton.plan import group_by_expert
from moesaic.engine.triton.sum_rows import sum_rows
from moesaic.engine.triton.up import up
from moesaic.types import ExpertWeights

# Numbers of a [T*K, D] from which it is made in two halves: 64 MB in 16 bits; with less, memory is not what matters.
HALVED = 1 << 25
MOST_ASSIGNMENTS = 2**31 - 2**12  # rows are counted in 32 bits, and a block reaches beyond the last one
EXPERTS_PER_ASSIGNMENT = 4  # and more: every assignment is a tile of its own, nothing is sorted (vLLM's rule)


def forward(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
    *,
    keep: Keep,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [T, O], hidden, assignments [S], counts [E]): the weighted sum of the chosen experts, and what the backward
    needs of it; what it does not need is not computed. Ids that name no expert are skipped: values are not checked.

    Raises ValueError for more than MOST_ASSIGNMENTS.
    """
    n, k, n_experts = expert_ids.numel(), expert_ids.shape[1], len(experts.up)
    if n > MOST_ASSIGNMENTS:
        raise ValueError(f"{n} assignments (tokens x experts per token) are too many: {MOST_ASSIGNMENTS} at most")
    tokens, weights = tokens.contiguous(), weights.contiguous()
    if n == 0 or n_experts == 0:
        return _nothing(tokens, n, experts, spec, keep)
    tiles = _tiles(n, tokens, experts, spec, batch_invariant=batch_invariant)
    down = experts.down if spec.transposed else experts.down.mT  # [E, I, O]
    if keep == "nothing" and n * EXPERTS_PER_ASSIGNMENT <= n_experts and not batch_invariant:
        rows = unsorted(expert_ids)
        activated = up(tokens, k, rows, experts, spec, tiles.up, keep_hidden=False).activated
        out = down_and_combine(activated, expert_ids, weights, down, experts.down_bias)
        return out, tokens.new_empty(0), *no_plan(expert_ids, n_experts)
    plan = group_by_expert(expert_ids, n_experts)
    rows = layout(plan, k, tiles.up.rows)
    hidden, activated = up(tokens, k, rows, experts, spec, tiles.up, keep_hidden=keep == "hidden")
    expert_out = matmul(activated, down, experts.down_bias, rows, tiles.matmul)
    del activated
    out = combine(expert_out, weights, k, rows)
    return out, tokens.new_empty(0) if hidden is None else hidden, plan.assignments, plan.counts


def backward(
    grad_out: Float[Tensor, "T O"],
    tokens: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    hidden: Float[Tensor, "..."],
    assignments: Int[Tensor, " S"],
    counts: Int[Tensor, " E"],
    spec: ExpertSpec,
    wanted: Gradients,
    up_into: Tensor | None = None,
    down_into: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Gradients:
    """All gradients that are wanted; None for the others, and for those that were added to `up_into`, `down_into`.

    batch_invariant: as the forward was, whose tiles are taken again, so that an H that was not kept has the same bits.
    """
    n, k, n_experts = weights.numel(), weights.shape[1], len(counts)
    if n == 0 or n_experts == 0:
        return _no_gradients(tokens, weights, experts, wanted, up_into, down_into)
    grad_out, tokens, weights = grad_out.contiguous(), tokens.contiguous(), weights.contiguous()
    tiles = _tiles(n, tokens, experts, spec, batch_invariant=batch_invariant)
    rows = layout(Plan(assignments, counts), k, tiles.up.rows)
    parts = (wanted.tokens or wanted.up or wanted.up_bias, wanted.down, wanted.weights)
    inner = HiddenGradients(None, None, None)
    if any(parts):
        if not hidden.numel():
            hidden = up(tokens, k, rows, experts, spec, tiles.up, keep_hidden=True, keep_activated=False).hidden
        inner = d_hidden(grad_out, hidden, weights, rows, experts, spec, tiles.d_hidden, wanted=parts)
    del hidden  # memory for what follows, if nobody else holds it

    def gradient(weight: Tensor, into: Tensor | None, out_grad: Tensor, of: Tensor, by_token: str) -> Tensor | None:
        grad = torch.empty_like(weight) if into is None else into
        how = {"by_token": by_token, "transposed": spec.transposed, "accumulate": into is not None}
        d_matrix(out_grad, of, grad, rows, tiles.outer, **how)
        return grad if into is None else None

    d_tokens = d_scales = d_up = d_down = d_up_bias = d_down_bias = None
    if wanted.weights:
        d_scales = d_weights(inner.partials, rows, weights)
    if wanted.down:
        d_down = gradient(experts.down, down_into, grad_out, inner.scaled, by_token="out_grad")
    if wanted.down_bias and experts.down_bias is not None:
        d_down_bias = sum_rows(grad_out, weights, rows, experts.down_bias)
    d_projected = inner.d_hidden
    del inner  # memory for what follows
    if wanted.up:
        d_up = gradient(experts.up, up_into, d_projected, tokens, by_token="inputs")
    if wanted.up_bias and experts.up_bias is not None:
        d_up_bias = sum_rows(d_projected, None, rows, experts.up_bias)
    if wanted.tokens:
        d_tokens = _d_tokens(d_projected, experts.up.mT if spec.transposed else experts.up, k, rows, tiles)
    return Gradients(d_tokens, d_scales, d_up, d_down, d_up_bias, d_down_bias)


def _d_tokens(
    d_projected: Float[Tensor, "S U"], back: Float[Tensor, "E U D"], k: int, rows: Layout, tiles: Tiles
) -> Float[Tensor, "T D"]:
    """The rows' gradients through the up projection, added up by token.

    In two halves, by columns, where they are large: H and its gradient are there as well, and with all of [T*K, D] they
    would be more than the forward has at its peak (2.95 instead of 2.4 GB for 32768 tokens of Qwen3-30B-A3B). Only
    where the same kernel serves a half and the whole, so that none is compiled because a batch is larger.
    """
    width = back.shape[2]
    out = d_projected.new_empty(len(d_projected) // k, width)
    halves = len(d_projected) * width >= HALVED and width % (2 * tiles.matmul.columns) == 0
    step = width // 2 if halves else width
    for columns, some in zip(back.split(step, 2), out.split(step, 1), strict=True):
        combine(matmul(d_projected, columns, None, rows, tiles.matmul), None, k, rows, some)
    return out


def _tiles(
    n_assignments: int, tokens: Tensor, experts: ExpertWeights, spec: ExpertSpec, *, batch_invariant: bool = False
) -> Tiles:
    if not tokens.is_cuda:
        return INTERPRETED
    rows_per_expert = INVARIANT_ROWS if batch_invariant else -(-n_assignments // len(experts.up))
    capability = capability_of(tokens.device)
    return suited(tiles_for(rows_per_expert, tokens.dtype, capability, experts.up.dtype), spec, capability)


def _nothing(
    tokens: Tensor, n: int, experts: ExpertWeights, spec: ExpertSpec, keep: Keep
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` of no assignments: no kernel has a grid of no programs."""
    out = tokens.new_zeros(len(tokens), spec.output_size(experts))
    hidden = tokens.new_empty((n, spec.up_size(experts)) if keep == "hidden" else 0)
    counts = torch.zeros(len(experts.up), dtype=torch.int64, device=tokens.device)
    return out, hidden, torch.arange(n, device=tokens.device), counts


def _no_gradients(
    tokens: Tensor, weights: Tensor, experts: ExpertWeights, wanted: Gradients, *into: Tensor | None
) -> Gradients:
    fresh = wanted._replace(
        up=wanted.up and into[0] is None,
        down=wanted.down and into[1] is None,
    )
    inputs = (tokens, weights, *experts)
    return Gradients(
        *(torch.zeros_like(t) if t is not None and want else None for t, want in zip(inputs, fresh, strict=True))
    )
