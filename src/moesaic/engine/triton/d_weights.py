"""The gradient of the routing weights: the parts that column tiles left, added in order."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moesaic.engine.triton.layout import Layout

SLOTS = 256  # assignments a program


def d_weights(partials: Float[Tensor, "p S"], layout: Layout, like: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Each assignment's sum over its row's parts; 0 where it names no expert. In the dtype of `like`."""
    out = like.new_empty(like.shape)
    n = like.numel()
    _d_weights[(triton.cdiv(n, SLOTS),)](partials, layout.row_of, out, n, len(partials), SLOTS)
    return out


@triton.jit(do_not_specialize=["n"])
def _d_weights(partials, row_of, out, n, parts, SLOTS: tl.constexpr):
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_of + slots, mask=slots < n, other=-1)
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    for _part in range(parts):
        total += tl.load(partials + row, mask=row >= 0, other=0.0)
        partials += n
    tl.store(out + slots, total.to(out.dtype.element_ty), mask=slots < n)
