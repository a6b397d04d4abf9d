"""Cells that are no race of experts: the routing kernel, the time of each kernel."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from moesaic.bench.ceiling import Ceiling, Phase
from moesaic.bench.gating import MAY_DIFFER, rows_that_differ
from moesaic.bench.gpu.cells import COMPILED_RULES, OURS, GpuCell
from moesaic.bench.gpu.contenders import CONTENDERS
from moesaic.bench.gpu.judge import check_device, checked_replay
from moesaic.bench.gpu.limits import kernels_of
from moesaic.bench.gpu.run import Bench, Measured, timed
from moesaic.bench.problem import make_problem
from moesaic.bench.runner import Row, failed, fill, forget_gradients, run_once
from moesaic.bench.timing import Entrant
from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.types import ExpertWeights

KERNEL, EAGER_RULES = "ours: route kernel (graph)", "rules.route"
ROUTER_CALLS = 50  # in one graph, each on logits of its own
PROFILED = 3  # steps


def run_router(cell: GpuCell, bench: Bench) -> Measured:
    """Selection alone, from logits to ids and weights: the kernel in a graph, and the rules in torch."""
    config = MoEConfig.preset(cell.shape, hidden_size=1)
    clock, n_experts = bench.clock, config.n_routed_experts
    generator = torch.Generator().manual_seed(0)
    calls = ROUTER_CALLS if clock.is_cuda else 2
    many = torch.randn(calls, cell.tokens, n_experts, generator=generator).to(clock.device)
    bias = (0.05 * torch.randn(n_experts, generator=generator)).to(clock.device)
    result, entrants, once = Measured(cell), [], {}

    def add(name: str, kind: str, make: Callable[[], tuple[Callable[[], Any], int]]) -> None:
        row = Row(name, kind)
        result.rows.append(row)
        try:
            run, inside = make()
            run()
            clock.wait()
        except Exception as error:
            row.note = failed(error)
            check_device(clock, name, result.rows)
            return
        entrants.append(Entrant(name, lambda: None, run))
        once[name] = 1e-4 * inside
        result.facts[name] = inside

    def kernel() -> tuple[Callable[[], Any], int]:
        from moesaic.engine.triton.route import route as ours

        truth = route(many[0].double(), bias.double(), config)
        differing = rows_that_differ(ours(many[0], bias, config)[1:], truth[1:], n_experts)
        result.facts["rows_that_differ"] = differing
        if differing > MAY_DIFFER:
            raise ValueError(f"wrong in {differing:.1%} of the rows")
        return checked_replay([lambda logits=logits: ours(logits, bias, config) for logits in many], clock), calls

    def compiled() -> tuple[Callable[[], Any], int]:
        if not clock.is_cuda:
            raise ValueError("not compiled in a smoke run")
        torch._dynamo.reset()
        faster = torch.compile(lambda logits: route(logits, bias, config)[1:], fullgraph=True)
        return lambda: faster(many[0]), 1

    with torch.no_grad():
        add(KERNEL, "ours", kernel)
        add(EAGER_RULES, "peer", lambda: (lambda: route(many[0], bias, config), 1))
        if COMPILED_RULES in cell.who:
            add(COMPILED_RULES, "peer", compiled)
        seconds = timed(result, entrants, once, bench)
    per_call = {name: [run / result.facts[name] for run in runs] for name, runs in seconds.items()}
    moved = cell.tokens * (4 * n_experts + 12 * config.num_experts_per_tok)
    ceiling = Ceiling(bench.flops["float32"], bench.bandwidth.best)
    result.least_ms = fill(result.rows, per_call, [Phase(cell.tokens * n_experts, moved)], ceiling)
    return result


def run_kernels(cell: GpuCell, experts: ExpertWeights, bench: Bench) -> Measured:
    """Device time of each kernel of ours in one call, by torch's profiler, beside its own least time."""
    problem = make_problem(cell.problem_cell, experts)
    call = CONTENDERS[OURS].build(problem)
    result = Measured(cell, [Row(OURS, "ours")])

    def once() -> None:
        forget_gradients(problem, call, weights_too=True)
        run_once(problem, call)

    once()
    found, launches = profile(once) if bench.clock.is_cuda else ({}, {})
    least: dict[str, float] = defaultdict(float)
    ceiling = bench.ceiling(cell.dtype)
    for name, phase in kernels_of(problem):
        least[name] += max(phase.flops / ceiling.flops, phase.bytes / ceiling.bytes)
    result.facts["kernels"] = [
        {"name": name, "us": 1e6 * seconds, "launches": launches[name], "least_us": 1e6 * least.get(name, 0.0)}
        for name, seconds in sorted(found.items(), key=lambda item: -item[1])
    ]
    result.least_ms = 1e3 * sum(least.values())
    problem.forget_gradients(weights_too=True)
    return result


def profile(run: Callable[[], object]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds, launches) by kernel of one run, the mean of some."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    launches: dict[str, float] = {}
    for event in seen.key_averages():
        if event.self_device_time_total > 0:
            seconds[event.key] = 1e-6 * event.self_device_time_total / PROFILED
            launches[event.key] = event.count / PROFILED
    return seconds, launches
