"""Writing trace files, format 1 (docs: trace-format): whole traces, and runs that are longer than memory."""

import dataclasses
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from moesaic.trace.store import FORMAT, FORMAT_VERSION, TENSORS, TYPES, Trace

BLOCK = 1 << 22  # numbers that are in memory at a time
PER_LAYER = ("picks", "weights", "logits")


class Column(NamedTuple):
    """One tensor of a file: its type there (a key of TYPES), its shape, and its numbers in order, block by block."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace as one file; an existing file is replaced whole or not at all. ValueError where it cannot be."""
    columns = {}
    for name in TENSORS:
        if (tensor := getattr(trace, name)) is not None:
            array = tensor.numpy()
            largest = int(array.max()) if array.size and array.dtype.kind != "f" else 0
            columns[name] = Column(_type_of(array.dtype, largest), array.shape, lambda a=array: _blocks(a))
    write(Path(path), columns, about(trace))


def about(trace: Trace) -> dict[str, Any]:
    """All that is not a tensor, as the JSON of the header. Equal configs are written once."""
    distinct = list(dict.fromkeys(trace.configs))
    layers = zip(trace.layers, trace.configs, trace.origins, strict=True)
    return {
        "layers": [{"name": name, "config": distinct.index(c), "origin": origin} for name, c, origin in layers],
        "configs": [{"hash": config.digest(), "fields": config.to_dict()} for config in distinct],
        "missing": trace.missing,
        "labels": trace.labels,
        "pieces": None if trace.pieces is None else {str(number): text for number, text in trace.pieces.items()},
        "dtypes": dict(trace.dtypes),
        "model": trace.model,
        "seed": trace.seed,
        "versions": dict(trace.versions),
    }


def write(path: Path, columns: Mapping[str, Column], about: Mapping[str, Any]) -> None:
    """Header and tensors into a file beside `path`, which then takes its name: a reader sees the old or the new one."""
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "about": json.dumps(about)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, column in columns.items():
        begin, end = end, end + int(np.prod(column.shape, dtype=np.int64)) * np.dtype(TYPES[column.dtype]).itemsize
        header[name] = {"dtype": column.dtype, "shape": column.shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # numbers start at a multiple of eight bytes
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for column in columns.values():
                for block in column.blocks():
                    file.write(np.ascontiguousarray(block, TYPES[column.dtype]).data)
        Path(temporary).chmod(0o644)  # mkstemp makes it private; 0o644 is what open() gives under the usual umask
        Path(temporary).replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


class TraceWriter:
    """A trace written while it is recorded, in bounded memory: numbers go to files in a folder beside `path` and are
    put together at `close`. Use it as a context manager: it closes after an error too, so what was recorded stays.

    like: a Trace without tokens that says everything else; its fields may still be replaced at `close`.
    """

    def __init__(self, path: str | Path, like: Trace) -> None:
        self.path, self.like, self.n_tokens = Path(path), like, 0
        self._names: set[str] = (
            set()
        )  # of the files beside `path`, one a tensor of the tokens, one a layer of the others
        self._parts: dict[str, np.dtype] = {}
        self._rows: dict[str, tuple[int, ...]] = {}
        self._largest: dict[str, int] = {}
        try:
            self._folder = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from None

    def append(self, layers: Sequence[Mapping[str, Tensor]], **tokens: Tensor | None) -> None:
        """Add n tokens: one mapping per layer with "picks" [n, K] and, at every call or at none, "weights" [n, K] and
        "logits" [n, E]; `tokens` are sequences (needed), input_ids, phases and offsets, [n, ...]."""
        if len(layers) != self.like.n_layers:
            raise ValueError(f"{len(layers)} layers were given and the trace has {self.like.n_layers}")
        given = {f"{name}.{index}": t for index, layer in enumerate(layers) for name, t in layer.items()}
        given |= {name: tensor for name, tensor in tokens.items() if tensor is not None}
        n = len(layers[0]["picks"])
        if self._names and (odd := self._names ^ given.keys()):
            raise ValueError(f"{min(odd)} was given for some tokens and not for others: give it always or never")
        if odd := [name for name, tensor in given.items() if len(tensor) != n]:
            raise ValueError(f"{odd[0]} of {len(given[odd[0]])} tokens were given beside picks of {n}")
        for name, tensor in given.items():
            self._check(name.partition(".")[0], tensor)
        self._names = set(given)
        for name, tensor in given.items():
            self._write(name, tensor)
        self.n_tokens += n

    def close(self, bias: Tensor | None = None, **fields: Any) -> Path:
        """Put the file together and return its path; the parts are gone afterwards, whatever happened. `fields` of
        Trace (labels, pieces, missing, ...) replace those given at the start."""
        try:
            columns = {name: self._column(name) for name in self._parts}
            if not columns:  # nothing was recorded: a trace without tokens
                columns = {name: _empty(getattr(self.like, name)) for name in ("picks", "sequences")}
            if bias is not None:
                columns["bias"] = Column("F32", tuple(bias.shape), lambda: iter([bias.numpy()]))
            columns = {name: columns[name] for name in TENSORS if name in columns}
            write(self.path, columns, about(dataclasses.replace(self.like, **fields)))
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
        if name == "picks" and tensor.numel():
            low, high = (int(number) for number in tensor.aminmax())
            if low < 0 or high > e:
                raise ValueError(f"picks from {low} to {high} were given: 0 to {e} is due")

    def _write(self, file: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu()
        name, array = file.partition(".")[0], (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        part = self._parts.setdefault(name, np.dtype("<f4") if array.dtype.kind == "f" else array.dtype)
        self._rows.setdefault(name, array.shape[1:])
        if array.size and part.kind != "f":
            self._largest[name] = max(self._largest.get(name, 0), int(array.max()))
        try:
            with (self._folder / file).open("ab") as out:
                out.write(np.ascontiguousarray(array, part).data)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _column(self, name: str) -> Column:
        part, row = self._parts[name], self._rows[name]
        layered = name in PER_LAYER
        files = [f"{name}.{index}" for index in range(self.like.n_layers)] if layered else [name]
        count = self.n_tokens * math.prod(row)  # a file may hold more: of an `append` that failed

        def blocks() -> Iterator[np.ndarray]:
            for file in files:
                if count:
                    yield from _blocks(np.memmap(self._folder / file, part, mode="r", shape=(count,)))

        shape = (*([self.like.n_layers] if layered else []), self.n_tokens, *row)
        return Column(_type_of(part, self._largest.get(name, 0)), shape, blocks)


def _type_of(kind: np.dtype, largest: int) -> str:
    """The narrowest type that holds whole numbers up to `largest`; numbers with a point are float32."""
    if kind.kind == "f":
        return "F32"
    return next(name for name in TYPES if largest <= np.iinfo(TYPES[name]).max)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        yield flat[start : start + BLOCK]


def _empty(tensor: Tensor) -> Column:
    return Column("U8", tuple(tensor.shape), lambda: iter(()))
