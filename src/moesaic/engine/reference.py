"""The definition of expert computation. Slow, any dtype, differentiable, and each row on its own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.checks import check_dtypes, check_ids, check_inputs
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


def reference(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
) -> Float[Tensor, "T O"]:
    """out[t] = sum over k of weights[t, k] * expert[expert_ids[t, k]](tokens[t]), summed in slot order.

    One token through one expert at a time, so a row's bits do not depend on the rows beside it: a BLAS result depends
    on the number of rows, and on how a row is aligned in memory, hence the copy. The sum runs in the wider of float32
    and the tokens' dtype.

    Raises ValueError for inputs that do not fit together and ids that name no expert.
    """
    check_inputs(tokens, expert_ids, weights, experts, spec)
    check_dtypes(tokens, experts)
    n_experts = len(experts.up)
    check_ids(expert_ids, n_experts)
    up, down = experts.up.unbind(), experts.down.unbind()
    up_bias = [None] * n_experts if experts.up_bias is None else experts.up_bias.unbind()
    down_bias = [None] * n_experts if experts.down_bias is None else experts.down_bias.unbind()
    zeros = tokens.new_zeros(1, spec.output_size(experts), dtype=torch.promote_types(tokens.dtype, torch.float32))
    empty = with_zero_gradients(zeros, tokens, weights, *experts)
    rows = [empty[:0]]
    for t, ids in enumerate(expert_ids.tolist()):
        token, row = tokens[t : t + 1].clone(), empty
        for expert, scale in zip(ids, weights[t], strict=True):
            if expert == n_experts:
                continue
            hidden = spec.activate(spec.project(token, up[expert], up_bias[expert]))
            row = row + scale * spec.project(hidden, down[expert], down_bias[expert])
        rows.append(row)
    return torch.cat(rows).to(tokens.dtype)


def with_zero_gradients(out: Float[Tensor, "T O"], *inputs: Tensor | None) -> Float[Tensor, "T O"]:
    """`out`, in which nobody has a part, such that the gradients of `inputs` are zeros: without, there is no graph."""
    nothing = [tensor[:0].sum() for tensor in inputs if tensor is not None]
    return out + torch.stack(nothing).sum().to(out.dtype)
