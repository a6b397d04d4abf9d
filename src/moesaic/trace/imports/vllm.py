"""vLLM's `routed_experts`: arrays of expert ids, as .npy files or inside the JSON of a response.

Source of the format: vllm-project/vllm, docs/features/routed_experts.md and
vllm/model_executor/layers/fused_moe/routed_experts_capturer.py (pull requests #28284, #38939, #39568).
`--enable-return-routed-experts` gives an array [tokens, num_hidden_layers, num_experts_per_tok] a choice, base64 of a
.npy file in `choices[i].routed_experts`. Tokens are those that were forwarded: prompt and completion less the last
token. Ids are logical experts: uint8 up to 256 experts and uint16 above, int32 in other versions. The buffer starts
as zeros, so a dense layer, or a token that was not recorded, is a row of zeros; -1 turns into 255 or 65535.
"""

import base64
import binascii
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.strict_json import is_count, parsed
from moesaic.trace.imports.assemble import MOST_PICKS, NONE, Imported, Part, assemble, without_filler
from moesaic.trace.imports.target import MOST_LAYERS, Target
from moesaic.trace.imports.untrusted import counts, read_bytes
from moesaic.trace.store import PHASES

NPY = b"\x93NUMPY"


class Choice(NamedTuple):
    """One generation: ids [T, L, K] as they stand in the record, and the tokens where they were returned."""

    where: str
    ids: np.ndarray
    prompt: list[int] | int | None = None  # ids, or only how many
    completion: list[int] | int | None = None


def read(files: Iterable[Path], target: Target) -> Imported:
    """A trace of .npy arrays, of responses (.json: one, or a list of them), or of a response a line (.jsonl).

    Every array is a sequence with the name of its file as label. ValueError, in one line, for anything else.
    """
    choices: list[tuple[Choice, str]] = []
    n_picks = 0
    for path in files:
        for choice in _choices(path):
            n_picks += choice.ids.size
            if n_picks > MOST_PICKS:
                raise ValueError(f"{path}: more than {MOST_PICKS:,} ids in all: import less")
            choices.append((choice, path.stem))
    if not choices:
        raise ValueError("no routed_experts in these files: start the server with --enable-return-routed-experts")
    shape = choices[0][0].ids.shape[1:]
    for choice, _ in choices:
        if choice.ids.shape[1:] != shape:
            raise ValueError(
                f"{choice.where}: {choice.ids.shape[1]} layers of {choice.ids.shape[2]} ids, and "
                f"{choices[0][0].where} has {shape[0]} of {shape[1]}: import models one by one"
            )
    numbers = _numbers(shape[0], target)
    parts = [_part(choice, label, target, numbers) for choice, label in choices]
    return assemble(parts, [f"layers.{number}" for number in numbers], numbers, target)


def _numbers(n_layers: int, target: Target) -> list[int]:
    """The numbers of the layers of the array: all layers of the model, or only those with experts."""
    if target.layers is not None and n_layers == len(target.layers) and max(target.layers) >= n_layers:
        return list(target.layers)
    return list(range(n_layers))


def _choices(path: Path) -> Iterator[Choice]:
    data = read_bytes(path)
    if data.startswith(NPY):
        yield Choice(str(path), _array(data, str(path)))
        return
    if data.startswith(b"PK"):
        raise ValueError(f"{path}: an archive (.npz, .pt): save each array with numpy.save")
    if path.suffix == ".jsonl":
        lines = [(f"{path} line {i}", line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
        responses = [(where, parsed(line, where)) for where, line in lines]
    else:
        found = parsed(data, str(path))
        many = isinstance(found, list)
        responses = [(f"{path} response {i}", r) for i, r in enumerate(found)] if many else [(str(path), found)]
    for where, response in responses:
        yield from _choices_of(response, where)


def _choices_of(response: Any, where: str) -> Iterator[Choice]:
    """Completions, chat completions, and a bare object with a `routed_experts`."""
    if not isinstance(response, dict):
        raise ValueError(f"{where}: not a response: give the JSON object that the server returned")
    choices = response.get("choices", [response])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"{where}: choices is not a list of objects")
    usage = response.get("usage") if len(choices) == 1 and isinstance(response.get("usage"), dict) else {}
    for index, choice in enumerate(choices):
        name = f"{where} choice {index}" if len(choices) > 1 else where
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
    if not isinstance(value, str):
        raise ValueError(f"{where}: routed_experts is not base64 of a .npy file, which vLLM writes from 0.22 on")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where}: routed_experts is not base64, or cut short") from None
    return _array(data, where)


def _array(data: bytes, where: str) -> np.ndarray:
    """A .npy file of integers [tokens, layers, K]. Only the header is parsed; it must fit the bytes that are there."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_column, dtype = header(file)
    except Exception:  # numpy's own errors, and those of whatever a damaged header is parsed into
        raise ValueError(f"{where}: not a .npy array, or its header is damaged") from None
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


def _part(choice: Choice, label: str, target: Target, numbers: Sequence[int]) -> Part:
    ids = choice.ids
    if ids.dtype.kind == "u":
        if ids.dtype.itemsize > 2:
            raise ValueError(f"{choice.where}: the array holds {ids.dtype.name}: uint8, uint16 and int32 are read")
        ids = without_filler(ids, target.n_experts)
    unused = (ids == 0).all(-1, keepdims=True)
    if ids.shape[2] == 1:  # one expert a token may well be expert 0, but in a layer that has none
        unused &= np.array([number not in (target.layers or numbers) for number in numbers])[None, :, None]
    ids = np.where(unused, NONE, ids)
    tokens, phases = _tokens(choice)
    return Part(choice.where, ids.transpose(1, 0, 2), input_ids=tokens, phases=phases, label=label)


def _tokens(choice: Choice) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Ids and phases of the tokens, where the response has them. Rows may start late (routed_experts_prompt_start)."""
    prompt, completion, n = choice.prompt, choice.completion, len(choice.ids)
    if prompt is None or completion is None:
        return None, None
    n_prompt, n_completion = (value if isinstance(value, int) else len(value) for value in (prompt, completion))
    all_of_them = n_prompt + n_completion
    if n > all_of_them:
        raise ValueError(f"{choice.where}: {n} rows of ids for {n_prompt} + {n_completion} tokens")
    start = max(all_of_them - 1 - n, 0)  # the last token was not forwarded
    if start > n_prompt:
        return None, None
    phases = np.full(n, PHASES.index("decode"), dtype=np.uint8)
    phases[: n_prompt - start] = PHASES.index("prefill")
    if isinstance(prompt, int) or isinstance(completion, int):
        return None, phases
    return np.array((prompt + completion)[start : start + n], dtype=np.int64), phases
