"""Reading trace files, format 1 (docs: trace-format). A file is untrusted: everything in it is checked before use."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from moesaic import __version__
from moesaic.config import MoEConfig
from moesaic.trace.shown import visible
from moesaic.trace.store import FORMAT, FORMAT_VERSION, ORIGINS, PHASES, TYPES, Trace

MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
MOST_SEQUENCES = 1 << 24  # a number of a sequence beyond would make every count over sequences a memory bomb
MOST_EXPERTS = 1 << 16  # and
MOST_PER_TOKEN = 1 << 10  # of them: statistics hold tables of their squares
MOST_TEXT = 4096  # characters of one name, label or piece
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
DTYPES = ("float64", "float32", "float16", "bfloat16")
FIELDS = {"layers", "configs", "missing", "labels", "pieces", "dtypes", "model", "seed", "versions"}


def load(path: str | Path) -> Trace:
    """Read a trace file. Its floats stay in the file and are read when they are used (a map of memory).

    ValueError, in one line that names the file and what is wrong with it, for anything but a whole, lawful trace:
    nothing in it is executed, and nothing is allocated that the file does not hold.
    """
    path = Path(path)
    try:
        return _load(path)
    except _Fault as fault:
        raise ValueError(f"{path}: {visible(str(fault))}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class _Fault(Exception):
    """What is wrong with a file, without its name."""


def _fail(what: str) -> NoReturn:
    raise _Fault(what)


def _load(path: Path) -> Trace:
    if not path.is_file():
        _fail("no such file: give the .safetensors of a recorded trace")
    size = path.stat().st_size
    header, start = _read_header(path, size)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        _fail("a safetensors file, but not a recorded trace")
    _check_version(metadata.get("format_version"))
    places = _places(header, size - start)
    about = _parsed(metadata.get("about"), "about")
    fields = _fields(about)
    _check_sizes(places, fields)
    tensors = {name: _tensor(path, name, start, *place) for name, place in places.items()}
    _check_values(tensors, fields)
    whole: dict[str, Any] = tensors | fields
    try:
        return Trace(**whole)
    except ValueError as error:
        _fail(f"a damaged trace ({error}): record it again")


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            _fail("not a safetensors file: it is shorter than 8 bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(size - 8, MOST_HEADER):
            _fail(f"not a safetensors file, or cut short: its header would have {length} bytes and the file has {size}")
        text = file.read(length)
    try:
        return _parsed(text.decode("utf-8"), "the header"), 8 + length
    except UnicodeDecodeError:
        _fail("the header is not UTF-8")


def _check_version(version: object) -> None:
    if not isinstance(version, str) or not version.isascii() or not version.isdigit() or len(version) > 9:
        _fail("a damaged trace: format_version is not a whole number")
    if int(version) > FORMAT_VERSION:
        _fail(
            f"trace format {version} is newer than {FORMAT_VERSION}, which moesaic {__version__} reads: update moesaic"
        )
    if int(version) < FORMAT_VERSION:
        _fail(f"trace format {version} was a draft of {FORMAT_VERSION}: record it again")


def _parsed(text: object, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and without NaN."""
    if not isinstance(text, str):
        _fail(f"{what} is missing")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            _fail(f"{what} has the key {twice[:40]!r} twice")
        return found

    def refuse(constant: str) -> NoReturn:
        _fail(f"{what} holds {constant}, which is not JSON")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        _fail(f"{what} is not JSON ({type(error).__name__})")
    if not isinstance(found, dict):
        _fail(f"{what} is not a JSON object")
    return found


