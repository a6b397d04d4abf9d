"""The CPU engine: expert by expert on reused scratch, forward and a backward of its own.

The assignments, sorted by expert, are walked in batches of some hundred rows. Per batch: gather the rows, up
projection expert by expert, activation times routing weight (at the expert's width, half or less of the model's), down
projection, add into the output. No [T*K, D] tensor exists whatever the skew. Experts run in ascending order and rows
are added one after another, so every sum has one order and results repeat bit for bit.
Kept for the backward: the tokens, the up projection's output H and the order of assignments; nothing else.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.batches import PIECE_ROWS, Batch, batches
from moesaic.engine.checks import check_ids
from moesaic.engine.gemm import matmul_dtype
from moesaic.engine.matmul_forms import INVARIANT_ROWS
from moesaic.engine.memory import new_gradient
from moesaic.engine.multiply import Multiply
from moesaic.engine.one_token import one_token
from moesaic.engine.op import Gradients, Keep, register_kernels, run_experts
from moesaic.engine.plan import group_by_expert, no_plan
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

SERIAL = 16384  # elements up to which torch runs GELU, the first that it splits, in one thread
VECTORS = 64  # elements: a multiple of what torch's vectorised loops take at a time, on every CPU


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
    needs of it. hidden: [S, U] in the order of `assignments`, in the tokens' dtype; empty unless it is to be saved."""
    if len(tokens) == 1 and keep == "nothing" and not batch_invariant:
        out = one_token(tokens, expert_ids, weights, experts, spec)
        return out, tokens.new_empty(0), *no_plan(expert_ids, len(experts.up))
    check_ids(expert_ids, len(experts.up))
    plan = group_by_expert(expert_ids, len(experts.up))
    dtype, wide = matmul_dtype(tokens.dtype), torch.promote_types(tokens.dtype, torch.float32)
    up, down = spec.as_in_out(experts)
    out = torch.zeros(len(tokens), down.shape[2], dtype=wide)
    save_hidden = keep == "hidden"
    straight = save_hidden and dtype == tokens.dtype and (dtype == wide or experts.up_bias is None)
    hidden = tokens.new_empty((len(plan.assignments), up.shape[2]) if save_hidden else 0)
    scales = weights.flatten()[plan.assignments].to(wide)[:, None]
    multiply = Multiply(tokens.dtype, batch_invariant=batch_invariant)
    cut = INVARIANT_ROWS if batch_invariant else PIECE_ROWS
    for batch in batches(plan.counts.tolist(), plan.assignments // expert_ids.shape[1], cut):
        x = tokens.index_select(0, batch.rows)
        projected = multiply(batch, x, up, "projected", hidden[batch.here] if straight else None)
        projected = _biased(projected, experts.up_bias, batch, wide)
        if save_hidden and not straight:
            hidden[batch.here] = projected
        scale = scales[batch.here]
        activate = _activate_by_row if batch_invariant else ExpertSpec.activate
        activated = activate(spec, projected).mul_(scale)
        expert_out = _row_major(multiply(batch, activated, down, "expert out"), wide)
        if experts.down_bias is not None:
            expert_out += experts.down_bias[batch.expert_of_row()] * scale
        out.index_add_(0, batch.rows, expert_out)
    return out.to(tokens.dtype), hidden, plan.assignments, plan.counts


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
    """All gradients in one walk over the experts. With A' = the gradient of A = act(H), s the routing weight:
    A' = g W2, ds = rowsum(A' A), dW2 = g^T (s A), dH = act'(H) s A', dW1 = dH^T x, dx = dH W1
    (SonicMoE, arXiv 2512.14080, sec. 3). A frozen matrix costs no product of its own; where `down` alone is trained
    there is no A'.

    An empty `hidden` is computed again from the tokens, to the same bits where the forward was `batch_invariant` too.
    `up_into`, `down_into`: gradients that are added to in place.
    """
    dtype, wide = matmul_dtype(tokens.dtype), torch.promote_types(tokens.dtype, torch.float32)
    up, down = spec.as_in_out(experts)
    into = _to_fill(wanted, tokens, weights, experts, counts, up_into, down_into)
    scales = weights.flatten()[assignments].to(wide)[:, None]
    multiply, again = Multiply(tokens.dtype), Multiply(tokens.dtype, batch_invariant=batch_invariant)
    cut = INVARIANT_ROWS if batch_invariant and not hidden.numel() else PIECE_ROWS
    beyond_down = wanted.tokens or wanted.weights or wanted.up or wanted.up_bias
    for batch in batches(counts.tolist(), assignments // weights.shape[1], cut):
        scale = scales[batch.here]
        g = grad_out.index_select(0, batch.rows)
        if into.down_bias is not None:
            _sum_rows(batch, into.down_bias, g * scale)
        if not (beyond_down or wanted.down):
            continue
        x = tokens.index_select(0, batch.rows).to(dtype)
        if hidden.numel():
            projected = hidden[batch.here]
        else:
            projected = _biased(again(batch, x, up, "projected"), experts.up_bias, batch, wide)
            projected = projected.to(tokens.dtype)  # rounded as it is where it is kept
        projected = _row_major(projected, wide)
        if beyond_down:
            d_activated = _row_major(multiply(batch, g, down.mT, "d_activated"), wide)
            activated, d_projected = spec.activate_backward(projected, d_activated * scale)
            d_projected = d_projected.to(dtype)
            if into.weights is not None:
                into.weights[assignments[batch.here]] = _weight_gradient(batch, d_activated, activated, g, experts)
            if into.tokens is not None:
                d_tokens = _row_major(multiply(batch, d_projected, up.mT, "d_tokens"), wide)
                into.tokens.index_add_(0, batch.rows, d_tokens)
            if into.up is not None:
                multiply.outer(batch, into.up, d_projected, x, spec, "up total", accumulate=up_into is not None)
            _sum_rows(batch, into.up_bias, d_projected)
        else:
            activated = spec.activate(projected)
        if into.down is not None:
            scaled = activated.mul_(scale).to(dtype)
            multiply.outer(batch, into.down, g.to(dtype), scaled, spec, "down total", accumulate=down_into is not None)
    return _filled(into, tokens, weights, experts, up_into, down_into)


def _to_fill(
    wanted: Gradients,
    tokens: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    counts: Tensor,
    up_into: Tensor | None,
    down_into: Tensor | None,
) -> Gradients:
    """What the backward writes or adds to. Sums over several experts or rows are float32, or wider where tokens are;
    of a matrix the experts with rows will be written whole."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    without = (counts == 0).nonzero().flatten().tolist()
    return Gradients(
        tokens=torch.zeros(tokens.shape, dtype=wide) if wanted.tokens else None,
        weights=torch.zeros(weights.numel(), dtype=wide) if wanted.weights else None,
        up=up_into if up_into is not None else new_gradient(experts.up, without) if wanted.up else None,
        down=down_into if down_into is not None else new_gradient(experts.down, without) if wanted.down else None,
        up_bias=_zeros_like(experts.up_bias, wide) if wanted.up_bias else None,
        down_bias=_zeros_like(experts.down_bias, wide) if wanted.down_bias else None,
    )


def _filled(
    into: Gradients,
    tokens: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    up_into: Tensor | None,
    down_into: Tensor | None,
) -> Gradients:
    """What `_to_fill` gave, in the dtypes of what it is the gradient of, less what was added to in place."""
    return Gradients(
        tokens=_narrowed(into.tokens, tokens),
        weights=None if into.weights is None else into.weights.view(weights.shape).to(weights.dtype),
        up=into.up if up_into is None else None,
        down=into.down if down_into is None else None,
        up_bias=_narrowed(into.up_bias, experts.up_bias),
        down_bias=_narrowed(into.down_bias, experts.down_bias),
    )


def _weight_gradient(
    batch: Batch,
    d_activated: Float[Tensor, "n I"],
    activated: Float[Tensor, "n I"],
    g: Float[Tensor, "n O"],
    experts: ExpertWeights,
) -> Float[Tensor, " n"]:
    """Of the routing weights of a batch: rowsum(A' A), and of the bias, which is weighed too."""
    d_scale = (d_activated * activated).sum(dim=1)
    if experts.down_bias is not None:
        d_scale += (experts.down_bias[batch.expert_of_row()] * g).sum(dim=1, dtype=d_scale.dtype)
    return d_scale


def _biased(
    product: Float[Tensor, "n b"], bias: Tensor | None, batch: Batch, wide: torch.dtype
) -> Float[Tensor, "n b"]:
    """product + bias in the wider dtype: rounded to 16 bits in between it would be half as exact. In place where the
    dtype stays."""
    if bias is None:
        return product.to(wide)
    return _row_major(product, wide).add_(bias[batch.expert_of_row()])


def _row_major(product: Tensor, dtype: torch.dtype) -> Tensor:
    """`product` in a wider dtype and row-major, where AMX leaves it column-major in bfloat16: adding columns to rows
    takes ten times as long. Where the dtype stays, the product itself."""
    return product.to(dtype, memory_format=torch.contiguous_format)


def _sum_rows(batch: Batch, into: Tensor | None, rows: Float[Tensor, "n b"]) -> None:
    if into is not None:
        into.index_add_(0, batch.expert_of_row(), rows.to(into.dtype))


def _activate_by_row(spec: ExpertSpec, projected: Float[Tensor, "n U"]) -> Float[Tensor, "n I"]:
    """`spec.activate` such that a value does not depend on its place: torch computes the last few numbers of a run with
    another exponential than the others, so runs are made whole multiples of its vectors, in one thread. And it leaves
    the GELU of one row to oneDNN, not that of several gates side by side: rows come in pairs, or always one by one."""
    width = projected.shape[1] // (2 if spec.gated else 1)
    more = -width % VECTORS
    rows = max(1, SERIAL // (width + more) // 2 * 2)
    odd = len(projected) % min(rows, 2)
    padded = projected
    if (more or odd) and spec.gated and not spec.interleaved:
        padded = F.pad(projected.unflatten(1, (2, width)), (0, more, 0, 0, 0, odd)).flatten(1)
    elif more or odd:
        padded = F.pad(projected, (0, 2 * more if spec.gated else more, 0, odd))
    activated = [spec.activate(some) for some in padded.split(rows)]
    return torch.cat(activated)[: len(projected), :width]


def _zeros_like(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else torch.zeros(bias.shape, dtype=dtype)


def _narrowed(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if gradient is None or of is None else gradient.to(of.dtype)


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


register_kernels("cpu", forward, backward)
