"""What a line of a run's log may say: a log may be anybody's file, and is shown only where it can be trusted."""

import math
from typing import Any

from moesaic.strict_json import is_count

FORMAT, VERSION = "moesaic-load", 1
PERCENTILES = (0, 25, 50, 75, 90, 95, 100)
# of a step line, each with a value a layer; those of the load are None together
LOAD_COLUMNS = ("tokens", "percentiles", "max_vio", "chance", "dead", "hottest", "coldest")
COLUMNS = (*LOAD_COLUMNS, "bias")
Line = dict[str, Any]


def check_line(line: Any, n_layers: int) -> None:
    """ValueError for a line that is none of ours. n_layers: what columns must hold."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise ValueError("it has no kind")
    kind = line["kind"]
    if kind == "run":
        _check_header(line)
    elif kind in ("step", "verdict", "alert", "end", "resume") and not is_count(line.get("step")):
        raise ValueError("it has no step")
    if kind == "step":
        _check_step(line, n_layers)
    if kind == "verdict" and not (is_count(line.get("from")) and _is_column(line.get("status"), n_layers, str)):
        raise ValueError("its first step is none, or status does not fit the layers")
    if kind == "alert" and not (
        isinstance(line.get("alert"), str)
        and isinstance(line.get("layer"), str | None)
        and isinstance(line.get("begins"), bool)
        and isinstance(line.get("message"), str)
    ):
        raise ValueError("an alert without its kind, layer or state")


def _check_header(line: Line) -> None:
    if line.get("version") != VERSION:
        raise ValueError(f"version {line.get('version')!r}, and {VERSION} is read here: use a newer moesaic")
    layers = line.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("it names no layers")
    if not all(isinstance(layer.get("name"), str) and is_count(layer.get("experts")) for layer in layers):
        raise ValueError("its layers have no names or sizes")
    if not _is_column([layer.get("bias") for layer in layers], len(layers), 3):
        raise ValueError("bias does not fit the layers")


def _check_step(line: Line, n_layers: int) -> None:
    if not _are_numbers([line.get("time")]) or not is_count(line.get("steps")):
        raise ValueError("time or steps are no numbers")
    try:
        float("nan" if line.get("loss") is None else line["loss"])
    except (TypeError, ValueError, OverflowError):
        raise ValueError("loss is no number") from None
    for name in COLUMNS:
        kind = {"percentiles": len(PERCENTILES), "chance": 2, "bias": 3}.get(name, float)
        if not _is_column(line.get(name), n_layers, kind):
            raise ValueError(f"{name} does not fit the layers")
    loads = [line[name] for name in LOAD_COLUMNS]
    if any(len({value is None for value in row}) > 1 or None in (row[1] or ()) for row in zip(*loads, strict=True)):
        raise ValueError("a layer has some of its numbers, not all")
    if "load" in line and not _is_column(line["load"], n_layers, list):
        raise ValueError("load does not fit the layers")


def _is_column(values: Any, n_layers: int, kind: Any) -> bool:
    """A list with a value a layer, each None or of that kind: float, str, list, or so many numbers."""
    if not isinstance(values, list) or len(values) != n_layers:
        return False
    known = [value for value in values if value is not None]
    if kind is str:
        return all(isinstance(value, str) for value in known)
    if kind is float:
        return _are_numbers(known)
    if not all(isinstance(value, list) and _are_numbers([x for x in value if x is not None]) for value in known):
        return False
    return kind is list or all(len(value) == kind for value in known)


def _are_numbers(values: list[Any]) -> bool:
    """Without a call of ours for each: a log has millions, and all are checked."""
    return {*map(type, values)} <= {int, float} and all(map(math.isfinite, values))
