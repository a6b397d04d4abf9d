"""Memory of the CPU engine: scratch that is used in turn, and the pages of a new gradient."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

POPULATE = 23  # MADV_POPULATE_WRITE of madvise(2), Linux 5.14
PORTION = 16 << 20  # bytes of new memory that a thread asks for at a time
# From so many bytes on it pays to ask: starting threads while torch's own still spin costs 3 ms. Steps of 16 tokens
# where up has 64, 128, 256, 512 MB (4 to 32 experts of 2048 x 1024): float32 42 -> 47, 82 -> 85, 151 -> 147, 275 -> 251
# ms; bfloat16, up to 256 MB, 80 -> 85, 142 -> 141, 258 -> 248.
LARGE = 256 << 20
# Measured with 2 threads. Each start waits for the portions that others ask for, 4 ms, so many would gain nothing.
MOST_THREADS = 8


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


def new_gradient(weight: Tensor, without: Iterable[int] = ()) -> Tensor:
    """Memory for the gradient of all experts' `weight`: zeros for those `without` rows, nothing yet for the others.

    Where it is large new pages are most of the time of small experts, so they are taken from the system directly, which
    hands them out full of zeros, and in one go (`populate`): that takes two thirds of what they cost one by one, at the
    first write, between matmuls (1.9 GB in 2 threads: 0.23 | 0.35 s, Intel Xeon). Seconds of whole steps with it |
    without, float32, medians of 7 to 30 in turn: dsv3-quarter T=128, 512 0.88 | 0.99, 1.16 | 1.33; qwen3-30b T=1, 16,
    128, 512 0.48 | 0.50, 0.59 | 0.65, 0.81 | 0.88, 1.09 | 1.20; olmoe alike; in bfloat16 2 to 9 % less. Huge pages
    (madvise) are handed out faster still where the system has them at hand, and in 2 to 3 s where it has to find them,
    so that is left to the system. Pages of experts without rows are asked for as well, or whoever first writes to them,
    after having read them, would wait: 3.9 s for a clipped norm of 1.6 GB.
    """
    pages = _pages(weight.nbytes) if weight.nbytes >= LARGE else None
    if pages is None:
        gradient = torch.empty_like(weight)
        for expert in without:
            gradient[expert].zero_()
        return gradient
    layout = torch.empty_like(weight, device="meta")
    gradient = torch.frombuffer(pages, dtype=weight.dtype).as_strided(layout.shape, layout.stride())
    populate(gradient)
    return gradient


def _pages(n_bytes: int) -> mmap.mmap | None:
    """New pages of this process alone, which go back to the system with the last tensor on them; None where there are
    none to be had, and torch has its own way to say so."""
    if sys.platform != "linux":
        return None
    with suppress(OSError):
        return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return None


def populate(tensor: Tensor) -> None:
    """Asks the system for all pages of new memory in one go, in as many threads as torch has.

    In portions, as a thread that waits for pages holds a lock that others need in order to start. Where it cannot be
    done, or not in as many threads, pages come as they always do, when they are written: on other systems and older
    kernels, and where this thread is bound to some of the CPUs, as new ones would be too.
    """
    madvise, threads, page = _madvise(), torch.get_num_threads(), mmap.PAGESIZE
    if madvise is None or threads > min(MOST_THREADS, len(os.sched_getaffinity(0))):
        return
    start, stop = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    portions = range(start, stop, PORTION)
    if not portions or madvise(start, page, POPULATE):
        return
    with suppress(RuntimeError), ThreadPoolExecutor(threads) as pool:  # no more threads to be had
        pool.map(lambda at: madvise(at, min(PORTION, stop - at), POPULATE), portions)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, on Linux: Python's own reaches only what `mmap` made."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
