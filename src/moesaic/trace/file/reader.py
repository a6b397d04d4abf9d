"""Reading trace files, format 1 (docs: trace-format). A file is untrusted: everything in it is checked before use."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moesaic import __version__
from moesaic.strict_json import parsed
from moesaic.trace.file.about import fields_of
from moesaic.trace.file.limits import check_range
from moesaic.trace.shown import visible
from moesaic.trace.store import FORMAT, FORMAT_VERSION, TENSORS, Trace, id_dtype

WHOLE = ("U8", "I16", "I32", "I64")
STORED = {torch.float32: ("F32",), torch.uint8: ("U8",)}  # in a file, by the dtype in memory; WHOLE for all others


def load(path: str | Path) -> Trace:
    """Read a trace file. Its floats stay in the file and are read when they are used (a map of memory).

    ValueError, in one line that names the file and what is wrong with it, for anything but a whole, lawful trace:
    nothing in it is executed, and nothing is allocated that the file does not hold.
    """
    path = Path(path)
    try:
        return _load(path)
    except (OSError, RuntimeError) as error:  # torch's, where memory cannot be mapped
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read ({visible(why[:200])})") from None
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path}: not a whole safetensors file ({visible(why[:200])})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {visible(str(error))}") from None


def is_trace(path: Path) -> bool:
    """Whether a file is a whole safetensors file that says it is a trace, of any version."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, RuntimeError, SafetensorError):
        return False


def _load(path: Path) -> Trace:
    if path.is_dir():
        raise ValueError("is a folder: give the .safetensors of a trace (`moesaic trace` makes one of a model)")
    if not path.is_file():
        raise ValueError("no such file: give the .safetensors of a recorded trace")
    path.open("rb").close()  # the system says why it may not be read; safe_open, that there is no such file
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata() or {}, set(file.keys())
        if metadata.get("format") != FORMAT:
            raise ValueError("a safetensors file, but not a recorded trace")
        _check_version(metadata.get("format_version"))
        _check_keys(path)
        if unknown := names - TENSORS.keys():
            raise ValueError(f"holds a tensor {min(unknown)[:40]!r}, which a trace does not have")
        if missing := {"picks", "sequences"} - names:
            raise ValueError(f"{min(missing)} is missing")
        fields: dict[str, Any] = fields_of(_object(metadata.get("about"), "about"))
        n_experts = fields["configs"][0].n_routed_experts
        fields |= {name: _tensor(file, name, n_experts) for name in names}
    return Trace(**fields)


def _tensor(file: Any, name: str, n_experts: int) -> torch.Tensor:
    """A tensor of an open file as `Trace` has it; whole numbers are in range before they become narrower."""
    due, found = TENSORS[name][1] or id_dtype(n_experts), file.get_slice(name).get_dtype()
    if found not in (allowed := STORED.get(due, WHOLE)):
        raise ValueError(f"{name} has the type {found[:20]!r}: {' or '.join(allowed)} is allowed")
    tensor = file.get_tensor(name)
    if tensor.data_ptr() % tensor.element_size():
        tensor = tensor.clone()
    if tensor.numel() and not tensor.is_floating_point():
        low, high = (int(number) for number in torch.aminmax(tensor))
        check_range(name, low, high, n_experts)
    return tensor.to(due)


def _check_keys(path: Path) -> None:
    """What safetensors reads and another reader may understand otherwise: a key given twice, or one that is unknown."""
    with path.open("rb") as file:
        header = _object(file.read(int.from_bytes(file.read(8), "little")), "the header")
    for name, entry in header.items():
        if name != "__metadata__" and entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name[:40]!r} is not described by dtype, shape and data_offsets")


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
