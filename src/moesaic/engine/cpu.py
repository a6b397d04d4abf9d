"""The CPU engine: expert by expert on reused scratch, forward and a backward of its own.

Per active expert: gather its rows, up projection, activation times the routing weight (at the expert's width, half or
less of the model's), down projection, add into the output. No [T*K, D] tensor exists; every token meets an expert at
most once and experts run in ascending order, so the sum has one order and results repeat bit for bit.
Kept for the backward: the tokens, the up projection's output H and the order of assignments; nothing else.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.checks import check_ids
from moesaic.engine.gemm import BLOCK_MAX_ROWS, Workspace, add_outer, linear, matmul_dtype
from moesaic.engine.op import ACCUMULATING, run_experts
from moesaic.engine.plan import group_by_expert
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

CHUNK = 1024  # rows of one expert computed at a time: scratch stays bounded when all tokens go to one expert
INVARIANT_ROWS = 32  # rows of every matmul in batch-invariant mode


class Forward(NamedTuple):
    """out: [T, O].  hidden: [S, U], rows in the order of `assignments`; empty unless it was asked for.
    assignments, counts: the Plan."""

    out: Tensor
    hidden: Tensor
    assignments: Tensor
    counts: Tensor


class Chunk(NamedTuple):
    """Some rows of one expert: rows start..stop of the sorted assignments; `first` of its expert or not."""

    expert: int
    start: int
    stop: int
    first: bool


def chunks_of(counts: list[int], size: int = CHUNK) -> Iterator[Chunk]:
    """The active experts in ascending order, each in pieces of at most `size` rows."""
    start = 0
    for expert, count in enumerate(counts):
        end = start + count
        for piece in range(start, end, size):
            yield Chunk(expert, piece, min(piece + size, end), first=piece == start)
        start = end


def forward(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
    *,
    save_hidden: bool,
    batch_invariant: bool,
) -> Forward:
    """The weighted sum of the chosen experts per token, and what the backward needs of it."""
    n_tokens, k = expert_ids.shape
    if expert_ids.numel():
        check_ids(int(expert_ids.min()), int(expert_ids.max()), len(experts.up))
    plan = group_by_expert(expert_ids, len(experts.up))
    counts = plan.counts.tolist()
    narrow = tokens.dtype
    wide = torch.promote_types(narrow, torch.float32)
    out = torch.zeros(n_tokens, spec.output_size(experts), dtype=wide)
    hidden = torch.empty((n_tokens * k, spec.up_size(experts)) if save_hidden else 0, dtype=narrow)
    scales = weights.flatten()[plan.assignments].to(wide)
    token_of = plan.assignments // k
    work = Workspace()
    for chunk in chunks_of(counts, INVARIANT_ROWS if batch_invariant else CHUNK):
        expert, here = chunk.expert, slice(chunk.start, chunk.stop)
        count = INVARIANT_ROWS if batch_invariant else chunk.stop - chunk.start
        dtype = matmul_dtype(count, tokens.dtype, experts.up.dtype)
        up, down = _matrices(experts, spec, expert, count, dtype, work)
        rows = token_of[here]
        x = tokens if n_tokens == 1 else torch.index_select(tokens, 0, rows)
        scale = scales[here, None]
        if batch_invariant:
            x, scale = _padded(x), _padded(scale)
        projected = linear(x.to(dtype), up, work, "up").to(wide)
        if experts.up_bias is not None:
            projected = projected + experts.up_bias[expert]
        if save_hidden:
            hidden[here] = projected[: chunk.stop - chunk.start]
        activated = spec.activate(projected).mul_(scale)
        expert_out = linear(activated.to(dtype), down, work, "down").to(wide)
        if experts.down_bias is not None:
            expert_out = expert_out.addcmul(experts.down_bias[expert].to(wide), scale)
        if n_tokens == 1:
            out += expert_out[:1]
        else:
            out.index_add_(0, rows, expert_out[: len(rows)])
    return Forward(out.to(tokens.dtype), hidden, plan.assignments, plan.counts)


class Gradients(NamedTuple):
    """What `backward` returns, each None where nobody asked for it or where it went straight into `.grad`."""

    tokens: Tensor | None
    weights: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


class Wanted(NamedTuple):
    """Which gradients `backward` computes: frozen weights cost no matmul."""

    tokens: bool = True
    weights: bool = True
    up: bool = True
    down: bool = True
    up_bias: bool = True
    down_bias: bool = True


def backward(
    grad_out: Float[Tensor, "T O"],
    tokens: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    hidden: Float[Tensor, "..."],
    assignments: Int[Tensor, " S"],
    counts: Int[Tensor, " E"],
    spec: ExpertSpec,
    wanted: Wanted,
    up_into: Tensor | None = None,
    down_into: Tensor | None = None,
) -> Gradients:
    """All gradients from one walk over the experts (SonicMoE's algebra, arXiv 2512.14080, with dS = rowsum(dA' * A)).

    `hidden` empty means: compute it again from the tokens. `up_into` and `down_into` are gradients that exist already
    and are added to in place; those are then not returned.
    """
    k = weights.shape[-1]
    narrow = tokens.dtype
    wide = torch.promote_types(narrow, torch.float32)
    d_tokens = torch.zeros(tokens.shape, dtype=wide) if wanted.tokens else None
    d_scales = torch.zeros(weights.numel(), dtype=wide) if wanted.weights else None
    d_up = up_into if up_into is not None else _gradient_like(experts.up, wanted.up, counts)
    d_down = down_into if down_into is not None else _gradient_like(experts.down, wanted.down, counts)
    d_up_bias = _zeros_like(experts.up_bias, wanted.up_bias, wide)
    d_down_bias = _zeros_like(experts.down_bias, wanted.down_bias, wide)
    dtype = matmul_dtype(CHUNK, tokens.dtype, experts.up.dtype)
    scales = weights.flatten()[assignments].to(wide)
    token_of = assignments // k
    needs_hidden = wanted.tokens or wanted.weights or wanted.up or wanted.up_bias
    work = Workspace()
    for chunk in chunks_of(counts.tolist()):
        expert, here = chunk.expert, slice(chunk.start, chunk.stop)
        up, down = _matrices(experts, spec, expert, CHUNK, dtype, work)
        rows, scale = token_of[here], scales[here, None]
        g = torch.index_select(grad_out, 0, rows)
        x = torch.index_select(tokens, 0, rows).to(dtype)
        projected = hidden[here] if hidden.numel() else _project(x, up, experts.up_bias, expert, work, wide)
        projected = projected.to(wide)
        if needs_hidden:
            d_activated = linear(g.to(dtype), down.mT, work, "d_activated").to(wide)
            activated, d_projected = spec.activate_backward(projected, d_activated * scale)
            if d_scales is not None:
                d_scale = (d_activated * activated).sum(dim=1)
                if experts.down_bias is not None:
                    d_scale += (g.to(wide) * experts.down_bias[expert]).sum(dim=1)
                d_scales[assignments[here]] = d_scale
            d_projected_narrow = d_projected.to(dtype)
            if d_tokens is not None:
                d_tokens.index_add_(0, rows, linear(d_projected_narrow, up.mT, work, "d_tokens").to(wide))
            if d_up is not None:
                accumulate = up_into is not None or not chunk.first
                _add_weight_gradient(d_up[expert], d_projected_narrow, x, spec, work, accumulate)
            if d_up_bias is not None:
                d_up_bias[expert] += d_projected.sum(dim=0)
        else:
            activated = spec.activate(projected)
        if d_down is not None:
            accumulate = down_into is not None or not chunk.first
            _add_weight_gradient(d_down[expert], g.to(dtype), (activated * scale).to(dtype), spec, work, accumulate)
        if d_down_bias is not None:
            d_down_bias[expert] += (g.to(wide) * scale).sum(dim=0)
    return Gradients(
        None if d_tokens is None else d_tokens.to(tokens.dtype),
        None if d_scales is None else d_scales.view(weights.shape).to(weights.dtype),
        d_up if up_into is None else None,
        d_down if down_into is None else None,
        None if d_up_bias is None else d_up_bias.to(experts.up.dtype),
        None if d_down_bias is None else d_down_bias.to(experts.down.dtype),
    )


def _matrices(
    experts: ExpertWeights, spec: ExpertSpec, expert: int, rows: int, dtype: torch.dtype, work: Workspace
) -> tuple[Tensor, Tensor]:
    """One expert's matrices as [out, in], in `dtype` unless `linear` had better widen them block by block."""
    up, down = experts.up[expert], experts.down[expert]
    if spec.transposed:
        up, down = up.mT, down.mT
    elif rows <= BLOCK_MAX_ROWS:
        return up, down
    return work.widen("up weight", up, dtype), work.widen("down weight", down, dtype)


