"""Every test starts from a seed that its own id gives, so it can be run alone with the same numbers."""

import hashlib
import os
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# threads that wait for each other leave their core to the next worker: 2 of them took 47 times as long where they spun
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

# torch keeps compiled graphs on disk and does not notice that an operator in them has changed: a cache for each version
OPERATORS = [Path(__file__).parents[1] / "src" / "moesaic" / name for name in ("engine", "trace", "train")]
SOURCE = b"".join(path.read_bytes() for folder in OPERATORS for path in sorted(folder.rglob("*.py")))
DIGEST = hashlib.sha256(SOURCE).hexdigest()[:12]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"moesaic-graphs-{DIGEST}"))

if not torch.cuda.is_available():  # then Triton's kernels run on numpy; it asks when they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # what a shell starts in the background has it so
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests press Ctrl-C, also on processes they start

torch.set_num_threads(1)  # tensors here are small: more threads only wait for each other

settings.register_profile("moesaic", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("moesaic")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU the kernels' own tests run on it, so `-m gpu` means them too; not what only compiles."""
    if torch.cuda.is_available():
        for item in items:
            name = item.path.name
            if name.startswith(("test_triton_", "test_route_op")) and name != "test_triton_compiles.py":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _seed_from_test_id(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _a_lost_device_fails_one_test() -> Iterator[None]:
    """After an illegal access a process fails at whatever it asks of the device: xdist names the test, and goes on in
    another."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            pytest.exit(f"the device was lost: {error}", returncode=70)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads until the end of the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=["amx", "native", "none"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the CPU is said to have for matrices of 16 bits, whatever it has: AMX, other instructions, or none."""
    from moesaic.engine import gemm

    monkeypatch.setattr(gemm, "has_instructions", lambda _: request.param != "none")
    monkeypatch.setattr(gemm, "has_amx", lambda: request.param == "amx")
    return request.param
