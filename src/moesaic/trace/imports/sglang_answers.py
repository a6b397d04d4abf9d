"""SGLang's `routed_experts`: what each request was routed to, inside the JSON of an answer.

Source of the format: sgl-project/sglang, python/sglang/srt/state_capturer/routed_experts.py and
srt/entrypoints/openai/protocol.py (pull requests #12162, #17434). A server with `--enable-return-routed-experts` gives
a request with `return_routed_experts` base64 of flat int32 [tokens, num_hidden_layers, num_experts_per_tok], all
tokens but the last: in `meta_info` of /generate, in `sglext` of OpenAI's endpoints, in earlier versions in `sgl_ext` of
a choice. Ids are logical experts, those of fused shared experts cut off. A dense layer holds zeros, or -1.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.strict_json import is_count
from moesaic.trace.imports.assemble import Imported
from moesaic.trace.imports.responses import NPY, OF_SGLANG, Choice, answers, bytes_of, choices_of, traced
from moesaic.trace.imports.target import Target
from moesaic.trace.imports.untrusted import counts, read_bytes


def read(files: Iterable[Path], target: Target) -> Imported:
    """A trace of answers (.json: one, or a list of them) or of an answer a line (.jsonl), a sequence each, with the
    name of its file as label. ValueError, in one line, for anything else."""
    return traced(((choice, path.stem) for path in files for choice in _choices(path, target)), target)


def _choices(path: Path, target: Target) -> Iterator[Choice]:
    for where, answer in answers(read_bytes(path), path):
        choices = choices_of(answer, where)
        usage = answer.get("usage") if len(choices) == 1 else None
        found = [(place, choice, _experts_in(choice)) for place, choice in choices]
        if found and all(value is None for _, _, value in found) and (first := _experts_in(answer)) is not None:
            if len(choices) > 1:
                raise ValueError(
                    f"{where}: {len(choices)} choices, and SGLang returns the routed_experts of the first alone: "
                    "ask for n=1, or ask /generate"
                )
            found = [(where, answer, first)]
        for place, choice, value in found:
            if value is not None:
                yield Choice(place, _ids(value, place, target), *_told(choice, usage, place))


def _experts_in(holder: Mapping[str, Any]) -> Any:
    inner = (holder[name] for name in OF_SGLANG if isinstance(holder.get(name), dict))
    return next((found for one in (holder, *inner) if (found := one.get("routed_experts")) is not None), None)


def _ids(value: Any, where: str, target: Target) -> np.ndarray:
    """The flat ids as [tokens, layers, K]."""
    data = bytes_of(value, where, "int32 ids")
    if data.startswith(NPY):
        raise ValueError(f"{where}: routed_experts is a .npy array, which vLLM returns: moesaic import vllm reads it")
    if target.n_layers is None or target.top_k is None:
        raise ValueError(
            f"{where}: SGLang returns ids without their shape, and a config.json alone says how many layers there are: "
            "give --config a config.json or a model folder"
        )
    if len(data) % (4 * target.n_layers * target.top_k):
        raise ValueError(
            f"{where}: {len(data):,} bytes are no whole tokens of {target.n_layers} layers x {target.top_k} experts x "
            "4 bytes: cut short, or give the config of the model that was recorded"
        )
    return np.frombuffer(data, "<i4").reshape(-1, target.n_layers, target.top_k)


def _told(choice: Mapping[str, Any], usage: Any, where: str) -> list[list[int] | int | None]:
    """Prompt and completion: their ids or only how many. The request's input_ids may have been put into the answer."""
    sizes = [one for one in (choice.get("meta_info"), usage) if isinstance(one, dict)]
    told: list[list[int] | int | None] = []
    for field, name in (("input_ids", "prompt_tokens"), ("output_ids", "completion_tokens")):
        count = next((one[name] for one in sizes if is_count(one.get(name))), None)
        ids = choice.get(field)
        n = count if ids is None else len(counts(ids, where, field))
        if count not in (None, n):
            raise ValueError(f"{where}: {field} has {n} ids, and {name} is {count}: give this request's, or none")
        told.append(count if ids is None else ids)
    return told
