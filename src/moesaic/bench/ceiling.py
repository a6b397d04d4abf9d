"""The machine's own limits: what a large GEMM and a read of memory reach, and the least time a cell can take.

t = sum over the matmuls of max(F / P, Q / B): they run one after the other, so the limits add (roofline).
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moesaic.bench.problem import Problem
from moesaic.engine.matmul_forms import onednn_linear

SQUARE = 2048
SMALL, HOPELESS = 256, 4.0  # a form so much slower at that size is not tried further: 16 bits can take 20 s at 2048
STREAM = 256 << 20  # bytes, or eight times the cache
REPEATS = 5


class Ceiling(NamedTuple):
    """flops: of the best large square GEMM of a dtype, 1/s.  bytes: read from memory, 1/s."""

    flops: float
    bytes: float


class Phase(NamedTuple):
    """One matmul over all active experts: its floating point operations and the bytes it cannot avoid moving."""

    flops: float
    bytes: float


def least_seconds(phases: Sequence[Phase], ceiling: Ceiling) -> float:
    return sum(max(phase.flops / ceiling.flops, phase.bytes / ceiling.bytes) for phase in phases)


def phases_of(problem: Problem) -> list[Phase]:
    """The two matmuls of a forward, and the four of a backward where the cell trains.

    Weights are read once a pass, activations written and read once; a fresh gradient is written whole, inactive experts
    included, and an accumulated one is read and written where experts are active. Cache is not counted on.
    """
    up, down = problem.experts.up, problem.experts.down
    item, n_experts = up.element_size(), len(up)
    assignments = problem.expert_ids.numel()
    active = sum(count > 0 for count in problem.counts)
    i = problem.config.moe_intermediate_size or 0
    token_bytes, hidden_bytes = item * problem.tokens.numel(), item * assignments * i
    saved_bytes = item * assignments * (up[0].numel() // problem.config.hidden_size)  # H, before the activation
    sizes = {"up": up[0].numel(), "down": down[0].numel()}
    flops = {name: 2.0 * assignments * size for name, size in sizes.items()}
    read = {name: item * active * size for name, size in sizes.items()}
    kept = saved_bytes if problem.cell.mode != "forward" else hidden_bytes
    phases = [
        Phase(flops["up"], read["up"] + token_bytes + kept),
        Phase(flops["down"], read["down"] + hidden_bytes + token_bytes),
    ]
    if not problem.cell.trains:
        return phases
    accumulates = problem.cell.accumulates
    grad = {name: item * (2 * active if accumulates else n_experts) * size for name, size in sizes.items()}
    return [
        *phases,
        Phase(flops["down"], read["down"] + token_bytes + hidden_bytes),  # gradient of the hidden rows
        Phase(flops["down"], grad["down"] + token_bytes + hidden_bytes),
        Phase(flops["up"], read["up"] + saved_bytes + token_bytes),  # gradient of the tokens
        Phase(flops["up"], grad["up"] + saved_bytes + token_bytes),
    ]


def measure_ceiling(dtype: str) -> Ceiling:
    """P and B with the threads torch has now. Takes about a second.

    P of a 16-bit dtype is the better of its own GEMM and float32's, widening included: an engine may choose.
    """
    seconds = {name: best_seconds(form) for name, form in _squares(dtype, SMALL).items() if can_run(form)}
    worth_it = [name for name, took in seconds.items() if took < HOPELESS * min(seconds.values())]
    large = _squares(dtype, SQUARE)
    return Ceiling(2.0 * SQUARE**3 / min(best_seconds(large[name]) for name in worth_it), read_speed())


def _squares(dtype: str, size: int) -> dict[str, Callable[[], object]]:
    """Ways to multiply two square matrices, by name."""
    a = torch.randn(size, size)
    forms: dict[str, Callable[[], object]] = {"onednn": lambda: onednn_linear(a, a)}
    if dtype == "float32":
        return forms | {"nt": lambda: a @ a.T, "nn": lambda: a @ a}
    narrow = a.to(getattr(torch, dtype))
    return forms | {
        "widened": lambda: narrow.float() @ narrow.float().T,
        "own": lambda: narrow @ narrow.T,
        "own nn": lambda: narrow @ narrow,
        "own onednn": lambda: onednn_linear(narrow, narrow),
    }


def read_speed() -> float:
    """Bytes per second of summing what no cache holds."""
    stream = torch.ones(max(STREAM, 8 * l3_bytes()) // 4)
    return stream.nbytes / best_seconds(stream.sum)


def best_seconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def can_run(form: Callable[[], object]) -> bool:
    """Whether this build of torch has it, for this dtype on this CPU."""
    try:
        form()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def l3_bytes() -> int:
    """Size of the last-level cache; 32 MB where the machine does not say."""
    from moesaic.bench.machine import cache_bytes

    return cache_bytes(3) or 32 << 20
