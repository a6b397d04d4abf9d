"""Writing trace files, format 1 (docs: trace-format): whole traces, and runs that are longer than memory."""

import dataclasses
import json
import secrets
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from moesaic.strict_json import parsed
from moesaic.trace.file.about import about, fields_of
from moesaic.trace.file.limits import MOST_HEADER, check_labels, check_offsets, check_range
from moesaic.trace.file.parts import Column, Part, as_numbers, joined, of_tensor, span, unwritable
from moesaic.trace.file.reader import is_trace
from moesaic.trace.shown import visible
from moesaic.trace.store import FORMAT, FORMAT_VERSION, TENSORS, TYPES, Trace

PER_LAYER = ("picks", "weights", "logits")
FLOATS = ("weights", "logits", "bias")


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace as one file; an existing file is replaced whole or not at all. ValueError where it cannot be, and
    for a trace that no reader would take."""
    path = target(path)
    try:
        columns = {name: of_tensor(t) for name in TENSORS if (t := getattr(trace, name)) is not None}
        if trace.offsets is not None:
            check_offsets(trace.offsets)
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
        if (column.dtype == "F32") != (name in FLOATS):
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


class TraceWriter:
    """A trace written while it is recorded, in bounded memory: numbers go to files in a folder beside `path` and are
    put together at `close`. Use it as a context manager: it closes after an error too, so what was recorded stays.

    like: a Trace without tokens that says everything else; its fields may still be replaced at `close`.
    """

    def __init__(self, path: str | Path, like: Trace) -> None:
        self.path, self.like, self.n_tokens = target(path), like, 0
        self._parts: dict[str, Part] = {}  # one a tensor of the tokens, one a layer of the others: "picks.0"
        self._folder = folder_beside(self.path)

    def append(self, layers: Sequence[Mapping[str, Tensor]], **tokens: Tensor | None) -> None:
        """Add n tokens: one mapping per layer with "picks" [n, K] and, at every call or at none, "weights" [n, K] and
        "logits" [n, E]; `tokens` are sequences (needed), input_ids, phases and offsets, [n, ...]."""
        if len(layers) != self.like.n_layers:
            raise ValueError(f"{len(layers)} layers were given and the trace has {self.like.n_layers}")
        given = {f"{name}.{index}": t for index, layer in enumerate(layers) for name, t in layer.items()}
        given |= {name: tensor for name, tensor in tokens.items() if tensor is not None}
        n = len(layers[0]["picks"])
        if self._parts and (odd := self._parts.keys() ^ given.keys()):
            raise ValueError(f"{min(odd)} was given for some tokens and not for others: give it always or never")
        if odd := [name for name, tensor in given.items() if len(tensor) != n]:
            raise ValueError(f"{odd[0]} of {len(given[odd[0]])} tokens were given beside picks of {n}")
        for name, tensor in given.items():
            self._check(name.partition(".")[0], tensor)
        parts = {name: self._parts.get(name) or Part(self._folder / name, self.path) for name in given}
        try:
            for name, tensor in given.items():
                parts[name].append(tensor)
            self._parts = parts
            self.n_tokens += n
        finally:
            for part in parts.values():
                part.keep(self.n_tokens)

    def close(self, bias: Tensor | None = None, **fields: Any) -> Path:
        """Put the file together and return its path; the parts are gone afterwards, whatever happened. `fields` of
        Trace (labels, pieces, missing, ...) replace those given at the start."""
        try:
            columns = {name: self._column(name) for name in dict.fromkeys(n.partition(".")[0] for n in self._parts)}
            if not columns:  # nothing was recorded: a trace without tokens
                columns = {name: of_tensor(getattr(self.like, name)) for name in ("picks", "sequences")}
            if bias is not None:
                columns["bias"] = of_tensor(bias)
            columns = {name: columns[name] for name in TENSORS if name in columns}
            write(self.path, columns, dataclasses.replace(self.like, **fields))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._folder.exists():
            return
        try:
            self.close()
        except ValueError:
            if kind is None:  # else the error that came first is the one to be told
                raise

    def _check(self, name: str, tensor: Tensor) -> None:
        """Refuse, before anything is written, what would make a file that cannot be read."""
        row, e, k = tuple(tensor.shape[1:]), self.like.n_experts, self.like.top_k
        due = {"picks": (k,), "weights": (k,), "logits": (e,), "offsets": (2,)}.get(name, ())
        if row != due:
            raise ValueError(f"{name} of shape {[len(tensor), *row]} were given: {[len(tensor), *due]} is due")
        if tensor.is_floating_point() != (name in FLOATS):
            raise ValueError(f"{name} of {str(tensor.dtype).removeprefix('torch.')} were given: give the other kind")
        check_range(name, *span(as_numbers(tensor)), e)
        if name == "offsets":
            check_offsets(tensor)

    def _column(self, name: str) -> Column:
        layered = name in PER_LAYER
        parts = [self._parts[f"{name}.{i}"] for i in range(self.like.n_layers)] if layered else [self._parts[name]]
        shape = (*([self.like.n_layers] if layered else []), self.n_tokens, *parts[0].row)
        return joined(parts, shape)


def target(path: str | Path) -> Path:
    """Where a trace may be written: a new file, or the place of an older trace; a link leads there. ValueError."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: give the name of a file in it")
    if path.exists() and not (path.is_file() and is_trace(path)):
        raise ValueError(f"{path}: is there already and is no trace: give another name, or remove it")
    return path.resolve() if path.is_symlink() else path


def folder_beside(path: Path) -> Path:
    """A new folder for the parts of a file that is being made. ValueError where the file could not be written."""
    try:
        return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise unwritable(path, error) from None


def _unreadable(path: Path, error: ValueError) -> ValueError:
    return ValueError(f"{path}: not written, since no reader would take it: {visible(str(error))}")
