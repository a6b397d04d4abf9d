"""Bytes and lists of numbers of files that somebody else made: limits before memory is used, one kind of error."""

from pathlib import Path
from typing import Any

import numpy as np

from moesaic.strict_json import is_count

MOST_BYTES = 16 << 30  # of one file
MOST_LINE = 512 << 20  # bytes of one line of a file of lines


def size_of(path: Path) -> int:
    """Bytes of a file that exists and is no larger than is read."""
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes, and at most {MOST_BYTES:,} are read: split the record")
    return size


def read_bytes(path: Path) -> bytes:
    """The whole file."""
    size_of(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object or a list does."""
    size_of(path)
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"{", b"[")


def counts(values: Any, where: str, what: str) -> list[int]:
    """A list of whole numbers from 0."""
    if not isinstance(values, list) or not all(map(is_count, values)):
        raise ValueError(f"{where}: {what} is not a list of whole numbers from 0")
    return values


def table(rows: Any, where: str, what: str) -> np.ndarray:
    """A list of lists of whole numbers, all of one length, as int64 [rows, columns]."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{where}: {what} is not a list of lists")
    if len(lengths := {len(row) for row in rows}) > 1:
        raise ValueError(f"{where}: rows of {what} have {min(lengths)} to {max(lengths)} numbers: they must be equal")
    if not all(type(value) is int and -(2**63) <= value < 2**63 for row in rows for value in row):
        raise ValueError(f"{where}: {what} holds something that is not a whole number")
    return np.array(rows, dtype=np.int64).reshape(len(rows), lengths.pop() if lengths else 0)
