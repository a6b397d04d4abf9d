"""One cell on a GPU: everybody judged against float64, the right ones timed in turn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.bench.ceiling import Ceiling, Phase
from moesaic.bench.contenders import Call
from moesaic.bench.gate import truth_of
from moesaic.bench.gpu.cells import INVARIANT, OURS, GpuCell
from moesaic.bench.gpu.clock import CudaClock
from moesaic.bench.gpu.contenders import contenders_named
from moesaic.bench.gpu.judge import check_device, checked_replay, judge
from moesaic.bench.gpu.limits import Bandwidth, kernels_of, matmul_flops
from moesaic.bench.gpu.truth import rows_within
from moesaic.bench.problem import Problem, make_problem
from moesaic.bench.runner import Row, failed, fill, forget_gradients, run_once
from moesaic.bench.timing import Clock, Entrant, interleave, plan_rounds
from moesaic.types import ExpertWeights

ROUNDS, CELL_SECONDS = 10, 6.0  # wanted, more where they are short; for the rounds of one cell
WARM = 2  # runs before the rounds
DECODE_CALLS = 16  # in one graph, each on other experts
TRUTH_SECONDS = 0.5  # of float64 matmuls


class Bench(NamedTuple):
    """What every cell is measured with. flops: P by dtype. rounds: None for what suits the time they take."""

    clock: Clock
    flops: dict[str, float]
    bandwidth: Bandwidth
    rounds: int | None = None

    def ceiling(self, dtype: str) -> Ceiling:
        return Ceiling(self.flops[dtype], self.bandwidth.copy)


@dataclass
class Measured:
    """A cell with its rows. facts: what has no place in a row.  note: why the whole cell has no numbers."""

    cell: GpuCell
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    least_ms: float | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"kind": "cell", "key": self.cell.key, **asdict(self), "rows": rows}

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Measured":
        rows = [Row.of(row) for row in line["rows"]]
        return cls(GpuCell.of(line["cell"]), rows, line["facts"], line["note"], line["least_ms"], line["seconds"])

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def run_experts(cell: GpuCell, experts: ExpertWeights, bench: Bench) -> Measured:
    problem = make_problem(cell.problem_cell, experts)
    truth = truth_of(problem, rows_within(problem, TRUTH_SECONDS * bench.flops["float64"]))
    judged = judge(problem, truth, contenders_named(cell.who), bench.clock)
    rows_compared = len(truth.rows)
    del truth
    result = Measured(cell, [entry.row for entry in judged], {"rows_compared": rows_compared})
    calls = {entry.row.name: entry.call for entry in judged if entry.call is not None}
    entrants = [_entrant(problem, name, calls) for name in calls]
    seconds = timed(result, entrants, {e.row.name: e.seconds for e in judged if e.call is not None}, bench)
    problem.forget_gradients(weights_too=True)
    phases = [phase for _, phase in kernels_of(problem)]
    result.least_ms = fill(result.rows, seconds, phases, bench.ceiling(cell.dtype), matmul_flops(problem))
    return result


def _entrant(problem: Problem, name: str, calls: Mapping[str, Call]) -> Entrant:
    keeps = problem.cell.accumulates

    def run() -> Tensor:
        return run_once(problem, calls[name])

    return Entrant(name, lambda: forget_gradients(problem, *calls.values(), weights_too=not keeps), run)


def timed(
    result: Measured, entrants: Sequence[Entrant], once: dict[str, float], bench: Bench
) -> dict[str, list[float]]:
    """Seconds of every run, after some that nobody times: who fails in those has a note in its row and no seconds.
    `once`: what one took, to plan by."""
    able = {}
    for entrant in entrants:
        try:
            for _ in range(WARM if bench.rounds is None else 0):
                entrant.prepare()
                entrant.run()
            bench.clock.wait()
        except Exception as error:
            row = result.row(entrant.name)
            assert row is not None
            row.note = failed(error)
            check_device(bench.clock, entrant.name, result.rows)
            continue
        able[entrant.name] = entrant
    if not able:
        return {}
    once = {name: once[name] for name in able}
    planned = dict.fromkeys(once, bench.rounds) if bench.rounds else plan(once)
    return interleave(list(able.values()), planned, bench.clock)


def plan(once: dict[str, float]) -> dict[str, int]:
    ours = [name for name in once if name.startswith((OURS, INVARIANT))]
    return {name: max(1, n) for name, n in plan_rounds(once, ROUNDS, never_few=ours, allowed=CELL_SECONDS).items()}


def run_decode(cell: GpuCell, experts: ExpertWeights, bench: Bench) -> Measured:
    """A few tokens, in a graph of many calls, each on experts that the ones before have not touched where there are
    enough: weights come from memory. Rows "(graph)" per call, the others launched one by one, the device kept waiting
    until they are; what Python and launching take is in facts["host_us"]."""
    problem = make_problem(cell.problem_cell, experts)
    truth = truth_of(problem, rows_within(problem, math.inf))
    judged = judge(problem, truth, contenders_named(cell.who), bench.clock)
    routes = disjoint_ids(problem, DECODE_CALLS if bench.clock.is_cuda else 2)
    result, entrants, once, calls_in = Measured(cell), [], {}, {}
    host_us: dict[str, float] = {}
    for entry in judged:
        result.rows.append(entry.row)
        if entry.call is None:
            continue
        calls = [_forward(problem, entry.call, ids) for ids in routes]
        add = _rotating(entry.row.name, calls)
        entrants.append(add)
        once[add.name], calls_in[add.name] = entry.seconds, 1
        if isinstance(bench.clock, CudaClock):
            host_us[add.name] = 1e6 * bench.clock.host_seconds(calls)
        graph = Row(f"{entry.row.name} (graph)", entry.row.kind, errors=entry.row.errors)
        result.rows.append(graph)
        try:
            graph.note = bench.clock.why_no_graph(calls[0])
            if not graph.note:
                # of a peer bits need not repeat
                replay = bench.clock.replay(calls) if graph.kind == "peer" else checked_replay(calls, bench.clock)
                entrants.append(Entrant(graph.name, lambda: None, replay))
                once[graph.name], calls_in[graph.name] = entry.seconds, len(calls)
        except Exception as error:
            graph.note = failed(error)
            check_device(bench.clock, graph.name, result.rows)
    seconds = timed(result, entrants, once, bench)
    per_call = {name: [run / calls_in[name] for run in runs] for name, runs in seconds.items()}
    active = sum(len(ids.unique()) for ids in routes) / len(routes)
    phases = [_with_active(problem, active)]
    ceiling = Ceiling(bench.flops[cell.dtype], bench.bandwidth.best)
    result.least_ms = fill(result.rows, per_call, phases, ceiling)
    result.facts = {"active_experts": active, "bytes": phases[0].bytes, "calls": len(routes), "host_us": host_us}
    return result


def disjoint_ids(problem: Problem, count: int) -> list[Tensor]:
    """Expert ids for so many calls: a shuffle of all experts dealt out to the calls while it lasts, then another."""
    n_experts, shape = problem.config.n_routed_experts, problem.expert_ids.shape
    if problem.expert_ids.numel() > n_experts:  # every call reads most experts anyway
        generator = torch.Generator().manual_seed(0)
        draws = (torch.rand(shape[0], n_experts, generator=generator).topk(shape[1]).indices for _ in range(count))
        return [ids.to(problem.expert_ids.device) for ids in draws]
    generator = torch.Generator().manual_seed(0)
    a_shuffle = n_experts // problem.expert_ids.numel()
    found: list[Tensor] = []
    while len(found) < count:
        order = torch.randperm(n_experts, generator=generator)[: a_shuffle * problem.expert_ids.numel()]
        found += order.view(a_shuffle, *shape).to(problem.expert_ids.device).unbind()
    return found[:count]


def _with_active(problem: Problem, active: float) -> Phase:
    """All of a forward as one phase: at so few rows every kernel waits for weights."""
    experts, n_tokens = problem.experts, len(problem.tokens)
    one = sum(w[0].nbytes for w in experts if w is not None)
    item, k = experts.up.element_size(), problem.expert_ids.shape[1]
    width = problem.config.moe_intermediate_size or 0
    rows = item * n_tokens * (2 * problem.config.hidden_size * (1 + k) + 2 * k * width)
    return Phase(matmul_flops(problem), active * one + rows)


def _forward(problem: Problem, call: Call, ids: Tensor) -> Callable[[], Tensor]:
    tokens, weights = problem.tokens.detach(), problem.weights.detach()

    def run() -> Tensor:
        with torch.no_grad():
            return call(tokens, ids, weights)

    return run


def _rotating(name: str, calls: Sequence[Callable[[], Tensor]]) -> Entrant:
    number = 0

    def run() -> Tensor:
        nonlocal number
        number += 1
        return calls[number % len(calls)]()

    return Entrant(name, lambda: None, run)


def run_memory(cell: GpuCell, experts: ExpertWeights, bench: Bench) -> Measured:
    """Bytes that the forward leaves for the backward, and the peaks of both, the tokens counted, weights, gradients of
    weights and what the forward returns not."""
    problem = make_problem(cell.problem_cell, experts)
    truth = truth_of(problem, rows_within(problem, TRUTH_SECONDS * bench.flops["float64"]))
    judged = judge(problem, truth, contenders_named(cell.who), bench.clock)
    del truth
    result = Measured(cell, facts=_expected_bytes(problem))
    for entry in judged:
        result.rows.append(entry.row)
        if entry.call is None:
            continue
        call, clock, x = entry.call, bench.clock, problem.tokens.nbytes
        try:
            forget_gradients(problem, call, weights_too=True)
            out, held, peak = clock.peak_of(lambda call=call: call(problem.tokens, problem.expert_ids, problem.weights))
            _, _, back = clock.peak_of(lambda out=out: out.backward(problem.out_grad))
        except Exception as error:
            entry.row.note = failed(error)
            check_device(clock, entry.row.name, result.rows)
            continue
        grads = sum(p.nbytes for p in problem.parameters())
        kept = held - out.nbytes + x
        numbers = {"held": kept, "forward_peak": peak + x, "backward_peak": kept + back - grads}
        result.facts[entry.row.name] = numbers
        entry.row.extra_bytes = max(numbers["forward_peak"], numbers["backward_peak"], 0)
        forget_gradients(problem, call, weights_too=True)
        del out
    return result


def _expected_bytes(problem: Problem) -> dict[str, int]:
    """X, H, A, Y of the design, and 16 bytes an assignment for the order of the rows."""
    item, assignments = problem.experts.up.element_size(), problem.expert_ids.numel()
    d = problem.config.hidden_size
    up, down = (w[0].numel() // d for w in problem.experts[:2] if w is not None)
    parts = {"X": problem.tokens.numel(), "H": assignments * up, "A": assignments * down, "Y": assignments * d}
    return {**{name: item * size for name, size in parts.items()}, "metadata": 16 * assignments}
