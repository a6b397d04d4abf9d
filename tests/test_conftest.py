"""What all tests share: after one that lost the GPU, the others are still told apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import torch

def test_before():
    pass

def test_that_loses_it():
    def lost():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost

def test_after():
    pass
"""


@pytest.mark.parametrize(
    ("workers", "code", "said"),
    [
        (1, 1, ["crashed while running 'test_lost.py::test_that_loses_it'", "1 failed, 3 passed"]),  # its call passed
        (0, 70, ["the device was lost: an illegal memory access", "2 passed"]),
    ],
)
def test_a_lost_device_fails_one_test_where_there_are_workers_and_ends_the_run_elsewhere(tmp_path, workers, code, said):
    (tmp_path / "test_lost.py").write_text(TESTS)
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent / "src")])
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", str(workers), "-c", os.devnull, "--rootdir", "."]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    for words in said:
        assert words in run.stdout
