"""Name -> engine. A named engine is taken or refused; only "auto" chooses, by device and dtype."""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from moesaic.engine import triton as gpu
from moesaic.engine.cpu import cpu
from moesaic.engine.gemm import explain
from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.tracing import constant_in_graphs

# (tokens [T, D], expert_ids [T, K], weights [T, K], ExpertWeights, ExpertSpec, **options) -> [T, O]
Engine = Callable[..., Tensor]

ENGINES: dict[str, Engine] = {"reference": reference, "grouped": grouped, "cpu": cpu, "triton": gpu.triton}
AUTO = {"cpu": "cpu", "cuda": "triton"}  # device type -> what "auto" takes there where it can; else "grouped"
OPTIONS = {name: {*signature(engine).parameters} for name, engine in ENGINES.items()}  # so none is forgotten
OPTIONS["reference"].add("batch_invariant")  # by definition


def check_engine(name: str, *, batch_invariant: bool = False, recompute: bool = False) -> str:
    """`name` itself, or a ValueError that says which names there are and which can do what is asked."""
    if name == "auto":
        return name
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown: use 'auto' or one of {', '.join(map(repr, ENGINES))}")
    if name == "triton" and not gpu.INSTALLED:
        raise ValueError(f"engine='triton' cannot run here: {gpu.why_not('cuda')}, or use 'auto' or 'grouped'")
    for option, asked in (("batch_invariant", batch_invariant), ("recompute", recompute)):
        if asked and option not in OPTIONS[name]:
            able = ", ".join(repr(other) for other in ENGINES if option in OPTIONS[other])
            raise ValueError(f"engine={name!r} has no {option}: use one of {able}")
    return name


def select_engine(
    name: str, device: torch.device, dtype: torch.dtype, *, batch_invariant: bool = False, recompute: bool = False
) -> Engine:
    """The engine for tensors of this device and dtype. "auto" takes what `best_engine` names."""
    chosen = _auto(device.type, dtype, device.index) if name == "auto" else name
    if not batch_invariant and not recompute:
        return ENGINES[chosen]
    check_engine(chosen, batch_invariant=batch_invariant, recompute=recompute)
    if chosen == "reference":
        return reference
    asked = {"batch_invariant": batch_invariant, "recompute": recompute}
    return partial(ENGINES[chosen], **{option: True for option, wanted in asked.items() if wanted})


@constant_in_graphs  # what a device can is asked while a graph is traced, not in it
def _auto(device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    chosen = AUTO.get(device_type, "grouped")
    return "grouped" if chosen == "triton" and gpu.why_not(device_type, dtype, index) else chosen


def best_engine(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """What "auto" takes for (device type, dtype), and why: (name, reason)."""
    name = _auto(device_type, dtype)
    if name == "cpu":
        return name, f"kernels for the cpu with a backward of their own; {explain(dtype)}"
    if name == "triton":
        return name, "fused Triton kernels with a backward of their own, and no wait for the device"
    reason = f"plain torch, two matmuls per active expert: runs on every device, {device_type} included"
    if AUTO.get(device_type) == "triton":
        reason += f"; engine='triton' cannot serve this: {gpu.why_not(device_type, dtype)}"
    return name, reason
