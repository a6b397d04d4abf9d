"""One expert's weight gradient: the outer product of its rows, written or added up where threads do not meet."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.engine.gemm import SMALL, Workspace

OUTER = 1 << 20  # elements of a gradient multiplied at a time and then rounded: 2340 instead of 3010 µs at 1536 x 2048
# A matrix with rows of whole pages, or half ones, has them all in the same few lines of the cache, and one that is
# written through a few rows of x waits for that: with 16 columns more 729 instead of 1400 µs at 8 rows, 1536 x 2048.
ALIASED, PADDING = 512, 16


def add_outer(out: Tensor, g: Tensor, x: Tensor, work: Workspace, *, accumulate: bool) -> None:
    """out [b, a] (+)= g.T [b, m] @ x [m, a], in place; an `out` of another dtype is rounded once."""
    if out.dtype == g.dtype:
        outer_by_rows(out, g, x, beta=float(accumulate))
        return
    # An `out` narrower than the product is widened and added to there: out.add_(product) copies it to new memory for
    # that, a third of the time.
    widened = accumulate and out.itemsize < g.itemsize
    if out.shape[1] % ALIASED == 0:
        x = F.pad(x, (0, PADDING))
    parts = max(1, out.numel() // OUTER)
    for some, columns in zip(out.tensor_split(parts), g.tensor_split(parts, 1), strict=True):
        padded = work.take("outer", len(some), x.shape[1], g.dtype)
        product = padded[:, : out.shape[1]]
        if widened:
            product.copy_(some)
        outer_by_rows(padded, columns, x, beta=float(widened))
        if accumulate and not widened:
            some.add_(product)
        else:
            some.copy_(product)


def outer_by_rows(out: Tensor, g: Tensor, x: Tensor, *, beta: float) -> None:
    """out = beta out + g.T @ x, as a batch of one matmul a thread, each of rows of its own.

    Left to itself MKL may give threads columns, and to a single row of x one thread. Then two threads write into every
    new page, and the `copy_` that rounds, whose threads have rows, reads half of it from the other core's cache. Where
    the cores share none, a backward of 256 experts took 1.9 instead of 0.8 s, one that rounds 747 instead of 694 ms.
    """
    threads = torch.get_num_threads()
    rows = len(out) // threads * threads
    if threads == 1 or g.dtype != torch.float32 or out.numel() < SMALL:
        rows = 0
    if rows:
        blocks = out[:rows].unflatten(0, (threads, -1))
        parts = g[:, :rows].unflatten(1, (threads, -1)).permute(1, 2, 0)
        torch.baddbmm(blocks, parts, x.expand(threads, -1, -1), beta=beta, out=blocks)
    if rows < len(out):
        torch.addmm(out[rows:], g[:, rows:].mT, x, beta=beta, out=out[rows:])
