"""Correct first: a contender against float64 on a sample of rows and experts. A wrong row has no speed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.bench.problem import Problem
from moesaic.types import ExpertWeights

ROWS = 8
EXPERTS = 2
# of `largest_error`. float32: sums of thousands of products; 16 bits: a few roundings.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
SANE = 10.0  # times these bounds: more than that is no rounding, and then eager is no measure either
TIMES_PEER = 1.5  # or no worse than this times the error of a peer, whichever allows more


GradsOf = Callable[[int], list[Tensor | None]]
Distance = Callable[[Tensor, Tensor], float]  # (found, float64 truth) -> error


class Truth(NamedTuple):
    """float64 results for some rows, and weight gradients of some experts. Gradients are empty where nothing trains."""

    rows: Tensor  # [R]
    out: Tensor  # [R, O]
    token_grad: Tensor  # [R, D]
    weight_grad: Tensor  # [R, K]
    expert_grads: dict[int, list[Tensor]]  # expert -> gradients of its weights, in the order of ExpertWeights


def truth_of(problem: Problem, rows: Tensor | None = None) -> Truth:
    """One expert at a time, widened for it alone, so that memory stays small. `rows`: evenly spread ones, a few unless
    given. Takes a second or two for large experts on a CPU."""
    rows = spread_rows(problem, ROWS) if rows is None else rows
    trains, spec, ids = problem.cell.trains, problem.spec, problem.expert_ids[rows]
    tokens, weights, out_grad = (t.detach()[rows].double() for t in (problem.tokens, problem.weights, problem.out_grad))
    out = tokens.new_zeros(len(rows), spec.output_size(problem.experts))
    token_grad, weight_grad = torch.zeros_like(tokens), torch.zeros_like(weights)
    for expert in ids.unique().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        x, scale = tokens[row].requires_grad_(trains), weights[row, slot].requires_grad_(trains)
        part = _expert(problem, one_expert(problem.experts, expert), x, scale)
        out.index_add_(0, row, part.detach())
        if trains:
            x_grad, scale_grad = torch.autograd.grad(part, (x, scale), out_grad[row])
            token_grad.index_add_(0, row, x_grad)
            weight_grad[row, slot] = scale_grad
    expert_grads = {e: gradients_of(problem, e) for e in sampled_experts(problem)} if trains else {}
    return Truth(rows, out, token_grad, weight_grad, expert_grads)


def spread_rows(problem: Problem, count: int) -> Tensor:
    """So many rows of a problem, or all where it has fewer, evenly spread."""
    n_tokens = len(problem.tokens)
    return torch.linspace(0, n_tokens - 1, min(count, n_tokens), device=problem.tokens.device).round().long()


def largest_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over largest value."""
    largest = float(truth.abs().max())
    difference = float((found.double() - truth).abs().max())
    return difference / largest if largest else difference


def errors_of(
    problem: Problem,
    truth: Truth,
    out: Tensor,
    *,
    passes: int = 1,
    grads_of: GradsOf | None = None,
    distance: Distance = largest_error,
) -> dict[str, float]:
    """The error by what was compared. `passes`: how often gradients were accumulated.

    grads_of: where an expert's gradients lie, for calls whose leaves are not the problem's Parameters.
    """
    grads_of = grads_of or problem.expert_grads
    errors = {"out": distance(out.detach()[truth.rows], truth.out)}
    if not problem.cell.trains:
        return errors
    token_grad, weight_grad = problem.tokens.grad, problem.weights.grad
    errors["token_grad"] = math.inf if token_grad is None else distance(token_grad[truth.rows], truth.token_grad)
    errors["weight_grad"] = math.inf if weight_grad is None else distance(weight_grad[truth.rows], truth.weight_grad)
    worst = 0.0
    for expert, truths in truth.expert_grads.items():
        for grad, expected in zip(grads_of(expert), truths, strict=True):
            found = math.inf if grad is None else distance(grad, passes * expected)
            worst = found if math.isnan(found) else max(worst, found)
    errors["expert_grad"] = worst
    return errors


def is_right(errors: dict[str, float], of_peer: dict[str, float], bound: float) -> bool:
    """False also where an error is NaN. `of_peer`: errors of who is the measure, or nothing."""
    return all(error <= max(bound, TIMES_PEER * of_peer.get(what, 0.0)) for what, error in errors.items())


def one_expert(experts: ExpertWeights, expert: int) -> ExpertWeights:
    """In float64, without the axis of experts."""

    def cut(weight: Tensor) -> Tensor:
        return weight.detach()[expert].double()

    up_bias, down_bias = (None if bias is None else cut(bias) for bias in (experts.up_bias, experts.down_bias))
    return ExpertWeights(cut(experts.up), cut(experts.down), up_bias, down_bias)


def _expert(problem: Problem, one: ExpertWeights, x: Tensor, scale: Tensor) -> Tensor:
    """What one expert makes of rows, times their routing weights."""
    spec = problem.spec
    return spec.project(spec.activate(spec.project(x, one.up, one.up_bias)), one.down, one.down_bias) * scale[:, None]


def sampled_experts(problem: Problem) -> list[int]:
    """The least loaded experts that have work, which keeps float64 cheap, the most loaded, whose rows may be cut into
    pieces, and an idle one, whose gradient is zero."""
    counts = problem.counts
    active = sorted((e for e, count in enumerate(counts) if count), key=lambda e: counts[e])
    few = active[: EXPERTS - 1]
    return few + [e for e in active[-1:] if e not in few] + [e for e, count in enumerate(counts) if not count][:1]


def gradients_of(problem: Problem, expert: int) -> list[Tensor]:
    """In float64, of one expert's weights, from all of its rows."""
    rows, slots = (problem.expert_ids == expert).nonzero(as_tuple=True)
    one = one_expert(problem.experts, expert)
    weights = [weight.requires_grad_() for weight in one if weight is not None]
    tokens, scale = problem.tokens.detach()[rows].double(), problem.weights.detach()[rows, slots].double()
    out = _expert(problem, one, tokens, scale)
    return list(torch.autograd.grad(out, weights, problem.out_grad[rows].double()))
