"""Sort by expert, then two matmuls per active expert. Any device, any dtype, differentiable by autograd."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.checks import check_dtypes, check_ids, check_inputs
from moesaic.engine.plan import group_by_expert
from moesaic.engine.reference import with_zero_gradients
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


def grouped(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
) -> Float[Tensor, "T O"]:
    """The same sum as the reference, expert by expert; no [T*K, D] tensor is made.

    Deterministic: a token meets an expert at most once, so no two rows of one `index_add` fall on the same row. The
    sum runs in the wider of float32 and the tokens' dtype. Reads ids and counts on the host, so on a GPU it waits.

    Raises ValueError for inputs that do not fit together and ids that name no expert.
    """
    check_inputs(tokens, expert_ids, weights, experts, spec)
    check_dtypes(tokens, experts)
    n_experts, k = len(experts.up), expert_ids.shape[-1]
    check_ids(expert_ids, n_experts)
    plan = group_by_expert(expert_ids, n_experts)
    # unbind, not indexing: the backward of weights[e] would fill a zero tensor as large as all experts, E times over
    up, down = experts.up.unbind(), experts.down.unbind()
    flat_weights = weights.flatten()
    wide = torch.promote_types(tokens.dtype, torch.float32)
    out = tokens.new_zeros(len(tokens), spec.output_size(experts), dtype=wide)
    start = 0
    for expert, count in enumerate(plan.counts.tolist()):
        if count == 0:
            continue
        assignments = plan.assignments[start : start + count]
        rows = assignments // k
        start += count
        up_bias = None if experts.up_bias is None else experts.up_bias[expert]
        down_bias = None if experts.down_bias is None else experts.down_bias[expert]
        hidden = spec.activate(spec.project(tokens[rows], up[expert], up_bias))
        expert_out = spec.project(hidden, down[expert], down_bias)
        out = out.index_add(0, rows, (flat_weights[assignments, None] * expert_out).to(wide))
    out = out.to(tokens.dtype)
    return out if start else with_zero_gradients(out, tokens, weights, *experts)
