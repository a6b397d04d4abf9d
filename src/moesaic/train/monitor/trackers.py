"""Numbers of a step for TensorBoard, trackio, Weights & Biases and their like, none of which is imported."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Send = Callable[[Mapping[str, float], int], None]  # (numbers by name, step)


def sender(tracker: Any) -> Send:
    """How to hand numbers to `tracker`, told by what it can do: `add_scalar(tag, value, step)` of a TensorBoard
    SummaryWriter, or `log(numbers, step=)` of a trackio or W&B module or run. ValueError where it can neither."""
    if callable(getattr(tracker, "add_scalar", None)):

        def each(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                tracker.add_scalar(name, value, step)

        return each
    if callable(getattr(tracker, "log", None)):
        return lambda numbers, step: tracker.log(dict(numbers), step=step)
    raise ValueError(
        f"trackers: a {type(tracker).__name__} has neither add_scalar(tag, value, step) nor log(numbers, step=): give "
        "a SummaryWriter, or a module or run such as trackio or wandb"
    )


def scalars(line: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """What of a step line is worth a curve: each layer's MaxVio, dead experts and bias, and the worst of all layers."""
    numbers: dict[str, float] = {}
    for row, name in enumerate(names):
        if line["max_vio"][row] is not None:
            numbers[f"moe/{name}/max_vio"] = line["max_vio"][row]
            numbers[f"moe/{name}/dead"] = line["dead"][row]
        bias = line["bias"][row]
        if bias is not None and None not in bias:
            numbers[f"moe/{name}/bias_mean"] = bias[2]
            numbers[f"moe/{name}/bias_range"] = bias[1] - bias[0]
    known = [value for value in line["max_vio"] if value is not None]
    if known:
        numbers["moe/max_vio"] = max(known)
        numbers["moe/dead"] = sum(value for value in line["dead"] if value is not None)
    return numbers
