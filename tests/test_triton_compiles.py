"""The kernels as real GPUs get them, made without one: they assemble, nothing spills, shared memory suffices, and the
matmuls use the instructions they are meant to."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton")

from moesaic.engine.triton.blocks import FLOAT, LEAST_SHARED_MEMORY, NARROW, SHARED_MEMORY, WIDE, fitted, tiles_for

SCRIPT = Path(__file__).with_name("triton_compiled.py")
MATMULS = ("_up", "_matmul", "_d_hidden", "_outer")
TOKENS = (1, 64, 300, 1024, 32768)  # one of every row of the table, and the way without a plan
# Triton 3.9's assembler spills 16 bytes in one kernel on sm_90, and on sm_80 moves half of the multiplications ahead
NEWER = Version(version("triton")) >= Version("3.9")
# decoding, what was read is turned there: columns lie side by side, or weights are wider than what they multiply
BY_WAY_OF_SHARED_MEMORY = ("gpt-oss", "gelu", "autocast")
KERNELS = {
    "_sort_few", "_down_and_combine", "_count", "_scatter", "_layout", "_combine", "_d_weights", "_route",
    "_route_backward", *MATMULS,
}  # fmt: skip


def compiled(capability: int, dtype: str, layer: str, *tokens: int, names: bool = False) -> list[dict]:
    """What each kernel needs, or its name alone, which takes no look at its instructions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--names"] if names else []
    command = [sys.executable, SCRIPT, *options, str(capability), dtype, layer, *map(str, tokens)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("capability", "dtype", "layer"),
    [
        (90, "bfloat16", "ladder"),
        (90, "bfloat16", "gpt-oss"),
        (80, "float16", "ladder"),
        slow(90, "bfloat16", "autocast"),
        slow(90, "bfloat16", "deepseek-v3"),
        slow(90, "bfloat16", "mixtral"),
        slow(90, "float16", "ladder"),
        slow(90, "bfloat16", "tanh"),
        slow(90, "bfloat16", "gelu"),
        slow(90, "bfloat16", "relu"),
        slow(90, "bfloat16", "relu2"),
        slow(90, "bfloat16", "softcap"),
        slow(90, "float32", "ladder"),
        slow(80, "float32", "ladder"),
        slow(90, "float32", "tf32"),
        slow(80, "float32", "tf32"),
        slow(86, "bfloat16", "ladder"),
        slow(86, "bfloat16", "gpt-oss"),
        slow(86, "bfloat16", "autocast"),
        slow(89, "bfloat16", "ladder"),
        slow(100, "bfloat16", "ladder"),
        slow(100, "bfloat16", "gpt-oss"),
        slow(120, "bfloat16", "ladder"),
    ],
)
def test_kernels_assemble_for(capability, dtype, layer):
    made = compiled(capability, dtype, layer, *TOKENS)
    if layer == "ladder":
        assert {kernel["kernel"] for kernel in made} == KERNELS
    check_shared_memory(capability, made)
    for kernel in made:
        spills = capability != 90 or (NEWER and kernel["kernel"] == "_d_hidden")
        a_few = 24 if kernel["kernel"] == "_matmul" and layer == "ladder" and dtype == "float32" else 16 * spills
        assert kernel["stack"] <= a_few, f"{kernel} spills"
        if kernel["kernel"] in MATMULS:
            assert kernel["LDGSTS"], f"{kernel} does not load ahead"
            few = 8 if kernel["kernel"] == "_d_hidden" else 2  # biases, and weights of the routing
            assert kernel["LDG\\.E\\.U16"] <= few, f"{kernel} loads single numbers"
        if kernel["kernel"] == "_down_and_combine" and layer not in BY_WAY_OF_SHARED_MEMORY:
            assert not kernel["barriers"], f"{kernel} waits for one expert before it asks for the next one's weights"
        assert kernel["exact"] or kernel["kernel"] != "_route", f"{kernel} has scores that are not torch's"
        if kernel["kernel"] == "_down_and_combine" and layer == "ladder":
            # in the loop are half of all multiplications; the assembler moves some of them between the loads
            share = 2 if dtype == "float32" or (NEWER and capability == 80) else 4
            assert kernel["before"] <= kernel["FFMA"] // share, (
                f"{kernel} multiplies before it asks for what comes next"
            )
        if layer == "tf32" and kernel["kernel"] in MATMULS:
            assert kernel["HGMMA"] or kernel["HMMA"], f"{kernel} multiplies without tensor cores"
        if kernel["kernel"] in MATMULS and capability == 90 and dtype != "float32":
            assert kernel["HGMMA"] or kernel["HMMA"], f"{kernel} leaves the tensor cores idle"
            if kernel["tokens"] == 32768:
                assert kernel["HGMMA"], f"{kernel} leaves the fast half of the tensor cores idle"
            if kernel["kernel"] == "_up" and layer == "ladder":
                assert kernel["HGMMA"] <= 64 // 16, f"{kernel} reads its rows once for the gate and once for up"
                assert kernel["widest"] == 256 or kernel["tokens"] < 32768, f"{kernel} is of narrow instructions"


