"""The examples run as a user would run them, and say what they promise."""

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import moesaic as ms
from moesaic.hf.load import load_model
from moesaic.hf.modules import moe_layers

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Iterator[Callable[..., str]]:
    """What an example prints, run as a script in an empty folder."""

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: a second thread only costs time

    def run(name: str, *args: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr("sys.argv", [name, *args])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_says_what_an_example_does(name, run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert f"examples/{name}" in capsys.readouterr().out


def test_the_training_loop_learns_and_balances(run):
    found = re.findall(r"loss ([\d.]+), MaxVio ([\d.]+)", run("train_loop.py"))
    losses, violations = zip(*((float(loss), float(max_vio)) for loss, max_vio in found), strict=True)
    assert losses[-1] < losses[0] - 1
    assert violations[-1] < 0.5 < violations[0]


def test_the_training_loop_without_balancing_stays_uneven(run):
    found = re.findall(r"MaxVio ([\d.]+)", run("train_loop.py", "--speed", "0", "--steps", "50"))
    assert float(found[-1]) > 1


def test_a_block_of_transformers_is_replaced_without_a_change(run):
    difference = re.search(r"differ by at most (\S+)", run("hf_block.py"))
    assert float(difference[1]) < 1e-5


def test_an_upcycled_model_starts_at_the_loss_of_the_dense_one_and_learns_on(run):
    printed = run("upcycle.py", "--dense-steps", "40", "--steps", "30", "--granularity", "2")
    dense, moe, dense_later, moe_later = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", printed))
    assert abs(moe - dense) < 1e-3
    assert dense_later < dense - 0.05
    assert moe_later < moe - 0.05
    assert re.search(r"MaxVio of the last step by layer: [\d.]+, [\d.]+", printed)


def test_the_routing_study_judges_every_layer_and_keeps_the_record(run, tmp_path):
    printed = run("routing_study.py")
    trace = ms.load(tmp_path / "routing.safetensors")
    assert repr(trace) in printed
    assert (len(trace) > 1000, trace.n_sequences) == (True, 60), "a poem is a document"
    for layer in trace.layers:
        assert re.search(rf"{re.escape(layer)}: MaxVio [\d.]+ \(chance [\d.]+ to [\d.]+\): \w+", printed)


def test_fine_tuning_lowers_the_held_out_loss_and_evens_out_the_load(run, tmp_path):
    printed = run("hf_finetune.py", "--steps", "20", "--out", "out")
    judged = re.findall(r"held-out loss ([\d.]+), MaxVio of the worst layer ([\d.]+)", printed)
    (loss, max_vio), (later, evener) = ((float(a), float(b)) for a, b in judged)
    assert later < loss
    assert evener < max_vio
    assert (tmp_path / "out" / "load.jsonl").read_text().count('"kind":"step"') == 20
    (tmp_path / "short.txt").write_text("To be, or not to be.\n" * 5)
    with pytest.raises(SystemExit, match="2"):
        run("hf_finetune.py", "--file", "short.txt", "--out", "short")
    (tuned, _), (shipped, _) = load_model(tmp_path / "out"), load_model()
    for ours, before in zip(moe_layers(tuned), moe_layers(shipped), strict=True):
        assert not torch.equal(ours.bias, before.bias)
