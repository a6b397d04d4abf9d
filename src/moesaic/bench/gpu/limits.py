"""What the GPU could do at best: peaks measured in the run, and the work and bytes of every kernel of an MoE layer.

The least time of a cell is the sum over its kernels of max(F / P, Q / B): they run one after the other (roofline).
"""

from typing import NamedTuple

import torch

from moesaic.bench.ceiling import Phase
from moesaic.bench.problem import Problem
from moesaic.bench.timing import Clock

SQUARES = {"bfloat16": (8192, 16384), "float16": (8192, 16384), "float32": (8192,), "float64": (4096,)}
STREAM = 4 << 30  # bytes of a copy: nothing of it stays in a cache
SMOKE_SQUARE, SMOKE_STREAM = 64, 1 << 16
REPEATS = 8


class Bandwidth(NamedTuple):
    """Bytes per second. copy: read and written, both counted.  read: read alone."""

    copy: float
    read: float

    @property
    def best(self) -> float:
        return max(self)


def measure_flops(dtype: str, clock: Clock) -> float:
    """P: operations per second of the best large square matmul, on random numbers (zeros draw less power)."""
    best = 0.0
    for size in SQUARES[dtype] if clock.is_cuda else (SMOKE_SQUARE,):
        a = torch.randn(size, size, device=clock.device).to(getattr(torch, dtype))
        for b in (a, a.mT):
            best = max(best, 2.0 * size**3 / _best(lambda a=a, b=b: a @ b, clock))
    return best


def measure_bandwidth(clock: Clock) -> Bandwidth:
    size = STREAM if clock.is_cuda else SMOKE_STREAM
    source = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), clock)
    return Bandwidth(copy, source.nbytes / _best(source.sum, clock))


def kernels_of(problem: Problem) -> list[tuple[str, Phase]]:
    """(name, least work and bytes) of every kernel, in order. Weights of active experts are read once a kernel, rows
    are written once and read once; a fresh gradient of a matrix is written whole, one that is added to read and written
    where experts are active."""
    up, down = problem.experts.up, problem.experts.down
    item, assignments = up.element_size(), problem.expert_ids.numel()
    active = sum(count > 0 for count in problem.counts)
    ups, downs = up[0].numel(), down[0].numel()  # parameters of one expert
    d = problem.config.hidden_size
    x = item * problem.tokens.numel()
    h, a, y = (item * assignments * width for width in (ups // d, downs // d, d))
    keeps = problem.cell.mode != "forward"
    grads = 2 * active if problem.cell.accumulates else len(up)
    up_flops, down_flops, sum_flops = (2.0 * assignments * n for n in (ups, downs, d))
    forward = [
        ("_up", Phase(up_flops, item * active * ups + x + a + (h if keeps else 0))),
        ("_matmul", Phase(down_flops, item * active * downs + a + y)),
        ("_combine", Phase(sum_flops, y + x)),
    ]
    if not problem.cell.trains:
        return forward
    return [
        *forward,
        ("_d_hidden", Phase(down_flops, item * active * downs + x + 2 * h + a)),
        ("_outer", Phase(down_flops, item * grads * downs + x + a)),
        ("_outer", Phase(up_flops, item * grads * ups + x + h)),
        ("_matmul", Phase(up_flops, item * active * ups + h + y)),
        ("_combine", Phase(sum_flops, y + x)),
    ]


def matmul_flops(problem: Problem) -> float:
    """What TF/s are counted from: 6 T K D I for a forward, 18 with the backward (gated experts)."""
    up, down = problem.experts.up, problem.experts.down
    forward = 2.0 * problem.expert_ids.numel() * (up[0].numel() + down[0].numel())
    return 3 * forward if problem.cell.trains else forward


def _best(run, clock: Clock) -> float:
    run()
    return min(ticket() for ticket in [clock.time(run) for _ in range(REPEATS)])
