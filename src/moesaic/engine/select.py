"""Name -> engine. A named engine is taken or refused; only "auto" chooses, by device type and dtype."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

Engine = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertSpec], Tensor]

ENGINES: dict[str, Engine] = {"reference": reference, "grouped": grouped}


def check_engine(name: str) -> str:
    """`name` itself, or a ValueError that says which names there are."""
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown: use 'auto' or one of {', '.join(map(repr, ENGINES))}")
    return name


def select_engine(name: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """The engine for tensors of this device and dtype. "auto" asks `best_engine`."""
    return ENGINES[best_engine(device.type, dtype)[0] if name == "auto" else check_engine(name)]


@cache
def best_engine(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """What "auto" takes for (device type, dtype), and why: (name, reason). Decided once for each pair."""
    return (
        "grouped",
        f"sorted by expert, two matmuls per active expert: runs everywhere, {device_type} {dtype} included",
    )
