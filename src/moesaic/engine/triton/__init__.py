"""The GPU engine: Triton kernels, one op a file. Triton itself is imported when the first kernel runs.

`experts.py` strings the kernels together; `twins.py` says in plain torch what each of them computes.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.engine.op import register_kernels, run_experts
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.tracing import constant_in_graphs
from moesaic.types import ExpertWeights

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTALLED = find_spec("triton") is not None
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores, asynchronous copies


@constant_in_graphs  # asked while a graph is traced, not in it
def why_not(device_type: str, dtype: torch.dtype | None = None, index: int | None = None) -> str | None:
    """Why the kernels cannot run there, with a way out; None where they can. Without a dtype, whatever it may be."""
    if not INSTALLED:
        return "the package triton is not installed: pip install triton"
    if device_type != "cuda":
        return f"its kernels run on cuda, not on {device_type}: use 'cpu', 'grouped' or 'auto' there"
    if dtype is not None and dtype not in DTYPES:
        return f"its kernels compute in bfloat16, float16 and float32, not in {dtype}: use 'grouped' or 'auto'"
    if torch.version.hip:
        return "its tiles are chosen for NVIDIA's GPUs: use 'grouped' or 'auto'"
    capability = _capability(index)
    if capability is not None and capability < LEAST_CAPABILITY:
        return f"this GPU has capability {capability}, the kernels need {LEAST_CAPABILITY}: use 'grouped' or 'auto'"
    return None


@cache  # asking takes microseconds, and a layer asks several times
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def triton(
    tokens: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: ExpertWeights,
    spec: ExpertSpec,
    *,
    batch_invariant: bool = False,
    recompute: bool = False,
) -> Float[Tensor, "T O"]:
    """The engine. No step of it waits for the device, so the values of ids are not checked: one that names no expert is
    skipped, as E is. Deterministic. See `run_experts` for `recompute`.

    batch_invariant: a row's bits do not depend on the rows beside it, as tiles are the same for every number of tokens.

    Raises ValueError for inputs that do not fit together, and where the kernels cannot run, with the reason.
    """
    if reason := why_not(tokens.device.type, tokens.dtype, tokens.device.index):
        raise ValueError(f"engine='triton' cannot serve this: {reason}")
    return run_experts(tokens, expert_ids, weights, experts, spec, batch_invariant=batch_invariant, recompute=recompute)


def _forward(tokens: Tensor, *args: Any, **options: Any) -> Any:
    from moesaic.engine.triton.experts import forward

    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        return forward(tokens, *args, **options)


def _backward(grad_out: Tensor, *args: Any, **options: Any) -> Any:
    from moesaic.engine.triton.experts import backward

    with torch.cuda.device_of(grad_out):
        return backward(grad_out, *args, **options)


register_kernels("cuda", _forward, _backward)
