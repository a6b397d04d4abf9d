"""The log of a watched run: whole lines survive a kill, what is no log is refused, it goes on where its run does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train.monitor import run_log
from moesaic.train.monitor.run_log import LogReader, log_path, open_log, read_log, reader_of

HEADER = {
    "kind": "run", "format": "moesaic-load", "version": 1, "time": 1.0, "model": "M", "config": "abc", "after": 0,
    "total_steps": 100, "every": 1, "command": "c", "versions": {},
    "layers": [{"name": "a", "experts": 4, "config": "x", "bias": [0.0, 0.0, 0.0]},
               {"name": "b", "experts": 4, "config": "x", "bias": None}],
}  # fmt: skip


def step(number: int, **values) -> dict:
    columns = {
        "tokens": [8, None], "percentiles": [[0, 0, 1, 1, 1, 2, 2], None], "max_vio": [1.0, None],
        "chance": [[0.1, 0.5], None], "dead": [1, None], "hottest": [2, None], "coldest": [0, None],
        "bias": [[-0.1, 0.1, None], None],
    }  # fmt: skip
    return {"kind": "step", "step": number, "steps": 1, "time": 10.0 + number, "loss": 1.5} | columns | values


def alert(number: int, begins: bool, kind: str = "dead", layer: str | None = "a") -> dict:
    return {"kind": "alert", "step": number, "alert": kind, "layer": layer, "begins": begins, "message": "m"}


def written(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in (HEADER, *lines)))
    return path


def numbers(log) -> list[int]:
    return [line["step"] for line in log.steps]


def test_a_folder_holds_its_log_under_one_name_and_a_jsonl_is_itself(tmp_path):
    assert log_path(tmp_path / "runs" / "mine") == tmp_path / "runs" / "mine" / "load.jsonl"
    assert log_path(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"
    (tmp_path / "folder.jsonl").mkdir()
    assert log_path(tmp_path / "folder.jsonl") == tmp_path / "folder.jsonl" / "load.jsonl"
    (tmp_path / "training.json").write_text("{}")
    assert log_path(tmp_path / "training.json") == tmp_path / "training.json"


def test_what_is_written_is_read_again(tmp_path):
    writer, kept = open_log(tmp_path / "run" / "load.jsonl", HEADER, step=0, resume=False)
    assert kept.layers == HEADER["layers"]
    lines = [step(1), step(2, loss="nan"), {"kind": "verdict", "step": 2, "from": 1, "status": ["chance", "no_data"]}]
    for line in [*lines, alert(2, True), {"kind": "of a later version"}, {"kind": "end", "step": 2}]:
        writer.write(line)
    writer.close()
    log = read_log(tmp_path / "run")
    assert (log.header, log.steps, log.verdicts, log.alerts) == (HEADER, lines[:2], lines[2:], [alert(2, True)])
    assert log.end == {"kind": "end", "step": 2}


@given(st.integers(min_value=0))
def test_cut_at_any_byte_it_says_all_its_whole_lines(tmp_path_factory, cut):
    path = written(tmp_path_factory.mktemp("log") / "load.jsonl", *[step(n) for n in range(1, 6)])
    whole = path.read_bytes()
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut])
    expected = list(range(1, whole[:cut].count(b"\n")))
    log = LogReader(path).poll()
    assert numbers(log) == expected
    after = expected[-1] if expected else 0
    writer, _ = open_log(path, HEADER, step=after, resume=True)
    writer.write(step(after + 1))
    writer.close()
    assert numbers(read_log(path)) == [*expected, after + 1]


KILLED = """
import sys
from test_train_monitor_log import HEADER, step
from moesaic.train.monitor.run_log import open_log
writer, _ = open_log(__import__("pathlib").Path(sys.argv[1]), HEADER, step=0, resume=False)
number = 0
while True:
    number += 1
    writer.write(step(number, load=[list(range(4)), [0] * 4]))
    print(number, flush=True)
