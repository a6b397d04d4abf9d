"""The scripts that measure what recording, monitoring and balancing cost: that they run, not what they find."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from moesaic.bench.recording import recording_cost
from moesaic.hf.load import load_model
from moesaic.trace.file.reader import load

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def test_recording_is_measured_beside_forwards_that_are_not_recorded(tmp_path):
    model, ids = load_model()[0], torch.arange(6)[None]
    costs = recording_cost(model, ids, rounds=2, forwards=3, to=tmp_path / "run.safetensors")
    assert [cost.detail for cost in costs] == ["not recorded", "ids", "picks", "scores"]
    assert [cost.seconds.rounds for cost in costs] == [2] * 4
    assert costs[0].overhead == 0
    assert all(cost.overhead == pytest.approx(cost.seconds.median / costs[0].seconds.median - 1) for cost in costs)
    assert len(load(tmp_path / "run.safetensors")) == 3 * 6


def test_monitoring_is_measured_beside_steps_that_nobody_watches(monkeypatch, capsys):
    sizes = ["--model", "shipped", "--rounds", "1", "--rows", "1", "--length", "8"]
    monkeypatch.setattr(sys, "argv", ["monitor.py", *sizes])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPTS / "monitor.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shipped, 8 tokens a step, 1 rounds"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "not watched", "LoadMonitor", "LoadMonitor, loads=True", "BalanceLoss, switch", "BalanceLoss, sequence",
        "BalanceLoss, global_batch", "BiasBalance", "BiasBalance, LoadMonitor", "judging",
    ]  # fmt: skip
