"""Expert ids in the answers of a server, a generation a sequence: what vLLM and SGLang return has this in common."""

import base64
import binascii
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.strict_json import parsed
from moesaic.trace.imports.assemble import MOST_PICKS, NONE, Imported, Part, assemble, without_filler
from moesaic.trace.imports.target import Target
from moesaic.trace.store import PHASES

NPY = b"\x93NUMPY"
OF_SGLANG = ("meta_info", "sglext", "sgl_ext")  # what an answer of SGLang holds its experts in


class Choice(NamedTuple):
    """One generation: ids [T, L, K] as they stand in the record, and the tokens where they were returned."""

    where: str
    ids: np.ndarray
    prompt: list[int] | int | None = None  # ids, or only how many
    completion: list[int] | int | None = None


def answers(data: bytes, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, answer) of JSON (one, or a list of them) or, with the suffix .jsonl, of one a line."""
    if path.suffix == ".jsonl":
        lines = [(f"{path} line {i}", line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
        found = [(where, parsed(line, where)) for where, line in lines]
    else:
        content = parsed(data, str(path))
        many = isinstance(content, list)
        found = [(f"{path} response {i}", r) for i, r in enumerate(content)] if many else [(str(path), content)]
    for where, answer in found:
        if not isinstance(answer, dict):
            raise ValueError(f"{where}: not a response: give the JSON object that the server returned")
        yield where, answer


def choices_of(answer: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, choice) of OpenAI's responses; of an answer without choices the answer itself."""
    choices = answer.get("choices", [answer])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"{where}: choices is not a list of objects")
    return [(f"{where} choice {i}" if len(choices) > 1 else where, choice) for i, choice in enumerate(choices)]


def bytes_of(value: Any, where: str, kind: str) -> bytes:
    """What routed_experts holds, base64 of `kind`."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: routed_experts is not base64 of {kind}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where}: routed_experts is not base64, or cut short") from None


def traced(choices: Iterable[tuple[Choice, str]], target: Target) -> Imported:
    """The trace of generations, each with the label of its sequence."""
    kept: list[tuple[Choice, str]] = []
    n_picks = 0
    for choice, label in choices:
        n_picks += choice.ids.size
        if n_picks > MOST_PICKS:
            raise ValueError(f"{choice.where}: more than {MOST_PICKS:,} ids in all: import less")
        kept.append((choice, label))
    if not kept:
        raise ValueError(
            "no routed_experts in these files: start the server with --enable-return-routed-experts, and ask SGLang "
            "for return_routed_experts in every request"
        )
    shape = kept[0][0].ids.shape[1:]
    for choice, _ in kept:
        if choice.ids.shape[1:] != shape:
            raise ValueError(
                f"{choice.where}: {choice.ids.shape[1]} layers of {choice.ids.shape[2]} ids, and "
                f"{kept[0][0].where} has {shape[0]} of {shape[1]}: import models one by one"
            )
    numbers = _numbers(shape[0], target)
    parts = [_part(choice, label, target, numbers) for choice, label in kept]
    return assemble(parts, [f"layers.{number}" for number in numbers], numbers, target)


def _numbers(n_layers: int, target: Target) -> list[int]:
    """The numbers of the layers of the array: all layers of the model, or only those with experts."""
    if target.layers is not None and n_layers == len(target.layers) and max(target.layers) >= n_layers:
        return list(target.layers)
    return list(range(n_layers))


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
    """Ids and phases of the tokens, where the answer has them. Rows may start late (routed_experts_prompt_start of
    vLLM, routed_experts_start_len of SGLang)."""
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