"""


def test_a_kill_loses_no_line_that_was_written(tmp_path):
    path = tmp_path / "load.jsonl"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for _ in range(300):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in process.stdout.read().split())])
    found = numbers(read_log(path))
    assert found == list(range(1, len(found) + 1))
    assert last <= len(found) <= last + 1


def test_resuming_drops_later_lines_and_a_torn_one_and_keeps_alerts_that_are_on(tmp_path):
    path = written(
        tmp_path / "load.jsonl", step(1), alert(1, True), alert(1, True, "loss", None), step(2), alert(2, False),
        step(3), alert(3, True), {"kind": "end", "step": 3},
    )  # fmt: skip
    before = path.read_bytes()
    path.write_bytes(before + b'{"kind":"step","st')
    writer, kept = open_log(path, HEADER, step=2, resume=False)
    assert list(kept.active) == [("loss", None)]
    writer.write({"kind": "resume", "step": 2, "time": 0.0})
    writer.write(step(3, loss=9.0))
    writer.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-2]) == b"".join(before.splitlines(keepends=True)[:6])
    log = read_log(path)
    assert [(line["step"], line["loss"]) for line in log.steps] == [(1, 1.5), (2, 1.5), (3, 9.0)]
    assert log.end is None


def test_an_earlier_runs_log_is_not_cut_by_a_new_run_and_another_models_not_gone_on_with(tmp_path, capsys):
    path = written(tmp_path / "load.jsonl", step(1), step(2))
    before = path.read_bytes()
    told = f"path={path} holds 2 steps of an earlier run: name another folder, or use resume=True to"
    for at, way_out in (
        (0, "begin again, as training does"),
        (None, "go on after them, attach(model, step=N) after step N"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{told} {way_out}") + "$"):
            open_log(path, HEADER, step=at, resume=False)
    for at, resume in ((1, False), (0, True), (None, True)):
        with pytest.raises(ValueError, match=r"log of another model \(config abc, here other\): name another folder"):
            open_log(path, HEADER | {"config": "other"}, step=at, resume=resume)
    assert path.read_bytes() == before
    writer, kept = open_log(path, HEADER, step=None, resume=True)
    writer.close()
    assert (kept.done, path.read_bytes()) == (2, before)
    open_log(path, HEADER, step=0, resume=True)[0].close()
    assert capsys.readouterr().err == f"moesaic: training begins at step 0: {path} drops its 2 steps of before\n"
    assert read_log(path).steps == []


def test_what_is_no_log_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "load.jsonl"
    for content in (b"my notes", b'{"kind":"runs"}\n', b"\x00\xff\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no log of ms\.LoadMonitor: name another file"):
            open_log(path, HEADER, step=3, resume=True)
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match=r"not a log of ms\.LoadMonitor"):
        read_log(path)
    with pytest.raises(ValueError, match="there is no such file: give a folder that"):
        read_log(tmp_path / "nowhere")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty so far, nothing to show"):
        read_log(path)


def test_a_path_that_cannot_be_written_is_told_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"path=.*cannot be written \(.+\): name another file or folder"):
        run_log.check_writable(tmp_path / "file" / "load.jsonl")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


DAMAGED = {
    "no JSON": b"{]",
    "no line": b"[1]",
    "no kind": b'{"step":1}',
    "deep": b'{"kind":' + b"[" * 100_000,
    "huge": json.dumps(step(1) | {"time": 0}).replace('"time": 0', '"time": 1' + "0" * 400).encode(),
    "huge loss": json.dumps(step(1) | {"loss": 0}).replace('"loss": 0', '"loss": 1' + "0" * 400).encode(),
    "a step without its number": json.dumps(step(1) | {"step": None}).encode(),
    "a negative step": json.dumps(step(-1)).encode(),
    "a loss that is a list": json.dumps(step(1, loss=[])).encode(),
    "too few layers": json.dumps(step(1, max_vio=[1.0])).encode(),
    "a text as number": json.dumps(step(1, max_vio=["1", None])).encode(),
    "short percentiles": json.dumps(step(1, percentiles=[[1], None])).encode(),
    "NaN": json.dumps(step(1, max_vio=[float("nan"), None])).encode(),
    "a load that is a number": json.dumps(step(1, load=[1, 2])).encode(),
    "a verdict of others": json.dumps({"kind": "verdict", "step": 1, "status": [1, 2]}).encode(),
    "a verdict from nowhere": json.dumps({"kind": "verdict", "step": 1, "status": [None, None]}).encode(),
    "an alert of nothing": json.dumps(alert(1, True) | {"message": None}).encode(),
    "a second header": json.dumps(HEADER).encode(),
    "half of a layer": json.dumps(step(1, chance=[None, None])).encode(),
    "a hole in percentiles": json.dumps(step(1, percentiles=[[0, 0, 1, None, 1, 2, 2], None])).encode(),
    "a header without layers": json.dumps(HEADER | {"layers": []}).encode(),
    "a header with a broken bias": json.dumps(HEADER | {"layers": [{"name": "a", "experts": 4, "bias": 1}]}).encode(),
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named_and_nothing_worse_happens(tmp_path, line):
    path = written(tmp_path / "load.jsonl", step(1))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"line 3 is damaged \(.+\): take it out, or all from there on"):
        read_log(path)


def test_a_later_version_is_refused_by_its_number(tmp_path):
    path = tmp_path / "load.jsonl"
    path.write_text(json.dumps(HEADER | {"version": 2}, separators=(",", ":")) + "\n")
    with pytest.raises(ValueError, match="version 2, and 1 is read here: use a newer moesaic"):
        read_log(path)


def test_a_reader_follows_a_log_that_grows_is_cut_and_begun_again(tmp_path):
    path = written(tmp_path / "load.jsonl", step(1), step(2))
    reader = LogReader(path)
    assert numbers(reader.poll()) == [1, 2]
    with path.open("ab") as file:
        file.write(json.dumps(step(3)).encode()[:30])
    assert numbers(reader.poll()) == [1, 2]
    written(path, step(1), step(2), step(3), step(4))
    assert numbers(reader.poll()) == [1, 2, 3, 4]
    written(path, step(1), step(2, loss=7.0), step(3, loss=7.0))  # taken up after step 1
    assert [line["loss"] for line in reader.poll().steps] == [1.5, 7.0, 7.0]
    written(path, step(1))
    assert numbers(reader.poll()) == [1]


def test_of_a_long_log_every_other_line_is_held_and_always_the_newest(tmp_path):
    for length in (15, 16, 17, 250):
        path = written(tmp_path / "load.jsonl", *[step(n) for n in range(1, length + 1)])
        found = numbers(reader_of(path, most=8).log)
        assert len(found) <= 16
        assert found[-1] == length
        assert len(found) == length or {b - a for a, b in pairwise(found)} != {1}


def test_reading_needs_no_torch():
    code = "import sys, moesaic.train.monitor.run_log as r; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_a_line_is_on_the_disk_as_soon_as_write_returns(tmp_path):
    writer, _ = open_log(tmp_path / "load.jsonl", HEADER, step=0, resume=False)
    began = time.time()
    writer.write(step(1, time=began))
    assert numbers(read_log(tmp_path)) == [1]
    writer.close()
