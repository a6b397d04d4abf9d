"""Correct first: a contender against float64 on a sample of rows and experts. A wrong row has no speed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.bench.problem import Problem
from moesaic.engine.reference import reference
from moesaic.types import ExpertWeights

ROWS = 8
EXPERTS = 2
# largest difference over the largest value. float32: sums of thousands of products; 16 bits: a few roundings.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
SANE = 10.0  # times these bounds: more than that is no rounding, and then eager is no measure either
TIMES_EAGER = 1.5  # or no worse than this times the error of transformers' eager, whichever allows more


GradsOf = Callable[[int], list[Tensor | None]]
Distance = Callable[[Tensor, Tensor], float]  # (found, float64 truth) -> error


class Truth(NamedTuple):
    """float64 results for some rows, and weight gradients of some experts. Gradients are empty where nothing trains."""

    rows: Tensor  # [R]
    out: Tensor  # [R, O]
    token_grad: Tensor  # [R, D]
    weight_grad: Tensor  # [R, K]
    expert_grads: dict[int, list[Tensor]]  # expert -> gradients of its weights, in the order of ExpertWeights


def truth_of(problem: Problem) -> Truth:
    """One expert at a time in float64, so that memory stays small. Takes a second or two for large experts."""
    n_tokens = problem.cell.tokens
    rows = torch.linspace(0, n_tokens - 1, min(ROWS, n_tokens)).round().long()
    trains = problem.cell.trains
    tokens = problem.tokens.detach()[rows].double().requires_grad_(trains)
    weights = problem.weights.detach()[rows].double().requires_grad_(trains)
    ids, out_grad = problem.expert_ids[rows], problem.out_grad[rows].double()
    out = torch.zeros(len(rows), problem.spec.output_size(problem.experts), dtype=torch.float64)
    token_grad, weight_grad = torch.zeros_like(tokens), torch.zeros_like(weights)
    for expert in ids.unique().tolist():
        only = (ids != expert).long()  # the one expert is number 0, and 1 is "no expert"
        part = reference(tokens, only, weights, one_expert(problem.experts, expert), problem.spec)
        if trains:
            grads = torch.autograd.grad(part, (tokens, weights), out_grad)
            token_grad, weight_grad = token_grad + grads[0], weight_grad + grads[1]
        out += part.detach()
    expert_grads = {expert: gradients_of(problem, expert) for expert in sampled_experts(problem)} if trains else {}
    return Truth(rows, out, token_grad, weight_grad, expert_grads)


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


def is_right(errors: dict[str, float], eager: dict[str, float] | None, dtype: str) -> bool:
    """False also where an error is NaN. `eager` holds the errors of transformers' eager, or nothing; it is None where
    eager itself is judged."""
    if eager is None:
        return all(error <= SANE * BOUNDS[dtype] for error in errors.values())
    return all(error <= max(BOUNDS[dtype], TIMES_EAGER * eager.get(what, 0.0)) for what, error in errors.items())


def one_expert(experts: ExpertWeights, expert: int) -> ExpertWeights:
    """In float64, with an axis of one expert."""

    def cut(weight: Tensor) -> Tensor:
        return weight.detach()[expert : expert + 1].double()

    up_bias, down_bias = (None if bias is None else cut(bias) for bias in (experts.up_bias, experts.down_bias))
    return ExpertWeights(cut(experts.up), cut(experts.down), up_bias, down_bias)


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
    weights = [w[0].requires_grad_() for w in one_expert(problem.experts, expert) if w is not None]
    up, down, up_bias, down_bias = (*weights, None, None)[:4]
    spec, tokens = problem.spec, problem.tokens.detach()[rows].double()
    hidden = spec.activate(spec.project(tokens, up, up_bias))
    out = spec.project(hidden, down, down_bias) * problem.weights.detach()[rows, slots, None].double()
    return list(torch.autograd.grad(out, weights, problem.out_grad[rows].double()))
