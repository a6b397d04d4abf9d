"""What `moesaic doctor` finds out: versions, the machine, and how every engine does against float64."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
MEASURED_DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3, "float64": 1e-12}  # of the largest value
SWITCH_ON = (
    'import moesaic.hf; AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesaic")',
    "model = moesaic.attach(model)",
)


def examine() -> dict[str, Any]:
    """Everything that can be said without measuring a time."""
    import torch

    from moesaic.bench.machine import available_bytes, machine
    from moesaic.engine.select import best_engine
    from moesaic.versions import versions

    found = machine()
    named = found.pop("versions") | versions("numpy", "triton")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    here = {
        "threads": torch.get_num_threads(),
        "free_bytes": available_bytes(),
        "load": os.getloadavg()[0],
        "cuda": cuda,
    }
    result = {
        "versions": named,
        "machine": found | here,
        "engines": [serve(device, dtype) for device in ("cpu", *(["cuda"] if cuda else [])) for dtype in DTYPES],
        "transformers": transformers_seam(),
    }
    if not cuda:
        name, reason = best_engine("cuda", torch.bfloat16)
        result["on_cuda"] = {"dtype": "bfloat16", "auto": name, "reason": reason}
    return result


def serve(device: str, dtype: str) -> dict[str, Any]:
    """What "auto" takes there, why, and how each engine did: True where it was right, else what went wrong."""
    import torch

    from moesaic.engine.select import ENGINES, best_engine

    name, reason = best_engine(device, getattr(torch, dtype))
    tried = {engine: try_engine(engine, device, dtype) or True for engine in ENGINES}
    return {"device": device, "dtype": dtype, "auto": name, "reason": reason, "engines": tried}


def try_engine(name: str, device: str, dtype: str) -> str | None:
    """None where an engine gives the reference's numbers, forward and backward; else the reason, in one line."""
    import torch

    from moesaic.engine.reference import reference
    from moesaic.engine.select import ENGINES
    from moesaic.engine.spec import ExpertSpec
    from moesaic.types import ExpertWeights

    draw = torch.Generator().manual_seed(0)
    n_experts, d, i, n_tokens, k = 4, 512, 384, 24, 2  # matrices large enough for the forms that real models meet
    shapes = ((n_tokens, d), (n_tokens, k), (n_experts, 2 * i, d), (n_experts, d, i))
    drawn = [torch.randn(shape, generator=draw).div(16).to(getattr(torch, dtype)) for shape in shapes]
    ids = torch.rand(n_tokens, n_experts, generator=draw).topk(k).indices

    def run(engine: Any, tensors: "list[torch.Tensor]", ids: "torch.Tensor") -> "list[torch.Tensor]":
        x, weights, up, down = (tensor.requires_grad_() for tensor in tensors)
        out = engine(x, ids, weights, ExpertWeights(up, down), ExpertSpec())
        return [out, *torch.autograd.grad(out.square().sum(), (x, weights, up, down))]

    expected = run(reference, [tensor.double() for tensor in drawn], ids)
    try:
        got = run(ENGINES[name], [tensor.to(device, copy=True) for tensor in drawn], ids.to(device))
    except Exception as error:  # whatever it is, it is the finding
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "  # a ValueError is our own sentence
        return " ".join(f"{kind}{error}".split())
    worst = max(
        float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(got, expected, strict=True)
    )
    allowed = TOLERANCE[dtype]
    return None if worst <= allowed else f"off by {worst:.1e} of the largest value, {allowed:.0e} is allowed"


def transformers_seam() -> dict[str, Any]:
    """Whether transformers offers "moesaic" as an experts implementation, and how to switch it on."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        import moesaic.hf  # noqa: F401, registers it
    except ImportError as error:
        return {"known": False, "reason": str(error), "switch_on": SWITCH_ON}
    known = "moesaic" in ALL_EXPERTS_FUNCTIONS
    return {"known": known, "reason": None if known else "not registered", "switch_on": SWITCH_ON}


def take_measures() -> dict[str, Any]:
    """Memory, square matmuls in GF/s, and every form of an expert's matmul in microseconds, by dtype and rows."""
    import torch

    from moesaic.bench.ceiling import read_speed
    from moesaic.bench.forms import square_flops, time_forms

    with torch.inference_mode():
        return {
            "read_gb_per_s": read_speed() / 1e9,
            "square_gflops": {dtype: square_flops(getattr(torch, dtype)) / 1e9 for dtype in DTYPES},
            "forms": [times.to_dict() for dtype in MEASURED_DTYPES for times in time_forms(getattr(torch, dtype))],
        }


def wrong(found: dict[str, Any]) -> list[str]:
    """Where "auto" fails: device and dtype."""
    return [f"{row['device']} {row['dtype']}" for row in found["engines"] if row["engines"][row["auto"]] is not True]


def held_back(machine: dict[str, Any]) -> bool:
    """Whether the CPU multiplies bfloat16 and oneDNN, which names what it uses, does not."""
    has = any("bf16" in flag for flag in machine["isa"])
    return has and machine["onednn_isa"] != "unknown" and "bfloat16" not in machine["onednn_isa"].lower()
