"""The right results of a cell in float64, on the GPU itself: all rows where that is quick, else evenly spread ones."""

import torch
from torch import Tensor

from moesaic.bench.gate import Truth, gradients_of, one_expert, sampled_experts
from moesaic.bench.problem import Problem

# |found - truth| / |truth|. float32: sums of thousands of products; 16 bits: a few roundings.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
TIMES_TORCH = 1.5  # or no worse than this times the error of torch's own grouped_mm, whichever allows more
LEAST_ROWS = 64
WORST_ROW = 10.0  # times the bound may one row err: rounding makes 3 times the mean error, numbers of another row 100


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Euclidean norm of the difference over that of the truth; NaN where there is one. Or, where that is more, the
    norm of the worst row's difference over that of a mean row, and over WORST_ROW: in the whole of many rows a wrong
    one is lost."""
    difference = found - truth
    rows = difference.norm(dim=-1) if difference.ndim > 1 else difference.abs()
    norm, whole, worst = float(truth.norm()), float(rows.norm()), float(rows.max()) * rows.numel() ** 0.5
    return max(whole, worst / WORST_ROW) / (norm or 1.0)


def is_right(errors: dict[str, float], torch_errors: dict[str, float], dtype: str) -> bool:
    """False also where an error is NaN."""
    return all(error <= max(BOUNDS[dtype], TIMES_TORCH * torch_errors.get(what, 0)) for what, error in errors.items())


def rows_within(problem: Problem, flops: float) -> Tensor:
    """As many rows as so many operations allow, evenly spread."""
    n_tokens, k = problem.expert_ids.shape
    a_row = 18.0 * k * problem.config.hidden_size * (problem.config.moe_intermediate_size or 1)
    count = int(min(n_tokens, max(LEAST_ROWS, flops / a_row)))
    return torch.linspace(0, n_tokens - 1, count, device=problem.tokens.device).round().long()


def truth_of(problem: Problem, flops: float) -> Truth:
    """One expert at a time, with weights widened for it alone. `flops`: how much work the rows may be."""
    rows, trains, spec = rows_within(problem, flops), problem.cell.trains, problem.spec
    ids = problem.expert_ids[rows]
    tokens, weights, out_grad = (t.detach()[rows].double() for t in (problem.tokens, problem.weights, problem.out_grad))
    out = tokens.new_zeros(len(rows), spec.output_size(problem.experts))
    token_grad, weight_grad = torch.zeros_like(tokens), torch.zeros_like(weights)
    for expert in ids.unique().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        one = one_expert(problem.experts, expert)
        up_bias, down_bias = (None if bias is None else bias[0] for bias in one[2:])
        x, scale = tokens[row].requires_grad_(trains), weights[row, slot].requires_grad_(trains)
        part = spec.project(spec.activate(spec.project(x, one.up[0], up_bias)), one.down[0], down_bias) * scale[:, None]
        out.index_add_(0, row, part.detach())
        if trains:
            x_grad, scale_grad = torch.autograd.grad(part, (x, scale), out_grad[row])
            token_grad.index_add_(0, row, x_grad)
            weight_grad[row, slot] = scale_grad
    expert_grads = {e: gradients_of(problem, e) for e in sampled_experts(problem)} if trains else {}
    return Truth(rows, out, token_grad, weight_grad, expert_grads)
