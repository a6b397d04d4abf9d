"""Small tasks for the tests of `moesaic bench`."""

from moesaic.bench.ceiling import Ceiling
from moesaic.bench.problem import Problem, make_experts, make_problem
from moesaic.bench.shapes import MODES, Cell

CEILING = Ceiling(flops=1e12, bytes=1e10)
TIMED = [mode for mode in MODES if mode not in ("memory", "router")]


def problem_of(shape="tiny", tokens=12, dtype="float32", mode="forward", routing="balanced", **fields) -> Problem:
    return make_problem(Cell(shape, tokens, dtype, mode, routing, **fields), make_experts(shape, dtype))
