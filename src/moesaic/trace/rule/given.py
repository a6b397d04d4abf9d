"""What is asked of a trace must be asked of a Trace, and with numbers: other types are refused in one line."""

import operator
from typing import Any

from moesaic.trace.shown import listed, short_layers, visible
from moesaic.trace.store import Trace


def check_trace(given: Any, field: str = "trace") -> None:
    """ValueError where something else than a Trace was given, such as the path of one."""
    if not isinstance(given, Trace):
        raise ValueError(f"{field}={_shown(given)} is no trace: give a Trace, such as ms.load(path) or rec.trace")


def whole_number(given: Any, field: str, example: int = 0) -> int:
    """The number as a Python int, of numpy and torch too; ValueError for anything that is not whole."""
    try:
        if isinstance(given, bool):
            raise TypeError
        return operator.index(given)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several
        raise ValueError(f"{field}={_shown(given)} is no whole number: use {example}, say") from None


def layer_of(trace: Trace, layer: int | str) -> int:
    """The place of a layer by its number or its name, as the trace has it or as reports say it ("layers.3"); ValueError
    where there is none."""
    if isinstance(layer, str):
        names = [*trace.layers, *short_layers(trace.layers)]
        index = names.index(layer) % trace.n_layers if layer in names else trace.n_layers
    else:
        index = whole_number(layer, "layer")
    if not -trace.n_layers <= index < trace.n_layers:
        there = f"layers 0 to {trace.n_layers - 1}, {listed(trace.layers)}"
        raise ValueError(f"layer={_shown(layer)} is not in the trace: it has {there}")
    return range(trace.n_layers)[index]


def real_number(given: Any, field: str, example: float) -> float:
    """The number as a Python float; ValueError for text and whatever else is none."""
    try:
        if isinstance(given, str | bool):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{field}={_shown(given)} is no number: use {example}, say") from None


def check_level(alpha: Any) -> None:
    """ValueError for a chance of false alarms that is not between 0 and 1."""
    if not 0 < real_number(alpha, "alpha", 0.05) < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1: use 0.05, say")


def _shown(given: Any) -> str:
    return visible(" ".join(repr(given).split()), 60)
