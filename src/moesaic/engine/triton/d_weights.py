"""The gradient of the routing weights: the parts that column tiles left, added in order."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.layout import Layout

ASSIGNMENTS = 256  # of a program


def d_weights(partials: Float[Tensor, "p S"], layout: Layout, like: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Each assignment's sum over its row's parts; 0 where it names no expert. In the dtype of `like`."""
    out = like.new_empty(like.shape)
    n = like.numel()
    _d_weights[(triton.cdiv(n, ASSIGNMENTS),)](partials, layout.row_of, out, n, len(partials), ASSIGNMENTS)
    return out


@triton.jit(do_not_specialize=["n"])
def _d_weights(partials, row_of, out, n, parts, ASSIGNMENTS: tl.constexpr):
    assignment = tl.program_id(0) * ASSIGNMENTS + tl.arange(0, ASSIGNMENTS)
    row = tl.load(row_of + assignment, mask=assignment < n, other=-1)
    total = tl.zeros((ASSIGNMENTS,), dtype=tl.float32)
    for _part in range(parts):
        total += tl.load(partials + row, mask=row >= 0, other=0.0)
        partials += n
    tl.store(out + assignment, total.to(out.dtype.element_ty), mask=assignment < n)
