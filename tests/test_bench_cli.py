"""`moesaic bench` as a user meets it."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from bench_problems import CEILING

from moesaic.bench import memory
from moesaic.bench.campaign import Campaign
from moesaic.bench.machine import TUNING
from moesaic.bench.runner import Result
from moesaic.cli import main
from moesaic.cli.bench import _cells


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("--smoke") -> (exit code, stdout, stderr), in this process, an empty folder, with a ceiling made up."""
    monkeypatch.chdir(tmp_path)
    for name in filter(lambda name: name.startswith(TUNING), list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr("moesaic.bench.campaign.measure_ceiling", lambda _dtype: CEILING)
    monkeypatch.setattr("moesaic.bench.machine.onednn_isa", lambda: "some instructions")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesaic", "bench", *arguments])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code or 0, *capsys.readouterr()

    return call


ONE_CELL = ("--shape", "tiny", "--tokens", "24", "--dtype", "float32", "--mode", "forward", "--routing", "balanced")


def test_smoke_measures_every_mode_and_writes_both_files(run, tmp_path):
    code, out, err = run("--smoke", "--threads", "1", "--out", "out")
    assert code == 0, err
    assert "Traceback" not in err
    report = (tmp_path / "out" / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    results = [Result.of(line) for line in lines if line["kind"] == "cell"]
    assert {result.cell.mode for result in results} == {
        "forward", "train-forward", "fwd+bwd-fresh", "fwd+bwd-accumulate", "memory", "router",
    }  # fmt: skip
    for result in results:
        assert not result.skipped
        for row in result.rows:
            assert row.cost is not None or "T <= 64" in row.note or "clamped" in row.note, f"{result.cell.key}: {row}"
        assert f"T={result.cell.tokens}, {result.cell.routing}" in report
    assert "reproduce: moesaic bench --smoke --threads 1 --out out" in out
    assert re.search(r"tiny T=32 float32 memory balanced, 1 thread, \w+ +\d+ MiB", out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.jsonl"]


def test_a_run_is_resumed_without_measuring_again_and_json_is_json(run):
    once = (*ONE_CELL, "--peers", "none", "--out", "out", "--rounds", "1")
    code, _, err = run(*once)
    assert code == 0, err
    code, out, err = run(*once, "--resume", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [line["kind"] for line in found["lines"]] == ["machine", "begin", "ceiling", "cell", "ceiling"]
    assert found["left_out"] == []


def test_a_cell_that_fails_as_a_whole_is_a_bad_end(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("moesaic.bench.campaign.run_cell", fail)
    code, out, _ = run(*ONE_CELL, "--peers", "none", "--rounds", "1")
    assert code == 1
    assert "failed: MemoryError: no room" in out


def test_a_report_names_every_command_that_measured_for_it(run):
    rest = (*ONE_CELL[:2], *ONE_CELL[4:], "--peers", "none", "--rounds", "1", "--out", "out")
    assert run("--tokens", "24", *rest)[0] == 0
    more = ("--tokens", "24,25", *rest)
    for words in (more, more, ("--tokens", "26", *rest, "--budget", "0")):  # the last two measure nothing
        code, out, err = run(*words, "--resume")
        assert code == 0, err
    commands = ["moesaic bench " + " ".join(words) for words in (("--tokens", "24", *rest), more)]
    assert f"reproduce: {', then '.join(commands)}\n" in out
    assert "Reproduce: " + ", then ".join(f"`{command}`" for command in commands) in Path("out/report.md").read_text()


def test_a_budget_of_nothing_leaves_everything_to_resume(run):
    code, out, _ = run(*ONE_CELL, "--budget", "0", "--out", "out")
    assert (code, "cells not measured: 1" in out) == (0, True)
    assert "`--resume` goes on with them" in Path("out/report.md").read_text()


def test_an_interrupted_run_leaves_a_report_of_what_it_has(run, monkeypatch):
    measured = []

    def interrupt(campaign, cell, weights):
        if measured:
            raise KeyboardInterrupt
        measured.append(cell)
        return real(campaign, cell, weights)

    real = Campaign._measure
    monkeypatch.setattr(Campaign, "_measure", interrupt)
    code, _, err = run(*ONE_CELL[:2], "--tokens", "24,25", *ONE_CELL[4:], "--peers", "none", "--out", "out")
    assert code != 0
    assert "interrupted: --resume goes on" in err
    assert "Cells not measured: 1" in Path("out/report.md").read_text()


def test_the_command_is_one_that_gives_the_same_from_nothing(run, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    once = (*ONE_CELL, "--peers", "none", "--rounds", "1")
    code, out, err = run(*once, "--budget", "9", "--out", "deep/out")
    assert code == 0, err
    expected = "reproduce: OMP_WAIT_POLICY=passive moesaic bench " + " ".join(once) + " --out out"
    assert expected in out
    assert expected in run(*once, "--budget=9", "--out=deep/out", "--resume")[1]
    assert "- Environment: OMP_WAIT_POLICY=passive" in Path("deep/out/report.md").read_text()


def test_a_peer_from_a_file_is_measured_and_a_wrong_engine_ends_in_1(run):
    Path("mine.py").write_text(
        "from moesaic.bench.contenders import Contender, our_engine\n"
        "def build(problem):\n"
        "    call = our_engine('grouped').build(problem)\n"
        "    return lambda tokens, ids, weights: 2 * call(tokens, ids, weights)\n"
        "PEERS = [Contender('mine', 'peer', our_engine('grouped').build), Contender('bad', 'ours', build)]\n"
    )
    code, out, err = run(*ONE_CELL, "--peers", "mine.py:mine", "--rounds", "1")
    assert code == 0, err
    assert re.search(r" ms +mine ", out)
    code, out, _ = run(*ONE_CELL, "--peers", "mine.py", "--rounds", "1")
    assert code == 1
    assert re.search(r"24 float32 forward balanced, \d+ threads?, bad +wrong", out)


def test_an_engine_whose_process_dies_ends_in_1(run, monkeypatch):
    monkeypatch.setattr(memory, "_in_a_process", lambda _: None)
    code, out, _ = run("--shape", "tiny", "--tokens", "8", "--mode", "memory", "--dtype", "float32", "--peers", "none")
    assert code == 1
    assert "failed: its process died" in out


def test_packed_weights_and_the_time_they_took_are_in_the_report(run):
    Path("packs.py").write_text(
        "from moesaic.bench.contenders import Contender, our_engine\n"
        "class Packed:\n"
        "    prepacked_bytes = 3 << 20\n"
        "    def __init__(self, problem):\n"
        "        self.call = our_engine('grouped').build(problem)\n"
        "    def __call__(self, *args):\n"
        "        return self.call(*args)\n"
        "PEERS = [Contender('packs', 'peer', Packed)]\n"
    )
    code, _, err = run(*ONE_CELL, "--peers", "packs.py", "--rounds", "1", "--out", "out")
    assert code == 0, err
    assert re.search(r"packs packs weights before the clock: 3 MiB in \d+ ms", Path("out/report.md").read_text())


MISTAKES = {
    "unknown shape": (["--shape", "qwen9"], "--shape 'qwen9' is unknown: use qwen3-30b, olmoe"),
    "unknown mode": (["--mode", "backward"], "--mode 'backward' is unknown: use forward, train-forward"),
    "no number": (["--tokens", "1,many"], "--tokens 'many' is not a number from 1"),
    "no threads": (["--threads", "0"], "--threads '0' is not a number from 1"),
    "unknown engine": (["--engine", "warp"], "--engine warp is unknown: use auto, reference"),
    "unknown peer": (["--peers", "eager,rivals"], "--peers rivals is unknown: use eager, batched_mm"),
    "no such file": (["--peers", "rivals.py"], "--peers rivals.py: no such file"),
    "a file without peers": (["--peers", "empty.py"], "--peers empty.py: it has no list PEERS"),
    "a peer that is not there": (["--peers", "mine.py:his"], "--peers mine.py:his: it has nobody"),
    "a peer that is not installed": (["--peers", "broken.py"], "--peers broken.py: No module named 'rivals'"),
    "one peer twice": (["--peers", "grouped_mm, grouped_mm"], "--peers has 'transformers grouped_mm' 2 times"),
    "nothing to resume": (["--resume", "--out", "new"], "results.jsonl: cannot be read"),
    "resume where": (["--resume"], "--resume needs the folder to go on with: give --out"),
    "something to overwrite": (["--out", "done"], "is there already: add --resume"),
    "two grids": (["--smoke", "--targets"], "--smoke and --targets are both given: use one of them"),
    "no such target": (["--targets", "--shape", "mixtral"], "--targets has no such cell"),
    "no rounds": (["--rounds", "0"], "Invalid value for '--rounds'"),
    "unwritable": (["--out", "empty.py/x"], "--out empty.py/x: cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, run):
    Path("empty.py").touch()
    Path("mine.py").write_text("PEERS = []\n")
    Path("broken.py").write_text("import rivals\n")
    Path("done").mkdir()
    Path("done/results.jsonl").touch()
    arguments, message = MISTAKES[mistake]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("moesaic: ")
    assert err.count("\n") == 1
    assert message in err


def test_smoke_measures_no_cell_twice():
    given = {
        "shapes": ("tiny-dsv3",),
        "tokens": (32,),
        "dtypes": ("float32",),
        "modes": ("router",),
        "routings": ("balanced",),
    }
    cells = _cells(given, smoke=True, targets=False)
    assert len(cells) == len(set(cells))
