"""What this CPU can do by itself, and whose BLAS habits it has."""

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

INSTRUCTIONS = {  # as torch.cpu.get_capabilities() calls them
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
# words in the names of oneDNN's limits that include them; each limit includes those before it: AVX512_CORE_VNNI,
# AVX512_CORE_BF16, AVX10_1_512 (AVX512_CORE_FP16), AVX10_1_512_AMX and on (oneDNN, "CPU Dispatcher Control")
ONEDNN_LIMITS = {torch.bfloat16: ("BF16", "FP16", "AMX", "AVX10"), torch.float16: ("FP16", "AMX", "AVX10")}


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype itself, so that oneDNN need not emulate it.

    oneDNN can be told to ignore instructions (ONEDNN_MAX_CPU_ISA); then they are not there for us either.
    """
    return _onednn_may_use(ONEDNN_LIMITS[dtype]) and any(_capabilities().get(name) for name in INSTRUCTIONS[dtype])


@cache
def has_amx() -> bool:
    """Whether this CPU has Intel's matrix unit for bfloat16, and oneDNN may use it."""
    return _onednn_may_use(("AMX",)) and _capabilities().get("amx_bf16", False)


@cache
def machine() -> str:
    """Whose BLAS habits to expect, where they were measured: "intel" or "amd" (AVX-512), "amd-avx2"; else "other".

    An AMD whose oneDNN may not use AVX-512 counts as one without: MKL does not use it there either.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return "other"
    has = _capabilities()
    name, wide = str(has.get("cpu_name", "")).lower(), has.get("avx512_f", False)
    if "amd" in name:
        if wide and _onednn_may_use(("AVX512", "AVX10")):
            return "amd"
        return "amd-avx2" if has.get("avx2", False) else "other"
    return "intel" if "intel" in name and wide else "other"


def _onednn_may_use(words: tuple[str, ...]) -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return limit in ("", "ALL", "DEFAULT") or any(word in limit for word in words)


def _capabilities() -> Mapping[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()
