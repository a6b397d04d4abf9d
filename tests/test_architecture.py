"""Imports point one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

SRC = Path(__file__).parents[1] / "src" / "moesaic"
ROOMS = [
    {"types", "config", "families", "hf_config", "rules", "strict_json", "versions"},
    {"engine"},
    {"layer"},
    {"hf"},
    {"trace"},
    {"train"},
    {"bench", "conformance", "article"},
    {"cli", "__main__"},
]
TRACE_ROOMS = [
    {"shown", "depth", "slots"},
    {"store"},
    {"file", "chance", "rows"},
    {"recording"},
    {"rule", "imports"},
    {"compare", "reroute", "join"},
    {"statistics"},
    {"figures"},
]
TRACE_FLOOR = {room: floor for floor, rooms in enumerate(TRACE_ROOMS) for room in rooms}
OF_A_TRACE = {"file", "rows", "rule"}  # what the methods of Trace call, which reads the Trace
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(
    path.relative_to(SRC) for path in SRC.rglob("*.py") if path.name != "__init__.py" or path.parent != SRC
)


def room_of(name: str) -> str:
    """The room that `from moesaic import name` reaches: a room itself, or the home of a public name."""
    return moesaic._HOMES[name].split(".")[1] if name in moesaic._HOMES else name


def trace_rooms(tree: ast.AST) -> set[str]:
    """Rooms of trace/ that a module imports."""
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "moesaic.trace":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moesaic.trace."):
            rooms.add(node.module.split(".")[2])
    return rooms


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moesaic."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and (node.module == "moesaic" or node.level):
            rooms |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moesaic.")}
    return rooms


# what oneDNN was told by the environment decides how fast it is, and it can be asked nowhere else; the bench reports it
ONEDNN_LIMIT_IN = ("engine/processor.py", "bench/machine.py")
# how threads wait for each other can be told to OpenMP in the environment alone, before it is loaded
TELLS_OPENMP = ("cli/demo.py",)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module):
    room = module.parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no place in the order of rooms"
    imported = imported_rooms(ast.parse((SRC / module).read_text())) - {"__version__"}
    assert imported <= FLOOR.keys(), f"{module} imports {imported - FLOOR.keys()}, which have no place in it"
    higher = {other for other in imported if FLOOR[other] > FLOOR[room]}
    assert not higher, f"{module} imports {higher}, which come after it"


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] == "trace" and len(m.parts) > 1], ids=str)
def test_imports_inside_trace_point_one_way(module):
    room = module.parts[1].removesuffix(".py")
    imported = trace_rooms(ast.parse((SRC / module).read_text()))
    if room == "__init__":
        assert not imported
        return
    assert room in TRACE_FLOOR, f"trace/{room} has no place in the order of its rooms"
    allowed = {other for other, floor in TRACE_FLOOR.items() if floor < TRACE_FLOOR[room]} | {room}
    allowed |= OF_A_TRACE if module.as_posix() == "trace/store.py" else set()
    assert imported <= allowed, f"{module} imports {imported - allowed}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_relative_imports_and_no_env_reads(module):
    tree = ast.parse((SRC / module).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("getenv", "environ")]
    if str(module) not in (*ONEDNN_LIMIT_IN, *TELLS_OPENMP):
        assert not reads, "behaviour is chosen by arguments, not by environment variables"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not loaded_by("import moesaic") & {"torch", "transformers", "matplotlib", "triton", "numpy"}
    assert not loaded_by("import moesaic.cli") & {"torch", "transformers", "matplotlib", "numpy"}


def test_layers_need_neither_transformers_nor_matplotlib():
    loaded = loaded_by(
        "import moesaic; moesaic.MoE; moesaic.DeepseekV3MoE; moesaic.Router; moesaic.MoEGate; moesaic.record"
    )
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "torch._dynamo", "triton"}


def test_a_training_step_loads_no_compiler():
    """It takes 1.3 s, and with Triton 3.9 prints at the exit."""
    loaded = loaded_by(
        "import torch, moesaic as ms; "
        "config = ms.MoEConfig(hidden_size=8, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2); "
        "ms.DeepseekV3MoE(config)(torch.randn(3, 8)).sum().backward()"
    )
    assert not loaded & {"torch._dynamo", "triton"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch, moesaic as ms
from moesaic.engine.select import best_engine
config = ms.MoEConfig(hidden_size=8, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2)
layer = ms.DeepseekV3MoE(config)
layer(torch.randn(3, 8)).sum().backward()
assert best_engine("cuda", torch.bfloat16)[0] == "grouped"
try:
    ms.DeepseekV3MoE(config, engine="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_all_but_its_engine_works():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "engine='triton' cannot run here: the package triton is not installed: pip install triton, "
        "or use 'auto' or 'grouped'\n"
    )


def test_triton_is_imported_by_its_first_kernel_alone():
    loaded = loaded_by(
        "import torch, moesaic as ms; from moesaic.engine.select import ENGINES, best_engine;"
        "best_engine('cuda', torch.bfloat16);"
        "layer = ms.DeepseekV3MoE(ms.MoEConfig(hidden_size=8, moe_intermediate_size=8, n_routed_experts=4,"
        "num_experts_per_tok=2)); layer(torch.randn(3, 8))"
    )
    assert "moesaic.engine.triton" in loaded
    assert "moesaic.engine.triton.experts" not in loaded
