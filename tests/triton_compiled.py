"""Compile the kernels that a problem launches for a GPU that is not there, and print what they need, as JSON lines.

    python tests/triton_compiled.py [--names] 90 bfloat16 ladder 32768 [more token counts ...]

Triton brings its own assembler. A stand-in driver says which GPU it is, tensors without memory ("meta") carry shapes
and dtypes, and every launch stops after the kernel is made. TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from cases import METHODS, RULES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__path__[0], "backends", "nvidia", "bin")


class Layer(NamedTuple):
    e: int
    d: int
    i: int
    k: int
    spec: Mapping[str, Any] = MappingProxyType({})  # fields of ExpertSpec
    biases: bool = False
    weights: str | None = None  # dtype of the matrices where it is not the tokens'
    routed: str | None = None  # dtype of the routing weights where it is not the tokens'


GPT_OSS = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0, "interleaved": True, "transposed": True}
LAYERS = {
    "ladder": Layer(128, 2048, 768, 8),  # Qwen3-30B-A3B, performance tables are about it
    "deepseek-v3": Layer(256, 7168, 2048, 8, routed="float32"),
    "mixtral": Layer(8, 4096, 14336, 2, routed="float32"),
    "gpt-oss": Layer(32, 2880, 2880, 4, GPT_OSS, biases=True),
    "tf32": Layer(128, 2048, 768, 8),  # in float32, as torch is told by set_float32_matmul_precision("high")
    "autocast": Layer(32, 1024, 512, 6, weights="float32", routed="float32"),
    "odd": Layer(5, 37, 21, 3, {"activation": "gelu", "gated": False}, biases=True),
    "odd-gated": Layer(5, 37, 21, 3),
    "single": Layer(1, 1, 1, 1),
    # experts enough for the way without a plan
    "odd-few": Layer(13, 37, 21, 3, biases=True),
    "odd-one": Layer(16, 37, 21, 1),
    # the activations that the others leave out
    "tanh": Layer(8, 256, 128, 2, {"activation": "gelu_pytorch_tanh"}, biases=True),
    "gelu": Layer(8, 256, 128, 2, {"activation": "gelu", "transposed": True}),
    "relu": Layer(8, 256, 128, 2, {"activation": "relu", "interleaved": True}),
    "relu2": Layer(8, 256, 128, 2, {"activation": "relu2", "gated": False}),
    "softcap": Layer(8, 256, 128, 2, {"gate_softcap": 4.0, "up_softcap": 25.0}),
}


class Absent:
    """A GPU as far as the compiler asks for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0


def compile_for(capability: int) -> dict[tuple[str, str], object]:
    """From now on launches only compile; what they made is in the dict, by name and hash."""
    driver.set_active(Absent(capability))
    made, launch = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        del warmup
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        made.setdefault((self.__name__, kernel.hash), kernel)

    JITFunction.run = compile_only
    return made


def needs(kernel) -> dict[str, int]:
    """Registers, bytes of stack (what spilled) and of shared memory, how often some instructions occur, columns of the
    widest matmul, what the last load from memory waits for, and whether divisions and exponentials are exact."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("cuobjdump", "-sass", file.name)
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = {
        name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "LDGSTS", "FFMA", r"LDG\.E\.U16")
    }
    exact = not re.search(r"div\.full|ex2\.approx\.f32", kernel.asm["ptx"])  # libdevice's own steps are .ftz
    widest = max((int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", kernel.asm["ptx"])), default=0)
    return {**found, "shared": kernel.metadata.shared, "exact": exact, "widest": widest, **waits(code), **count}


def waits(code: str) -> dict[str, int]:
    """How many barriers and multiplications lie before the last load from memory: in the loop round it, where there is
    one, barriers behind it too."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    number = {int(address, 16): n for n, (address, _) in enumerate(lines)}
    last = max((n for n, (_, text) in enumerate(lines) if "LDG." in text), default=0)
    first, end = 0, last
    for n, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and number.get(int(jump[1], 16), n) <= last < n:
            first, end = number[int(jump[1], 16)], n
            break
    barriers = sum("BAR.SYNC" in text for _, text in lines[first:end])
    return {"barriers": barriers, "before": sum("FFMA" in text for _, text in lines[first:last])}


