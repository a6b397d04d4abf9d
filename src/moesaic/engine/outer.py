"""One expert's weight gradient: the outer product of its rows, written or added up where threads do not meet.

Microseconds for a gradient 1536 x 2048 that is in memory already, AMD EPYC, 2 threads, by MKL | by oneDNN in parts:
written 632 | 564, 1316 | 530, 1443 | 918, 4164 | 2214, 14807 | 7209 at 1, 4, 32, 128, 512 rows; added to 399 | 580,
959 | 538, 1105 | 912, 3739 | 2195, 14517 | 7306.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.engine.matmul_forms import SMALL, onednn_linear
from moesaic.engine.memory import Workspace
from moesaic.engine.processor import machine

# Elements of a product, for each thread, that stay in the cache until they are rounded or added: 4 MB of float32 for
# two threads. On AMD half of that takes 5 to 20 % longer, a quarter 10 to 40 %; on Intel half is 0 to 7 % faster.
PART = 1 << 19
GRAIN = 64  # rows of a part, for each thread, are whole multiples of it: 580 instead of 650 µs for 1024 x 1792
# A matrix with rows of whole pages, or half ones, has them all in the same few lines of the cache, and one that is
# written through a few rows of x waits for that: with 16 columns more 729 instead of 1400 µs at 8 rows, 1536 x 2048.
ALIASED, PADDING = 512, 16

# MKL adds up to so many rows straight into a gradient and packs it for more, on Intel 1090 | 2255 µs at 44 | 48 rows,
# 1536 x 2048. Two times 24 rows take 1700, 2 x 32 2020 instead of 2590, 3 x 32 2740 instead of 3140; at 128 it is even.
CHUNK, CHUNKED = 44, 3 * 44


def add_outer(out: Tensor, g: Tensor, x: Tensor, work: Workspace, *, accumulate: bool) -> None:
    """out [b, a] (+)= g.T [b, m] @ x [m, a], in place; an `out` of another dtype is rounded once."""
    onednn = machine() == "amd" and g.dtype == torch.float32 and out.numel() >= SMALL
    if out.dtype == g.dtype and (len(g) == 1 or not onednn):
        outer_by_rows(out, g, x, beta=float(accumulate))
        return
    # An `out` narrower than the product is widened and added to there: out.add_(product) copies it to new memory for
    # that, a third of the time.
    widened = accumulate and out.itemsize < g.itemsize
    width, rows = out.shape[1], part_rows(out)
    if width % ALIASED == 0:
        x = F.pad(x, (0, PADDING))
    for some, columns in zip(out.split(rows), g.split(rows, 1), strict=True):
        scratch = work.take("outer", len(some), x.shape[1], g.dtype)
        if widened:
            scratch[:, :width] = some
        if onednn:
            product = onednn_linear(columns.mT, x.mT)
            product = product.add_(scratch) if widened else product
        else:
            outer_by_rows(scratch, columns, x, beta=float(widened))
            product = scratch
        if accumulate and not widened:
            some.add_(product[:, :width])
        else:
            some.copy_(product[:, :width])


def part_rows(out: Tensor) -> int:
    """How many rows of a gradient are multiplied at a time."""
    threads = torch.get_num_threads()
    parts = max(1, out.numel() // (PART * threads))
    return -(-len(out) // (parts * GRAIN * threads)) * GRAIN * threads


def outer_by_rows(out: Tensor, g: Tensor, x: Tensor, *, beta: float) -> None:
    """out = beta out + g.T @ x, each thread on rows of its own, a few of g and x at a time where that pays (`CHUNK`).

    Left to itself MKL may give threads columns, and to a single row of x one thread. Then two threads write into every
    new page, and the `copy_` that rounds, whose threads have rows, reads half of it from the other core's cache. Where
    the cores share none, a backward of 256 experts took 1.9 instead of 0.8 s, one that rounds 747 instead of 694 ms.
    """
    chunks = -(-len(g) // CHUNK) if _in_chunks(out, g) else 1
    for some, others in zip(g.tensor_split(chunks), x.tensor_split(chunks), strict=True):
        _add_product(out, some, others, beta)
        beta = 1.0


def _in_chunks(out: Tensor, g: Tensor) -> bool:
    measured = machine() == "intel" and g.dtype == out.dtype == torch.float32  # in 16 bits each chunk would round
    return measured and len(g) <= CHUNKED and out.numel() >= SMALL


def _add_product(out: Tensor, g: Tensor, x: Tensor, beta: float) -> None:
    """A batch of one matmul a thread, and the rows that are left."""
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
