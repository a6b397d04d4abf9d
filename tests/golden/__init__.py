"""Golden vectors of routing gates: what the official codes answered, stored with where the answers come from.

Each source is a pair `NAME.npz` (arrays) and `NAME.json` (provenance, and the settings of every case). The scripts
`make_*.py` beside them made the files from the official code; README.md says what each source decides.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


class Case(NamedTuple):
    """One call of an official gate. Slots are in the order the official code gave: compare densified [T, E] maps.

    settings: the call in MoEConfig's field names, conventions included.
    x: [T, D] and weight: [E, D], both in the dtype of the call. Their products are sums of few multiples of 2^-13,
        so logits come out the same on every machine, whatever the order of summation.
    bias: float32 [E], or None where the gate had none.
    expert_ids: int64 [T, K].  weights: float32 [T, K], widened where the official code returned bfloat16.
    tied: bool [T], True where exact ties of scores left the choice open, so that ids may rightly differ.
    about: words on the case: "name", "bias", "weights_dtype".
    """

    settings: dict[str, Any]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    expert_ids: Tensor
    weights: Tensor
    tied: Tensor
    about: dict[str, str]


def names() -> list[str]:
    """All sources, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def provenance(name: str) -> dict[str, Any]:
    """Package, version or commit, command, date, torch version and the conventions seen in the official code."""
    record = _read(name)
    del record["cases"]
    return record


def cases(name: str) -> list[Case]:
    """Every stored case of a source, in the order it was made."""
    described = _read(name)["cases"]
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return [_case(arrays, i, entry) for i, entry in enumerate(described)]


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _case(arrays: Any, index: int, entry: dict[str, Any]) -> Case:
    def stored(key: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(arrays[key]).to(dtype)

    dtype, inputs = getattr(torch, entry["dtype"]), entry["inputs"]  # cases with the same inputs share them
    return Case(
        settings=entry["settings"],
        x=stored(inputs["x"], dtype),
        weight=stored(inputs["weight"], dtype),
        bias=stored(inputs["bias"], torch.float32) if "bias" in inputs else None,
        expert_ids=stored(f"case_{index}/expert_ids", torch.int64),
        weights=stored(f"case_{index}/weights", torch.float32),
        tied=stored(f"case_{index}/tied", torch.bool),
        about=entry["about"],
    )