def _places(header: Mapping[str, Any], n_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (type, shape, first byte). The tensors must follow one another and fill the file exactly."""
    places, spans = {}, []
    for name, entry in header.items():
        if name not in ALLOWED:
            _fail(f"holds a tensor {name[:40]!r}, which a trace does not have")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            _fail(f"{name} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in ALLOWED[name][0]:
            _fail(f"{name} has the type {str(dtype)[:20]!r}: {' or '.join(ALLOWED[name][0])} is allowed")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(_is_count(number) for number in numbers):
                _fail(f"{what} of {name} is not a list of whole numbers from 0")
        if len(shape) != len(ALLOWED[name][1]) or len(offsets) != 2:
            _fail(f"{name} has {len(shape)} axes and {len(offsets)} offsets: {len(ALLOWED[name][1])} and 2 are due")
        needed = math.prod(shape) * np.dtype(TYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != needed:
            _fail(f"{name} of shape {shape} takes {needed} bytes and has {offsets[1] - offsets[0]}")
        places[name] = (dtype, tuple(shape), offsets[0])
        spans.append(tuple(offsets))
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            _fail("its tensors overlap or leave a gap")
        end = after
    if end != n_bytes:
        _fail(f"cut short or longer than it says: its tensors take {end} bytes and {n_bytes} are there")
    return places


def _check_sizes(places: Mapping[str, tuple[str, tuple[int, ...], int]], fields: Mapping[str, Any]) -> None:
    """The same L, T, K and E in every tensor and in the configs."""
    if missing := {"picks", "sequences"} - places.keys():
        _fail(f"{min(missing)} is missing")
    first = fields["configs"][0]
    sizes = {"L": len(fields["layers"]), "K": first.num_experts_per_tok, "E": first.n_routed_experts, "2": 2}
    sizes["T"] = places["picks"][1][1]
    for name, (_, shape, _) in places.items():
        due = tuple(sizes[axis] for axis in ALLOWED[name][1])
        if shape != due:
            _fail(f"{name} has the shape {list(shape)}: {list(due)} follows from the layers, their configs and picks")


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
    limits = {
        "picks": n_experts, "sequences": MOST_SEQUENCES - 1, "phases": len(PHASES) - 1,
        "input_ids": 2**63 - 1, "offsets": 2**63 - 1,
    }  # fmt: skip
    for name, most in limits.items():
        if (tensor := tensors.get(name)) is not None and tensor.numel():
            low, high = (int(number) for number in torch.aminmax(tensor))
            if low < 0 or high > most:
                _fail(f"{name} reach from {low} to {high}: 0 to {most} is allowed")
    tensors["picks"] = tensors["picks"].to(torch.int16 if n_experts < 2**15 - 1 else torch.int32)
    if (offsets := tensors.get("offsets")) is not None and bool((offsets[:, 0] > offsets[:, 1]).any()):
        _fail("offsets end before they begin")


def _fields(about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Trace that are no tensors."""
    if about.keys() != FIELDS:
        odd = min(about.keys() ^ FIELDS)
        _fail(f"about {'lacks' if odd in FIELDS else 'has an unknown'} {odd[:40]!r}")
    configs = [_config(entry) for entry in _listed(about["configs"], "configs")]
    names, per_layer, origins = [], [], []
    for entry in _listed(about["layers"], "layers"):
        if not isinstance(entry, dict) or entry.keys() != {"name", "config", "origin"}:
            _fail("a layer is not described by name, config and origin")
        if not _is_count(entry["config"]) or entry["config"] >= len(configs):
            _fail(f"a layer names config {str(entry['config'])[:20]!r}: there are {len(configs)}")
        if entry["origin"] not in ORIGINS:
            _fail(f"a layer has the origin {str(entry['origin'])[:20]!r}: use one of {', '.join(ORIGINS)}")
        names.append(_text(entry["name"], "the name of a layer"))
        per_layer.append(configs[entry["config"]])
        origins.append(entry["origin"])
    if not names:
        _fail("there is no layer in it")
    if len(set(names)) < len(names):
        _fail("two layers have the same name")
    sizes = {(config.n_routed_experts, config.num_experts_per_tok) for config in per_layer}
    if len(sizes) > 1:
        _fail("its layers differ in experts or experts per token")
    (n_experts, k), *_ = sizes
    if n_experts > MOST_EXPERTS or k > MOST_PER_TOKEN:
        _fail(f"{k} of {n_experts} experts a token: at most {MOST_PER_TOKEN} of {MOST_EXPERTS} are read")
    labels = about["labels"]
    return {
        "layers": tuple(names),
        "configs": tuple(per_layer),
        "origins": tuple(origins),
        "missing": tuple(_text(name, "a missing layer") for name in _listed(about["missing"], "missing")),
        "labels": None if labels is None else tuple(_text(label, "a label") for label in _listed(labels, "labels")),
        "pieces": _pieces(about["pieces"]),
        "dtypes": _dtypes(about["dtypes"]),
        "model": _text(about["model"], "model"),
        "seed": _seed(about["seed"]),
        "versions": {_text(k, "versions"): _text(v, "versions") for k, v in _object(about["versions"], "versions")},
    }


def _config(entry: object) -> MoEConfig:
    if not isinstance(entry, dict) or entry.keys() != {"hash", "fields"} or not isinstance(entry["fields"], dict):
        _fail("a config is not described by hash and fields")
    try:
        config = MoEConfig(**entry["fields"])
    except (TypeError, ValueError, OverflowError) as error:
        _fail(f"a config is not lawful ({str(error)[:200]})")
    if entry["hash"] != config.digest():
        _fail(f"a config has the hash {str(entry['hash'])[:20]!r}, its fields give {config.digest()!r}")
    return config


def _pieces(given: object) -> dict[int, str] | None:
    if given is None:
        return None
    found = {}
    for number, text in _object(given, "pieces"):
        if not (number.isascii() and number.isdigit()) or len(number) > 18 or str(int(number)) != number:
            _fail(f"pieces are by vocabulary id, not by {number[:40]!r}")
        found[int(number)] = _text(text, "a piece")
    return found


def _dtypes(given: object) -> dict[str, str]:
    found = dict(_object(given, "dtypes"))
    if found.keys() != {"logits", "weights"} or not set(map(str, found.values())) <= set(DTYPES):
        _fail(f"dtypes must name logits and weights, each one of {', '.join(DTYPES)}")
    return found


def _seed(given: object) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or abs(given) >= 2**64):
        _fail("seed is not a whole number of 64 bits")
    return given


def _listed(given: object, what: str) -> list[Any]:
    if not isinstance(given, list):
        _fail(f"{what} is not a list")
    return given


def _object(given: object, what: str) -> list[tuple[str, Any]]:
    if not isinstance(given, dict):
        _fail(f"{what} is not a JSON object")
    return list(given.items())


def _text(given: object, what: str) -> str:
    if not isinstance(given, str) or len(given) > MOST_TEXT:
        _fail(f"{what} is not a text of at most {MOST_TEXT} characters")
    return given


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**48
