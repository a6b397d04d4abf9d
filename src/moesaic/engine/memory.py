"""Memory of the CPU engine: scratch that is used in turn, and the pages of a new gradient."""

import mmap
from functools import cache

import torch
from torch import Tensor

SERIAL = 32768  # elements up to which torch runs an elementwise operation in one thread
# Rows an expert on average from which the pages of a new float32 gradient are asked for in one go. One by one, between
# matmuls, they cost as much in a good hour and up to twice that in a bad one, when a virtual machine gets them from its
# host. Seconds of whole steps, one by one -> in one go, medians of 5 to 20 in turn, in several hours of an Intel Xeon:
# dsv3-quarter T=2048 2.26 | 2.33 | 2.80 -> 2.14 | 2.05 | 2.19, T=512 1.32 | 1.60 -> 1.33 | 1.32, T=128 (4 rows) 1.09 |
# 1.18 | 1.54 -> 1.11 | 1.08 | 1.25; qwen3-30b T=2048 2.67 -> 2.47, T=512 1.28 | 1.34 -> 1.29 | 1.22, but T=128 1.02 ->
# 1.04, T=64 (4 rows) 0.84 -> 0.88. In bfloat16 0 to 5 % more. Only where there are pages for all of torch's threads.
MANY_ROWS = 4


class Workspace:
    """Scratch memory that all experts of one call use in turn: fresh pages would cost more than what they hold."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        keep_freed_memory()

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised [rows, columns] matrix; its memory is handed out again when `name` is taken again."""
        size = rows * columns
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(rows, columns)


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next who asks, as it does in any process that has freed a tensor of 31 MiB.

    Until then it gives back everything larger than the largest tensor freed so far, or twice that at the end of the
    heap: a 2 MB result of oneDNN then comes in new pages every time, 1700 instead of 220 µs for a gradient of 1024 x
    1792. This one costs nothing, as its pages are never touched. (mallopt(3), M_MMAP_THRESHOLD; the most it learns from
    is 32 MiB.)
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def new_gradient(weight: Tensor, rows: int) -> Tensor:
    """Uninitialised memory for the gradient of all experts' `weight`, to which so many rows contribute.

    New pages are most of the time of 256 small experts. Asking for huge ones (madvise) hands out 1.9 GB in 0.14 instead
    of 0.55 s where the system has them at hand and in 2 to 3 s where it has to find them: whole steps took 3.7 instead
    of 3.1 and 3.6 instead of 1.6 s (medians of 7, interleaved), so that is left to the system.
    """
    gradient = torch.empty_like(weight)
    pages, many_rows = -(-gradient.nbytes // mmap.PAGESIZE), rows >= MANY_ROWS * len(weight)
    if many_rows and gradient.dtype == torch.float32 and pages >= SERIAL * torch.get_num_threads():
        gradient.as_strided((pages,), (mmap.PAGESIZE // gradient.itemsize,)).zero_()
    return gradient
