"""Back from rows to tokens: each token gathers its K rows and adds them in slot order. Nothing is scattered."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.layout import Layout


def combine(
    rows: Float[Tensor, "S n"],
    weights: Float[Tensor, "T K"] | None,
    k: int,
    layout: Layout,
    out: Float[Tensor, "T n"] | None = None,
) -> Float[Tensor, "T n"]:
    """sum over k of weights[t, k] * rows[row of (t, k)], in float32; without weights the plain sum. `out`, which may be
    some columns of a tensor, is written where it is given."""
    n_tokens, width = len(rows) // k, rows.shape[1]
    out = rows.new_empty(n_tokens, width) if out is None else out
    block = min(1024, triton.next_power_of_2(width))
    _combine[(n_tokens, triton.cdiv(width, block))](
        rows,
        weights,
        layout.row_of,
        out,
        out.stride(0),
        width,
        K=k,
        COLUMNS=block,
        num_warps=max(1, min(4, block // 256)),
    )
    return out


@triton.jit
def _combine(
    rows,
    weights,
    row_of,
    out,
    out_line,
    width,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(K):
        assignment = token * K + slot
        row = tl.load(row_of + assignment).to(tl.int64)
        present = row >= 0
        there = column < tl.where(present, width, 0)  # not by `&`: see few.py
        value = tl.load(rows + row * width + column, mask=there, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + assignment, mask=present, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * out_line + column, total.to(out.dtype.element_ty), mask=inside)
