"""The experiment's command goes on run by run: what is finished stays, what was interrupted is resumed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """benchmarks/balance.py, its records in a folder of the test, and the commands that it gave."""
    spec = importlib.util.spec_from_file_location("balance", ROOT / "benchmarks" / "balance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    given = []

    def trained(command, **_):
        words = [str(word) for word in command[4:]]
        given.append(" ".join(words).replace(str(tmp_path), ""))
        folder = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
        write(folder, finished=True)

    monkeypatch.setattr(module.subprocess, "run", trained)

    def run(*arguments):
        given.clear()
        monkeypatch.setattr(sys, "argv", ["balance.py", "--out", str(tmp_path / "runs"), *arguments])
        module.main()
        return sorted(given)

    return run


def write(folder, *, finished):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({"finished": finished}))


def test_every_balance_has_every_seed_and_as_many_steps_as_the_shipped_model(experiment, tmp_path):
    shipped = json.loads((ROOT / "src/moesaic/assets/tiny/training.json").read_text())["recipe"]["steps"]
    assert experiment() == sorted(
        f"tiny --out /runs/{balance}-{seed} --seed {seed} --balance {balance} --steps {shipped}"
        for balance in ("none", "aux", "seq", "bias", "bias-centred")
        for seed in (0, 1, 2)
    )
    assert len(list((tmp_path / "records").glob("*/training.json"))) == 15
    assert experiment() == [], "nothing is left to do"


def test_what_was_interrupted_goes_on_and_what_is_finished_stays(experiment, tmp_path):
    write(tmp_path / "runs" / "none-0", finished=False)
    write(tmp_path / "runs" / "aux-0", finished=True)
    write(tmp_path / "records" / "seq-0", finished=True)
    wanted = ("--balances", "none,aux,seq,bias", "--seeds", "0", "--steps", "7")
    assert experiment(*wanted, "--minutes", "0") == []
    assert experiment(*wanted, "--jobs", "2") == [
        "tiny --out /runs/bias-0 --seed 0 --balance bias --steps 7",
        "tiny --resume /runs/none-0",
    ]
    names = sorted(path.parent.name for path in (tmp_path / "records").glob("*/training.json"))
    assert names == ["aux-0", "bias-0", "none-0", "seq-0"]
