"""vLLM's `routed_experts`: arrays of expert ids, as .npy files or inside the JSON of a response.

Source of the format: vllm-project/vllm, docs/features/routed_experts.md and
vllm/model_executor/layers/fused_moe/routed_experts_capturer.py (pull requests #28284, #38939, #39568).
`--enable-return-routed-experts` gives an array [tokens, num_hidden_layers, num_experts_per_tok] a choice, base64 of a
.npy file in `choices[i].routed_experts`. Tokens are those that were forwarded: prompt and completion less the last
token. Ids are logical experts: uint8 up to 256 experts and uint16 above, int32 in other versions. The buffer starts
as zeros, so a dense layer, or a token that was not recorded, is a row of zeros; -1 turns into 255 or 65535.
"""

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.strict_json import is_count
from moesaic.trace.imports.assemble import Imported
from moesaic.trace.imports.responses import NPY, OF_SGLANG, Choice, answers, bytes_of, choices_of, traced
from moesaic.trace.imports.target import MOST_LAYERS, Target
from moesaic.trace.imports.untrusted import counts, read_bytes


def read(files: Iterable[Path], target: Target) -> Imported:
    """A trace of .npy arrays, of responses (.json: one, or a list of them), or of a response a line (.jsonl).

    Every array is a sequence with the name of its file as label. ValueError, in one line, for anything else.
    """
    return traced(((choice, path.stem) for path in files for choice in _choices(path)), target)


def _choices(path: Path) -> Iterator[Choice]:
    data = read_bytes(path)
    if data.startswith(NPY):
        yield Choice(str(path), _array(data, str(path)))
        return
    if data.startswith(b"PK"):
        raise ValueError(f"{path}: an archive (.npz, .pt): save each array with numpy.save")
    for where, response in answers(data, path):
        yield from _choices_of(response, where)


def _choices_of(response: dict[str, Any], where: str) -> Iterator[Choice]:
    """Completions, chat completions, and a bare object with a `routed_experts`."""
    if any(name in one for one in (response, *(c for _, c in choices_of(response, where))) for name in OF_SGLANG):
        raise ValueError(f"{where}: a response of SGLang: moesaic import sglang reads it")
    choices = choices_of(response, where)
    usage = response.get("usage") if len(choices) == 1 and isinstance(response.get("usage"), dict) else {}
    for name, choice in choices:
        if choice.get("routed_experts") is None:
            continue
        ids = _decoded(choice["routed_experts"], name)
        if (before := response.get("prompt_routed_experts")) is not None:  # older versions: the prompt apart
            prompt = _decoded(before, name)
            if prompt.shape[1:] != ids.shape[1:]:
                raise ValueError(f"{name}: prompt_routed_experts has the shape {prompt.shape} beside {ids.shape}")
            ids = np.concatenate([prompt, ids])
        told = {}
        for key, holders in (("prompt", (choice, response)), ("token", (choice,))):
            field = "prompt_token_ids" if key == "prompt" else "token_ids"
            value = next((h[field] for h in holders if h.get(field) is not None), None)
            count = usage.get("prompt_tokens" if key == "prompt" else "completion_tokens")
            told[key] = counts(value, name, field) if value is not None else count if is_count(count) else None
        yield Choice(name, ids, told["prompt"], told["token"])


def _decoded(value: Any, where: str) -> np.ndarray:
    return _array(bytes_of(value, where, "a .npy file, which vLLM writes from 0.22 on"), where)


def _array(data: bytes, where: str) -> np.ndarray:
    """A .npy file of integers [tokens, layers, K]. Only the header is parsed; it must fit the bytes that are there."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_column, dtype = header(file)
    except Exception:  # numpy's own errors, and those of whatever a damaged header is parsed into
        raise ValueError(
            f"{where}: not a .npy array, or its header is damaged (ids of SGLang have none: moesaic import sglang)"
        ) from None
    if dtype.hasobject or dtype.kind not in "iu" or dtype.subdtype is not None:
        raise ValueError(f"{where}: the array holds {_name(dtype)}, and expert ids are integers")
    if len(shape) != 3 or not all(is_count(length) for length in shape):
        raise ValueError(f"{where}: the array has the shape {shape}: [tokens, layers, top k] is due")
    if not 1 <= shape[1] <= MOST_LAYERS or not 1 <= shape[2] <= MOST_LAYERS:
        raise ValueError(f"{where}: {shape[1]} layers of {shape[2]} ids: [tokens, layers, top k] is due")
    size = math.prod(shape)
    if size * dtype.itemsize != len(data) - file.tell():
        raise ValueError(
            f"{where}: cut short or too long: shape {shape} takes {size * dtype.itemsize} bytes and "
            f"{len(data) - file.tell()} are there"
        )
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if by_column else "C")


def _name(dtype: np.dtype) -> str:
    return "Python objects" if dtype.hasobject else dtype.name
