"""Tensors that are longer than memory: rows that go to a file as they come, and numbers that come back in blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moesaic.trace.store import TYPES

BLOCK = 1 << 20  # numbers that are in memory at a time
WAITING = 1 << 15  # bytes of a part that wait for more: a decoded token has a few, and opening its file costs more


class Column(NamedTuple):
    """One tensor of a trace file: its type there (a key of TYPES), its shape, its numbers in order, block by block, and
    the smallest and largest of them where they are whole numbers."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    low: int = 0
    high: int = 0


class Part:
    """A growing [rows, ...] of one dtype in a file of its own; memory holds less than WAITING bytes of it.

    whole: the file that it is a part of, which errors name.
    """

    def __init__(self, file: Path, whole: Path) -> None:
        self.file, self._whole = file, whole
        self.dtype: np.dtype = np.dtype(np.uint8)
        self.row: tuple[int, ...] = ()
        self.low = self.high = 0
        self._rows = self._written = 0  # bytes that are in the file
        self._waiting = bytearray()

    def __len__(self) -> int:
        return self._rows

    @property
    def width(self) -> int | None:
        """Columns, once there is a row."""
        return self.row[0] if self._rows else None

    def append(self, rows: Tensor) -> None:
        """Put `rows` [n, ...] after the others. ValueError for rows of another width or kind and where they cannot be
        written: the rows before them then stay as they are."""
        array = as_numbers(rows)
        if not self._rows:
            self.dtype, self.row = np.dtype("<f4") if array.dtype.kind == "f" else array.dtype, array.shape[1:]
        if array.shape[1:] != self.row:
            raise ValueError(f"{array.shape[1:]} values a token after {self.row}: a layer keeps its width")
        low, high = span(array)
        if self.dtype.kind != "f" and array.size and high > np.iinfo(self.dtype).max:
            raise ValueError(f"{high} after numbers of {self.dtype}: give one dtype")
        before = len(self._waiting)
        self._waiting += np.ascontiguousarray(array, self.dtype).reshape(-1).view(np.uint8).data
        if len(self._waiting) >= WAITING:
            try:
                self.flush()
            except ValueError:
                del self._waiting[before:]
                raise
        if array.size:
            self.low, self.high = (low, high) if not self._rows else (min(self.low, low), max(self.high, high))
        self._rows += len(array)

    def flush(self) -> None:
        """Write what waits. ValueError where that fails."""
        try:
            with self.file.open("ab") as out:
                out.truncate(self._written)  # what a write that failed has left
                out.write(self._waiting)
        except OSError as error:
            raise unwritable(self._whole, error) from None
        self._written += len(self._waiting)
        self._waiting.clear()

    def blocks(self) -> Iterator[np.ndarray]:
        """All numbers in order."""
        self.flush()
        left, start = self._rows * math.prod(self.row), 0
        while left > start:
            count = min(BLOCK, left - start)
            yield np.fromfile(self.file, self.dtype, count, offset=start * self.dtype.itemsize)
            start += count


def joined(parts: Sequence[Part], shape: tuple[int, ...]) -> Column:
    """The parts one after the other as a tensor of that shape."""
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    return Column(
        type_of(parts[0].dtype, high), shape, lambda: chain.from_iterable(part.blocks() for part in parts), low, high
    )


def of_tensor(tensor: Tensor) -> Column:
    """A tensor that is in memory."""
    array = as_numbers(tensor)
    low, high = span(array)
    return Column(type_of(array.dtype, high), array.shape, lambda: _blocks(array), low, high)


def as_numbers(tensor: Tensor) -> np.ndarray:
    """On the CPU, narrow floats as float32. ValueError for what float32 would not hold exactly."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        if tensor.dtype.itemsize > 4:
            raise ValueError(f"{str(tensor.dtype).removeprefix('torch.')} does not fit a trace: give float32")
        tensor = tensor.float()
    return tensor.numpy()


def span(array: np.ndarray) -> tuple[int, int]:
    """The smallest and largest of whole numbers; (0, 0) for floats and for none."""
    return (0, 0) if array.dtype.kind == "f" or not array.size else (int(array.min()), int(array.max()))


def type_of(kind: np.dtype, largest: int) -> str:
    """The narrowest type that holds whole numbers up to `largest`; numbers with a point are float32."""
    if kind.kind == "f":
        return "F32"
    return next(name for name in TYPES if largest <= np.iinfo(TYPES[name]).max)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        yield flat[start : start + BLOCK]


def unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be written ({error.strerror})")