def run(program: str, *args: str) -> str:
    return subprocess.run([BINARIES / program, *args], capture_output=True, text=True, check=True).stdout


def launch_everything(capability: int, dtype: torch.dtype, layer: Layer, n_tokens: int) -> None:
    """Forward and backward of one layer, with H kept and computed again, into new gradients and into old ones; and the
    routing of its tokens."""
    from moesaic.engine.op import Gradients
    from moesaic.engine.spec import ExpertSpec
    from moesaic.engine.triton import experts
    from moesaic.engine.triton.blocks import suited, tiles_for
    from moesaic.types import ExpertWeights

    weight_dtype, routed_dtype = (getattr(torch, name) if name else dtype for name in (layer.weights, layer.routed))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    there = divmod(capability, 10)

    def tiles_there(n, tokens, matrices, spec, **_):
        return suited(tiles_for(-(-n // len(matrices.up)), tokens.dtype, there, matrices.up.dtype), spec, there)

    experts._tiles = tiles_there
    spec, (e, d, i, k) = ExpertSpec(**layer.spec), layer[:4]
    u = 2 * i if spec.gated else i
    shapes = ((e, d, u), (e, i, d)) if spec.transposed else ((e, u, d), (e, d, i))
    biases = ((e, u), (e, d)) if layer.biases else ()
    matrices = ExpertWeights(*(tensor(*shape, dtype=weight_dtype) for shape in (*shapes, *biases)))
    tokens, weights = tensor(n_tokens, d), tensor(n_tokens, k, dtype=routed_dtype)
    ids = tensor(n_tokens, k, dtype=torch.int64)
    given = (tokens, ids, weights, matrices, spec)
    experts.forward(*given, keep="nothing", batch_invariant=False)
    out, hidden, *order = experts.forward(*given, keep="hidden", batch_invariant=False)
    wanted = Gradients(True, True, True, True, layer.biases, layer.biases)
    for kept in (hidden, hidden[:0]):
        experts.backward(out, tokens, weights, matrices, kept, *order, spec, wanted)
    experts.backward(out, tokens, weights, matrices, hidden, *order, spec, wanted, matrices.up, matrices.down)


def launch_routing(n_tokens: int, **changes) -> None:
    """DeepSeek-V3's gate, or a change of it: with a bias, without, and replayed."""
    from moesaic.config import MoEConfig
    from moesaic.engine.route_op import RouteSpec
    from moesaic.engine.triton import route

    gate = MoEConfig.preset("deepseek-v3", **changes)
    rules = RouteSpec.of(gate)
    logits = torch.empty(n_tokens, gate.n_routed_experts, device="meta")
    bias = logits.new_empty(gate.n_routed_experts)
    weights, ids = route.forward(logits, bias, None, rules)
    route.backward(weights, logits, ids, rules)
    if changes:
        route.forward(logits, None, None, rules)
        route.forward(logits, bias, ids, rules)


def main(capability: int, dtype: str, layer: str, *tokens: int, names: bool) -> None:
    made = compile_for(capability)
    torch.set_float32_matmul_precision("high" if layer == "tf32" else "highest")
    for n in tokens:
        before = set(made)
        if layer == "every gate":
            for method, rule in product(METHODS.values(), RULES.values()):
                launch_routing(n, **{"topk_group": 4, **method, **rule})
        else:
            launch_everything(capability, getattr(torch, dtype), LAYERS[layer], n)
            launch_routing(n)
        for key in [key for key in made if key not in before]:
            found = {} if names else needs(made[key])
            sys.stdout.write(json.dumps({"kernel": key[0], "tokens": n, **found}) + "\n")


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "--names"]
    main(int(given[0]), *given[1:3], *map(int, given[3:]), names="--names" in sys.argv)
