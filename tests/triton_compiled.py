"""Compile the kernels that a problem launches for a GPU that is not there, and print what they need, as JSON lines.

    python tests/triton_compiled.py 90 bfloat16 32768 [more token counts ...]

Triton brings its own assembler. A stand-in driver says which GPU it is, tensors without memory ("meta") carry shapes
and dtypes, and every launch stops after the kernel is made. TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__path__[0], "backends", "nvidia", "bin")
SIZES = (128, 2048, 768, 8)  # E, D, I, K: Qwen3-30B-A3B, the ladder shape


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
    """Registers, bytes of stack (what spilled) and of shared memory, and how often some instructions occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("cuobjdump", "-sass", file.name)
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA", "LDGSTS", "FFMA")}
    return {**found, "shared": kernel.metadata.shared, **count}


def run(program: str, *args: str) -> str:
    return subprocess.run([BINARIES / program, *args], capture_output=True, text=True, check=True).stdout


def launch_everything(capability: int, dtype: torch.dtype, n_tokens: int) -> None:
    """Forward and backward of one layer, and the routing of its tokens."""
    from moesaic.config import MoEConfig
    from moesaic.engine.op import Gradients
    from moesaic.engine.route_op import RouteSpec
    from moesaic.engine.spec import ExpertSpec
    from moesaic.engine.triton import experts, route
    from moesaic.engine.triton.blocks import tiles_for
    from moesaic.types import ExpertWeights

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    e, d, i, k = SIZES
    experts._tiles = lambda n, n_experts, tokens, **_: tiles_for(
        -(-n // n_experts), tokens.dtype, divmod(capability, 10)
    )
    tokens, weights = tensor(n_tokens, d), tensor(n_tokens, k, dtype=torch.float32)
    ids = tensor(n_tokens, k, dtype=torch.int64)
    matrices, spec = ExpertWeights(tensor(e, 2 * i, d), tensor(e, d, i)), ExpertSpec()
    experts.forward(tokens, ids, weights, matrices, spec, keep="nothing", batch_invariant=False)
    out, *saved = experts.forward(tokens, ids, weights, matrices, spec, keep="hidden", batch_invariant=False)
    experts.backward(out, tokens, weights, matrices, *saved, spec, Gradients(True, True, True, True, False, False))

    gate = MoEConfig.preset("deepseek-v3")
    rules, logits = RouteSpec.of(gate), tensor(n_tokens, gate.n_routed_experts, dtype=torch.float32)
    bias = tensor(gate.n_routed_experts, dtype=torch.float32)
    chosen = route.forward(logits, bias, None, rules)
    route.backward(chosen[0], logits, chosen[1], rules)


def main(capability: int, dtype: str, *tokens: int) -> None:
    made = compile_for(capability)
    for n in tokens:
        before = set(made)
        launch_everything(capability, getattr(torch, dtype), n)
        for key in [key for key in made if key not in before]:
            sys.stdout.write(json.dumps({"kernel": key[0], "tokens": n, **needs(made[key])}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