def _project(
    x: Tensor, up: Tensor, up_bias: Tensor | None, expert: int, work: Workspace, wide: torch.dtype
) -> Float[Tensor, "n U"]:
    projected = linear(x, up, work, "up").to(wide)
    return projected if up_bias is None else projected + up_bias[expert]


def _padded(x: Tensor) -> Tensor:
    """x with rows of zeros below it up to INVARIANT_ROWS, in memory of its own."""
    padded = x.new_zeros(INVARIANT_ROWS, x.shape[1])
    padded[: len(x)] = x
    return padded


def _add_weight_gradient(
    gradient: Tensor, g: Tensor, x: Tensor, spec: ExpertSpec, work: Workspace, accumulate: bool
) -> None:
    out_side, in_side = (x, g) if spec.transposed else (g, x)
    add_outer(gradient, out_side, in_side, work, accumulate=accumulate)


def _gradient_like(weight: Tensor, wanted: bool, counts: Tensor) -> Tensor | None:
    """Memory for a gradient; only experts without a token are zeroed, the others are written whole."""
    if not wanted:
        return None
    gradient = torch.empty_like(weight)
    for expert in (counts == 0).nonzero().flatten().tolist():
        gradient[expert].zero_()
    return gradient


def _zeros_like(bias: Tensor | None, wanted: bool, wide: torch.dtype) -> Tensor | None:
    return torch.zeros(bias.shape, dtype=wide) if bias is not None and wanted else None