@pytest.mark.slow
def test_every_gate_assembles():
    made = compiled(90, "float32", "every gate", 128)
    assert {kernel["kernel"] for kernel in made} == {"_route", "_route_backward"}
    assert len(made) > 100
    for kernel in made:
        assert kernel["stack"] == 0, f"{kernel} spills"
        assert kernel["exact"] or kernel["kernel"] != "_route", f"{kernel} has scores that are not torch's"


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["odd", "odd-gated", "odd-few", "odd-one", "single"])
def test_widths_of_any_kind_assemble(layer):
    """They are loaded number by number and may spill: slow, but they run."""
    check_shared_memory(90, compiled(90, "bfloat16", layer, 1, 40, 512))


@pytest.mark.parametrize("tokens", [(9, 10, 16, 17, 100, 255), (2049, 2050, 2056, 2064, 2176)], ids=["few", "many"])
def test_other_numbers_of_tokens_need_no_other_kernels(tokens):
    made = compiled(90, "bfloat16", "ladder", *tokens, names=True)
    assert {kernel["tokens"] for kernel in made} == {tokens[0]}


def check_shared_memory(capability: int, made: list[dict]) -> None:
    limit = SHARED_MEMORY.get(divmod(capability, 10), LEAST_SHARED_MEMORY)
    assert made
    for kernel in made:
        assert kernel["shared"] <= limit, f"{kernel} needs more shared memory than there is"


@pytest.mark.parametrize("table", [WIDE, NARROW, FLOAT], ids=["wide", "narrow", "float"])
def test_one_layout_serves_every_op_that_walks_over_rows(table):
    for tiles in table.values():
        assert tiles.up.rows == tiles.matmul.rows == tiles.d_hidden.rows
    assert list(table) == sorted(table, key=lambda most: most or 10**9), "the first that fits is taken"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0), (13, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_smaller_memory_gets_fewer_stages(capability, dtype):
    memory = SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)
    for rows in (1, 20, 100, 1000, 10**6):
        for op, blocks in tiles_for(rows, dtype, capability)._asdict().items():
            stage = (blocks.rows + (2 if op == "up" else 1) * blocks.columns) * blocks.depth * dtype.itemsize
            assert stage * (blocks.stages - 2) <= memory
            assert blocks.stages >= 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
def test_wider_weights_get_fewer_stages_or_less_depth(capability):
    for rows in (1, 20, 100, 10**6):
        plain, wide = (tiles_for(rows, torch.bfloat16, capability, t).up for t in (torch.bfloat16, torch.float32))
        assert wide.stages * wide.depth <= plain.stages * plain.depth
    assert tiles_for(10**6, torch.bfloat16, (9, 0), torch.float32).up != WIDE[0].up


def test_a_tile_that_fits_nowhere_gets_less_depth():
    large = WIDE[0].up._replace(depth=256, stages=4)
    assert fitted("up", large, (2, 2), (8, 6)).depth < 256
    assert fitted("up", large._replace(depth=64), (2, 2), (9, 0)) == large._replace(depth=64)


def test_on_sm_100_no_tile_is_256_wide():
    assert all(blocks.columns <= 128 for rows in (1, 100, 10**6) for blocks in tiles_for(rows, torch.bfloat16, (10, 0)))
