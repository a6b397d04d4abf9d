"""Reading trace files, format 1 (docs: trace-format). A file is untrusted: everything in it is checked before use."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic import __version__
from moesaic.strict_json import is_count, parsed
from moesaic.trace.file.about import fields_of
from moesaic.trace.file.limits import MOST_HEADER, check_labels, check_offsets, check_range
from moesaic.trace.shown import visible
from moesaic.trace.store import FORMAT, FORMAT_VERSION, TYPES, Trace, id_dtype

WHOLE = ("U8", "I16", "I32", "I64")
FLOAT = ("F32",)
ALLOWED = {  # name -> (types, axes); T, L, K and E are the same everywhere in a file
    "picks": (WHOLE, "LTK"),
    "weights": (FLOAT, "LTK"),
    "logits": (FLOAT, "LTE"),
    "bias": (FLOAT, "LE"),
    "input_ids": (WHOLE, "T"),
    "sequences": (WHOLE, "T"),
    "phases": (("U8",), "T"),
    "offsets": (WHOLE, "T2"),
}
IN_MEMORY = {"input_ids": torch.int64, "sequences": torch.int64, "offsets": torch.int64, "phases": torch.uint8}


def load(path: str | Path) -> Trace:
    """Read a trace file. Its floats stay in the file and are read when they are used (a map of memory).

    ValueError, in one line that names the file and what is wrong with it, for anything but a whole, lawful trace:
    nothing in it is executed, and nothing is allocated that the file does not hold.
    """
    path = Path(path)
    try:
        return _load(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {visible(str(error))}") from None


def is_trace(path: Path) -> bool:
    """Whether a file says that it is a trace of any version; no more of it is looked at."""
    try:
        metadata = _read_header(path, path.stat().st_size)[0].get("__metadata__")
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def _load(path: Path) -> Trace:
    if path.is_dir():
        raise ValueError("is a folder: give the .safetensors of a trace (`moesaic trace` makes one of a model)")
    if not path.is_file():
        raise ValueError("no such file: give the .safetensors of a recorded trace")
    size = path.stat().st_size
    header, start = _read_header(path, size)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError("a safetensors file, but not a recorded trace")
    _check_version(metadata.get("format_version"))
    places = _places(header, size - start)
    fields = fields_of(_object(metadata.get("about"), "about"))
    _check_sizes(places, fields)
    tensors = {name: _tensor(path, name, start, *place) for name, place in places.items()}
    _check_values(tensors, fields)
    whole: dict[str, Any] = tensors | fields
    return Trace(**whole)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise ValueError("not a safetensors file: it is shorter than 8 bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(
                f"not a safetensors file, or cut short: its header would have {length} bytes and the file has {size}"
            )
        text = file.read(length)
    return _object(text, "the header"), 8 + length


def _check_version(version: object) -> None:
    if not isinstance(version, str) or not version.isascii() or not version.isdigit() or len(version) > 9:
        raise ValueError("a damaged trace: format_version is not a whole number")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"trace format {version} is newer than {FORMAT_VERSION}, which moesaic {__version__} reads: update moesaic"
        )
    if int(version) < FORMAT_VERSION:
        raise ValueError(f"trace format {version} was a draft of {FORMAT_VERSION}: record it again")


def _object(text: object, what: str) -> dict[str, Any]:
    if not isinstance(text, str | bytes):
        raise ValueError(f"{what} is missing")
    found = parsed(text, what)
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object")
    return found


def _places(header: Mapping[str, Any], n_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (type, shape, first byte). The tensors must follow one another and fill the file exactly."""
    places, spans = {}, []
    for name, entry in header.items():
        if name not in ALLOWED:
            raise ValueError(f"holds a tensor {name[:40]!r}, which a trace does not have")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in ALLOWED[name][0]:
            raise ValueError(f"{name} has the type {str(dtype)[:20]!r}: {' or '.join(ALLOWED[name][0])} is allowed")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(map(is_count, numbers)):
                raise ValueError(f"{what} of {name} is not a list of whole numbers from 0")
        if len(shape) != len(ALLOWED[name][1]) or len(offsets) != 2:
            raise ValueError(
                f"{name} has {len(shape)} axes and {len(offsets)} offsets: {len(ALLOWED[name][1])} and 2 are due"
            )
        needed = math.prod(shape) * np.dtype(TYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != needed:
            raise ValueError(f"{name} of shape {shape} takes {needed} bytes and has {offsets[1] - offsets[0]}")
        places[name] = (dtype, tuple(shape), offsets[0])
        spans.append(tuple(offsets))
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise ValueError("its tensors overlap or leave a gap")
        end = after
    if end != n_bytes:
        raise ValueError(f"cut short or longer than it says: its tensors take {end} bytes and {n_bytes} are there")
    return places


def _check_sizes(places: Mapping[str, tuple[str, tuple[int, ...], int]], fields: Mapping[str, Any]) -> None:
    """The same L, T, K and E in every tensor and in the configs."""
    if missing := {"picks", "sequences"} - places.keys():
        raise ValueError(f"{min(missing)} is missing")
    first = fields["configs"][0]
    sizes = {"L": len(fields["layers"]), "K": first.num_experts_per_tok, "E": first.n_routed_experts, "2": 2}
    sizes["T"] = places["picks"][1][1]
    for name, (_, shape, _) in places.items():
        due = tuple(sizes[axis] for axis in ALLOWED[name][1])
        if shape != due:
            raise ValueError(
                f"{name} has the shape {list(shape)}: {list(due)} follows from the layers, their configs and picks"
            )


def _tensor(path: Path, name: str, start: int, dtype: str, shape: tuple[int, ...], begin: int) -> torch.Tensor:
    kind = np.dtype(TYPES[dtype])
    if not math.prod(shape):
        array = np.zeros(shape, kind)
    elif (start + begin) % kind.itemsize:
        array = np.fromfile(path, kind, math.prod(shape), offset=start + begin).reshape(shape)
    else:
        array = np.memmap(path, kind, mode="c", offset=start + begin, shape=shape)
    tensor = torch.from_numpy(array)
    return tensor if name not in IN_MEMORY else tensor.to(IN_MEMORY[name])


def _check_values(tensors: dict[str, torch.Tensor], fields: Mapping[str, Any]) -> None:
    """Numbers in range; picks become int16 or int32 as `Trace` has them."""
    n_experts = fields["configs"][0].n_routed_experts
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel():
            low, high = (int(number) for number in torch.aminmax(tensor))
            check_range(name, low, high, n_experts)
            if name == "sequences":
                check_labels(fields["labels"], high + 1)
    tensors["picks"] = tensors["picks"].to(id_dtype(n_experts))
    if (offsets := tensors.get("offsets")) is not None:
        check_offsets(offsets)
