"""What is asked of a trace must be asked of a Trace, and with numbers: other types are refused in one line."""

import operator
from typing import Any

from moesaic.trace.shown import visible
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
