"""What judges a result on a GPU: all rows where that is quick, else evenly spread ones, and the worst by itself."""

from torch import Tensor

from moesaic.bench.gate import spread_rows
from moesaic.bench.problem import Problem

# of `relative_error`. float32: sums of thousands of products; 16 bits: a few roundings.
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
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


def rows_within(problem: Problem, flops: float) -> Tensor:
    """As many rows as so many operations allow, evenly spread."""
    a_row = (
        18.0 * problem.expert_ids.shape[1] * problem.config.hidden_size * (problem.config.moe_intermediate_size or 1)
    )
    return spread_rows(problem, int(min(len(problem.tokens), max(LEAST_ROWS, flops / a_row))))
