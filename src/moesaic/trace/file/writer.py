"""Writing trace files, format 1 (docs: trace-format)."""

import json
import secrets
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.strict_json import parsed
from moesaic.trace.file.about import about, fields_of
from moesaic.trace.file.limits import MOST_HEADER, check_labels, check_range
from moesaic.trace.file.parts import Column, of_tensor, unwritable
from moesaic.trace.file.reader import is_trace
from moesaic.trace.shown import visible
from moesaic.trace.store import FORMAT, FORMAT_VERSION, TENSORS, TYPES, Trace


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace as one file; an existing file is replaced whole or not at all. ValueError where it cannot be, and
    for a trace that no reader would take."""
    path = target(path)
    try:
        columns = {name: of_tensor(t) for name in TENSORS if (t := getattr(trace, name)) is not None}
    except ValueError as error:
        raise _unreadable(path, error) from None
    write(path, columns, trace)


def write(path: Path, columns: Mapping[str, Column], like: Trace) -> None:
    """Header and tensors into a file beside `path`, which then takes its name: a reader sees the old or the new one.

    like: says everything that is no tensor.
    """
    try:
        head = _head(columns, like)
    except ValueError as error:
        raise _unreadable(path, error) from None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # its mode is what the umask leaves, as for any new file
            file.write(struct.pack("<Q", len(head)) + head)
            for column in columns.values():
                for block in column.blocks():
                    file.write(np.ascontiguousarray(block, TYPES[column.dtype]).data)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _head(columns: Mapping[str, Column], like: Trace) -> bytes:
    """The header. ValueError for everything that a reader refuses, in the reader's own words."""
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "about": _about(like)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, column in columns.items():
        if (column.dtype == "F32") != (TENSORS[name][1] is torch.float32):
            raise ValueError(
                f"{name} are {'floats' if column.dtype == 'F32' else 'whole numbers'}: give the other kind"
            )
        check_range(name, column.low, column.high, like.n_experts)
        if name == "sequences" and column.shape[0]:
            check_labels(like.labels, column.high + 1)
        begin, end = end, end + int(np.prod(column.shape, dtype=np.int64)) * np.dtype(TYPES[column.dtype]).itemsize
        header[name] = {"dtype": column.dtype, "shape": column.shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # numbers start at a multiple of eight bytes
    if len(head) > MOST_HEADER:
        raise ValueError(f"its names, labels and pieces take {len(head):,} bytes: at most {MOST_HEADER:,} are read")
    return head


def _about(like: Trace) -> str:
    """The JSON of all that is no tensor, which reads back as what it was."""
    try:
        text = json.dumps(about(like))
    except TypeError as error:  # numpy's numbers
        raise ValueError(f"{error}: give Python's own numbers and texts") from None
    for name, value in fields_of(parsed(text, "about")).items():
        given = getattr(like, name)
        given = tuple(given) if isinstance(given, list) else dict(given) if isinstance(given, Mapping) else given
        if given != value:
            raise ValueError(f"{name} would read back as something else: give plain texts and numbers")
    return text


def target(path: str | Path) -> Path:
    """Where a trace may be written: a new file, or the place of an older trace; a link leads there. ValueError."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: give the name of a file in it")
    if path.exists() and not (path.is_file() and is_trace(path)):
        raise ValueError(f"{path}: is there already and is no whole trace: give another name, or remove it")
    return path.resolve() if path.is_symlink() else path


def folder_beside(path: Path) -> Path:
    """A new folder for the parts of a file that is being made. ValueError where the file could not be written."""
    try:
        return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise unwritable(path, error) from None


def _unreadable(path: Path, error: ValueError) -> ValueError:
    return ValueError(f"{path}: not written, since no reader would take it: {visible(str(error))}")