def cpu(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
    *,
    batch_invariant: bool = False,
    recompute: bool = False,
) -> Float[Tensor, "T O"]:
    """The engine. See `run_experts` for `recompute`.

    batch_invariant: a row's bits do not depend on the rows beside it, as every matmul has the same shape; slower.

    Raises ValueError for inputs that do not fit together, ids that name no expert, and tensors not on the CPU.
    """
    if tokens.device.type != "cpu":
        raise ValueError(f"engine='cpu' was given tokens on {tokens.device}: use 'auto' or 'grouped'")
    return run_experts(tokens, expert_ids, weights, experts, spec, batch_invariant=batch_invariant, recompute=recompute)


@torch.library.impl("moesaic::experts", "CPU")
def _experts(tokens: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> Forward:
    experts, fields, (save_hidden, batch_invariant) = rest[:4], rest[4:-2], rest[-2:]
    return forward(
        tokens,
        expert_ids,
        weights,
        ExpertWeights(*experts),
        ExpertSpec(*fields),
        save_hidden=save_hidden,
        batch_invariant=batch_invariant,
    )


@torch.library.impl("moesaic::experts_backward", "CPU")
def _experts_backward(*args: Any) -> list[Tensor]:
    tokens = args[1]
    return [tokens.new_empty(0) if grad is None else grad for grad in _backward_in_place(*args)]


def _backward_in_place(grad_out: Tensor, tokens: Tensor, weights: Tensor, *rest: Any) -> Gradients:
    experts, (hidden, assignments, counts), fields = rest[:4], rest[4:7], rest[7:14]
    wanted, into = rest[14], rest[15:]
    return backward(
        grad_out,
        tokens,
        weights,
        ExpertWeights(*experts),
        hidden,
        assignments,
        counts,
        ExpertSpec(*fields),
        Wanted(*wanted),
        *into,
    )


ACCUMULATING["cpu"] = _backward_in_place
