"""The experiment's command goes on run by run: what is finished stays, what was interrupted is resumed."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import runner
from test_train_comparing import write_run

from moesaic.cli.compare import compare

ROOT = Path(__file__).parents[1]


def loaded():
    """benchmarks/balance.py as a module."""
    spec = importlib.util.spec_from_file_location("balance", ROOT / "benchmarks" / "balance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, its records and pages in a folder of the test."""
    module = loaded()
    pages = {lang: tmp_path / lang / "balance-experiment.md" for lang in ("en", "zh")}
    for page in pages.values():
        page.parent.mkdir()
        page.write_text(f"before\n{module.BEGIN}old\n{module.END}after\n")
    for name, value in (("ROOT", tmp_path), ("RECORDS", tmp_path / "records"), ("PAGES", pages)):
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """The script's `moesaic compare` starts no process: one takes as long as all that it does."""

    def run(command, *, cwd, env, **_):
        monkeypatch.chdir(cwd)
        code, out, err = runner(monkeypatch, capsys, columns=env["COLUMNS"], compare=compare)(*command[3:])
        assert code == 0, err
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def experiment(script, tmp_path, monkeypatch):
    """Runs the script, and returns the commands that it gave to train; nothing is trained or compared."""
    given = []

    def trained(command, **_):
        words = [str(word) for word in command[4:]]
        given.append(" ".join(words).replace(str(tmp_path), ""))
        folder = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
        write(folder, finished=True)

    monkeypatch.setattr(script.subprocess, "run", trained)
    monkeypatch.setattr(script, "compare", lambda *_: "")

    def run(*arguments):
        given.clear()
        monkeypatch.setattr(sys, "argv", ["balance.py", "--out", str(tmp_path / "runs"), *arguments])
        script.main()
        return sorted(given)

    return run


def write(folder, *, finished):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({"finished": finished}))


def test_after_a_run_that_failed_no_other_begins(experiment, script, monkeypatch):
    begun = []

    def failing(command, **_):
        begun.append(command)
        time.sleep(0.2)
        raise subprocess.CalledProcessError(130, command)

    monkeypatch.setattr(script.subprocess, "run", failing)
    with pytest.raises(subprocess.CalledProcessError):
        experiment()
    assert len(begun) <= 2  # the second may begin before the first is heard of


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


@pytest.mark.usefixtures("in_this_process")
def test_the_pages_get_what_compare_prints_and_draws(script, tmp_path, monkeypatch):
    def pages():
        monkeypatch.setattr(sys, "argv", ["balance.py", "--out", str(tmp_path / "runs"), "--minutes", "0"])
        script.main()
        return [page.read_text() for page in script.PAGES.values()]

    en, zh = pages()
    assert en == f"before\n{script.BEGIN}\nNo run has finished yet.\n\n{script.END}after\n"
    (tmp_path / "records").mkdir()
    for balance, loss in (("aux", 4.0), ("none", 3.9)):
        write_run(tmp_path / "records" / f"{balance}-0", balance, 0, loss=loss)
    en, zh = pages()
    assert "2 of 15 runs have finished. What follows rests on these alone" in en
    assert "15 次训练中已结束 2 次" in zh
    assert "+0.100" in en
    assert "Reproduce: moesaic compare records --lang en\n" in en
    assert "\x1b" not in en
    assert en.startswith(f"before\n{script.BEGIN}")
    assert en.endswith(f"](balance-experiment.png)\n\n{script.END}after\n")
    assert (tmp_path / "zh" / "balance-experiment.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_shows_the_records_that_are_here(lang, request):
    if lang == "zh":  # en by the command itself
        request.getfixturevalue("in_this_process")
    script = loaded()
    shown = script.PAGES[lang].read_text("utf-8").partition(script.BEGIN)[2].partition(script.END)[0]
    rewrite = "run `python benchmarks/balance.py --out runs/balance --minutes 0` and look"
    assert shown == script.results(lang, planned=15), rewrite
