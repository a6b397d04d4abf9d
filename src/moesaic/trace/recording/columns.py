"""Rows that arrive in pieces and end in one array, without being held twice."""

import mmap

import torch
from torch import Tensor

FIRST_ROWS = 4096  # rows of the first block; the system hands out pages as they are written, so room costs nothing


class Column:
    """A growing [rows, width] of one dtype on the CPU.

    Blocks lie in memory of their own that goes back to the system when they are moved out, which the allocator of C
    does not promise: at 100k tokens and 26 layers that would be another 125 MB.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks: list[Tensor] = []
        self._used = 0  # rows of the last block
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def width(self) -> int | None:
        """Columns, once there is a row."""
        return self._blocks[0].shape[1] if self._blocks else None

    def append(self, rows: Tensor) -> None:
        """Copy `rows` [n, width] to the end. A width that differs from the first one is a ValueError."""
        if self._blocks and rows.shape[1] != self.width:
            raise ValueError(f"{rows.shape[1]} values a token after {self.width}: a layer keeps its width")
        start, n_rows = 0, rows.shape[0]
        while start < n_rows:
            room = self._blocks[-1].shape[0] - self._used if self._blocks else 0
            if not room:
                self._blocks.append(_block(max(FIRST_ROWS, self._rows, n_rows), rows.shape[1], self.dtype))
                self._used, room = 0, self._blocks[-1].shape[0]
            count = min(room, n_rows - start)
            self._blocks[-1][self._used : self._used + count] = rows[start : start + count]
            self._used += count
            self._rows += count
            start += count

    def move_into(self, out: Tensor) -> None:
        """Write everything to `out` [len(self), width] and keep that instead of the blocks."""
        start = 0
        while self._blocks:
            block = self._blocks.pop(0)
            count = len(block) if self._blocks else self._used
            out[start : start + count] = block[:count]
            start += count
        self.dtype = out.dtype
        self._blocks, self._used = ([out], len(out)) if len(out) else ([], 0)


def _block(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    size = rows * width * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=dtype, count=rows * width).view(rows, width)
