"""`moesaic watch` shows what a log says, in both languages, and answers with the run's own exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import runner
from test_train_monitor_log import HEADER, alert, step, written

from moesaic.cli.watch import watch
from moesaic.train.monitor.frame import curve, duration, frame, outcome, outcome_words, seconds_a_step
from moesaic.train.monitor.run_log import LogReader, read_log

VERDICT = {"kind": "verdict", "step": 20, "from": 1, "status": ["chance", "no_data"]}
END = {"kind": "end", "step": 20, "time": 30.0}


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys, watch=watch)


def healthy(path: Path, *more: dict, **values) -> Path:
    return written(path / "load.jsonl", *[step(n, **values) for n in range(1, 21)], VERDICT, *more).parent


def test_a_finished_healthy_run_is_shown_with_all_that_its_log_says(run, tmp_path):
    code, out, err = run("watch", healthy(tmp_path / "run", END))
    assert (code, err) == (0, "")
    assert "M  step 20 of 100 · 1.0 s a step · stopped before its end" in out
    assert "loss 1.500 " in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["a"])
    assert row.split() == [
        "a", "1.00", ".10–.50", "▁" * 10, "e2", "2.00x", "e0", "0.00x", "1", "-0.100", "+0.100", "within", "chance",
    ]  # fmt: skip
    assert next(line for line in out.splitlines() if line.split()[:1] == ["b"]).split()[1:] == ["–"] * 7 + [
        "no",
        "data",
    ]
    assert "no alerts\nno collapse, no dead experts in steps 1–20\n" in out
    assert "run: c\nwith –, config abc\n" in out


def test_it_speaks_chinese(run, tmp_path):
    code, out, _ = run("watch", healthy(tmp_path, alert(7, True), alert(9, False), END), "--lang", "zh")
    assert code == 0
    assert "第 20 步，共 100 步 · 每步 1.0 s · 提前停止" in out
    assert "在随机范围内" in out
    assert "第 1–20 步没有坍缩，没有死专家" in out
    assert "       9  解除  a: 有死专家" in out


@pytest.mark.parametrize("kind", ["collapsed", "dead", "loss", "gradient"])
def test_a_sick_run_is_exit_code_1_until_its_alert_ends(run, tmp_path, kind):
    layer = "a" if kind in ("collapsed", "dead") else None
    code, out, _ = run("watch", healthy(tmp_path / "1", alert(7, True, kind, layer), END))
    assert code == 1
    assert "\nsick: " in out
    assert run("watch", healthy(tmp_path / "2", alert(7, True, kind, layer), alert(9, False, kind, layer)))[0] == 0


@pytest.mark.parametrize("status", ["dead", "collapsed"])
def test_a_layer_whose_verdict_is_bad_is_exit_code_1_before_there_is_an_alert_of_it(run, tmp_path, status):
    """An alert of dead experts waits for a twentieth of a layer: till then the last line denies no column."""
    bad = VERDICT | {"step": 40, "status": ["chance", status]}
    code, out, _ = run("watch", healthy(tmp_path, step(40), bad))
    what = {"dead": "dead experts", "collapsed": "collapsed"}[status]
    assert code == 1
    assert f"no alerts\nsick: {what} (1 of 2 layers)\n" in out
    gone = alert(41, True, "no_tokens", None)
    assert run("watch", healthy(tmp_path, step(40), bad, gone))[0] == 2, "nothing is known of it any more"


def test_a_drift_is_shown_and_is_no_bad_verdict(run, tmp_path):
    code, out, _ = run("watch", healthy(tmp_path, alert(7, True, "drift"), END))
    assert code == 0
    assert "       7  on  a: bias drifted away" in out


def test_a_run_that_nobody_judged_yet_is_exit_code_2_and_shown_all_the_same(run, tmp_path):
    code, out, err = run("watch", written(tmp_path / "load.jsonl", step(1)))
    assert (code, err) == (2, "")
    assert out.count("no verdict yet: it takes 20 steps and enough tokens\n") == 1
    assert "step 1 of 100" in out
    assert "not judged yet" in out
    code, out, _ = run("watch", written(tmp_path / "load.jsonl"))
    assert code == 2
    assert "no line of a step yet" in out
    empty = VERDICT | {"status": ["no_data", "too_few"]}
    assert run("watch", written(tmp_path / "load.jsonl", step(1), empty))[0] == 2


@pytest.mark.parametrize("most", [None, 50])
def test_a_layer_that_was_never_judged_is_not_called_healthy(tmp_path, most):
    def standing(*statuses):
        lines = [VERDICT | {"step": 20 * (i + 1), "status": status} for i, status in enumerate(statuses)]
        log = LogReader(written(tmp_path / "load.jsonl", step(1), *lines), most=most).poll()
        return outcome(log), outcome_words(log)

    assert standing(["chance", "too_few"]) == (
        2,
        "no collapse, no dead experts in 1 of 2 layers; the others had too few tokens so far",
    )
    assert standing(["chance", "balanced"], ["chance", "too_few"])[0] == 0, "it was judged before, and gathers again"
    assert standing(["chance", "too_few"], ["chance", "balanced"])[0] == 0
    assert standing(["chance", "too_few"], ["chance", "no_data"])[0] == 0, "nothing is left to judge it by"


def test_json_is_one_document_with_the_exit_code(run, tmp_path):
    code, out, err = run("watch", healthy(tmp_path, alert(7, True, "collapsed")), "--json")
    document = json.loads(out)
    assert (code, err, out.count("\n")) == (1, "", 1)
    assert document["run"] == HEADER
    assert document["last"] == step(20)
    assert document["verdict"] == VERDICT
    assert document["standing"] == VERDICT["status"]
    assert document["alerts"] == [alert(7, True, "collapsed")]
    assert (document["step"], document["total_steps"], document["finished"], document["exit_code"]) == (
        20,
        100,
        False,
        1,
    )
    code, out, err = run("watch", written(tmp_path / "load.jsonl", step(1)), "--json")
    assert (code, json.loads(out)["exit_code"], err) == (2, 2, "")


def test_json_says_of_a_layer_that_gathers_again_what_it_was_judged_to_be(run, tmp_path):
    """Neither an alert nor the last verdict tells why that is exit code 1."""
    bad = VERDICT | {"step": 40, "status": ["dead", "chance"]}
    gathers = VERDICT | {"step": 60, "from": 41, "status": ["too_few", "chance"]}
    code, out, _ = run("watch", healthy(tmp_path, step(40), bad, step(60), gathers), "--json")
    document = json.loads(out)
    assert (code, document["verdict"], document["alerts"]) == (1, gathers, [])
    assert document["standing"] == ["dead", "chance"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/load.jsonl: there is no such file: give a folder that ms.LoadMonitor writes to"),
        (["."], "load.jsonl: there is no such file: give a folder that ms.LoadMonitor writes to, such as runs"),
        (["notes.txt"], "notes.txt: not a log of ms.LoadMonitor: give one, or the folder that it is in"),
        (["empty.jsonl"], "empty.jsonl: empty so far, nothing to show: look again when training has begun"),
        (["runs", "--lang", "fr"], "--lang 'fr' is unknown: use zh or en"),
        (["runs", "--every", "0"], "--every 0.0 is no time to wait: give seconds, such as 2"),
        (["runs", "--every", "nan"], "--every nan is no time to wait: give seconds, such as 2"),
        (["runs", "--every", "inf"], "--every inf is no time to wait: give seconds, such as 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "runs" / "load.jsonl", step(1))
    (tmp_path / "notes.txt").write_text("hello\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert run("watch", *arguments) == (2, "", f"moesaic: {message}\n")


EVIL = "\x1b[2J\u202e"


def test_no_control_character_of_a_log_reaches_the_terminal(run, tmp_path):
    header = HEADER | {
        "model": EVIL, "command": EVIL, "config": EVIL, "versions": {EVIL: EVIL}, "total_steps": EVIL, "after": EVIL,
        "layers": [layer | {"name": EVIL + str(place)} for place, layer in enumerate(HEADER["layers"])],
    }  # fmt: skip
    lines = [
        header,
        step(1),
        VERDICT | {"status": [EVIL, EVIL]},
        alert(1, True, EVIL, EVIL),
        alert(1, True, "dead", EVIL),
    ]
    path = tmp_path / "load.jsonl"
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    for arguments in ((), ("--lang", "zh"), ("--json",)):
        code, out, err = run("watch", path, *arguments)
        assert code == 1
        assert "\\x1b" in out or "\\u001b" in out
        assert not set(EVIL) & set(out + err) - set("[2J")


def rendered(log, **options) -> list[str]:
    from rich.console import Console

    console = Console(width=options.get("width", 100), color_system=None)
    with console.capture() as capture:
        console.print(frame(log, **options))
    return capture.get().splitlines()


def many_layers(path: Path, count: int, names: list[str] | None = None):
    names = names or [f"layers.{n}.mlp" for n in range(count)]
    layers = [{"name": name, "experts": 4, "config": "x", "bias": None} for name in names]
    columns = {name: [value[0]] * count for name, value in step(1).items() if isinstance(value, list)}
    columns |= {"max_vio": [float(n) for n in range(count)], "load": [[n, 4, 8, 2] for n in range(count)]}
    text = [HEADER | {"layers": layers}, *[step(n, **columns) for n in range(1, 31)]]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in text))
    return read_log(path)


def test_a_low_terminal_shows_the_layers_farthest_from_chance_and_says_how_many_it_does_not(tmp_path):
    log = many_layers(tmp_path / "load.jsonl", 40)
    lines = rendered(log, now=50.0, height=24)
    shown = [line.split()[0] for line in lines if line.strip().startswith("layers.")]
    assert shown == [f"layers.{n}" for n in range(30, 40)]
    assert any("+30 layers closer to chance" in line for line in lines)
    assert len(lines) <= 24
    assert sum(line.strip().startswith("layers.") for line in rendered(log, now=50.0)) == 41  # and the strip's title


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_narrow_terminal_shows_fewer_columns_and_cuts_none(tmp_path, lang):
    log = read_log(healthy(tmp_path, load=[[0, 4, 8, 2], [0] * 4]))
    given_up = ("-0.100 +0.100", "e0 0.00x", "▁▁▁", "e2 2.00x", ".10–.50", " 1  ")  # one after the other
    shown = []
    for width in range(32, 130):
        lines = rendered(log, now=50.0, width=width, lang=lang)
        assert "…" not in "".join(lines)
        row = next(line for line in lines if line.split()[:1] == ["a"])
        assert " 1.00 " in row
        shown.append(sum(column in row for column in given_up))
        assert all(column in row for column in given_up[len(given_up) - shown[-1] :])
    assert sorted(set(shown)) == list(range(7))
    assert shown == sorted(shown)
    for width in range(1, 32):
        assert rendered(log, now=50.0, width=width, lang=lang)  # whatever may be read of it


def test_layers_that_a_short_name_would_not_tell_apart_have_their_whole_one(tmp_path):
    log = many_layers(tmp_path / "load.jsonl", 2, ["encoder.block.1.mlp", "decoder.block.1.mlp"])
    log.add(alert(30, True, "dead", "encoder.block.1.mlp"))
    lines = rendered(log, now=50.0)
    assert [line.split()[0] for line in lines if ".block" in line and "▁" in line] == [
        "encoder.block.1.mlp",
        "decoder.block.1.mlp",
    ]
    assert any(line.startswith("decoder.block.1.mlp: experts over steps") for line in lines)
    assert "        30  on  encoder.block.1.mlp: dead experts" in lines


def test_a_layer_that_is_watched_by_itself_is_called_so_in_both_languages(tmp_path):
    log = many_layers(tmp_path / "load.jsonl", 1, [""])
    log.add(alert(30, True, "dead", ""))
    for lang, named, dead in (("en", "the layer", "the layer: dead"), ("zh", "该层", "该层: 有死专家")):
        lines = rendered(log, now=50.0, lang=lang)
        assert sum(named in line for line in lines) == 3, lines  # its row, the strip's title, the alert
        assert any(dead in line for line in lines)


def test_alerts_that_are_on_are_shown_before_newer_ones_and_the_rest_is_counted(tmp_path):
    log = many_layers(tmp_path / "load.jsonl", 1)
    for number in range(3):
        log.add(alert(10 * number, True, "collapsed", f"old.{number}"))
    for number in range(3, 9):
        log.add(alert(10 * number, True, "dead", "layers.0.mlp"))
        log.add(alert(10 * number + 5, False, "dead", "layers.0.mlp"))
    lines = rendered(log, now=50.0, height=40)
    place = lines.index("alerts")
    assert lines[place + 1 : place + 7] == [
        "         0  on  old.0: collapsed",
        "        10  on  old.1: collapsed",
        "        20  on  old.2: collapsed",
        "        80  on  layers.0: dead experts",
        "        85  over  layers.0: dead experts",
        "  and 10 more in the log",
    ]


@pytest.mark.parametrize(
    ("lines", "end", "said"),
    [
        ((19, 20), 20, "step 20 of 100 · 1.0 s a step · stopped before its end"),
        ((99, 100), 100, "step 100 of 100 · 1.0 s a step · finished"),
        ((80, 90), 100, "step 100 of 100 · 1.0 s a step · finished · last line at step 90"),
        ((), 100, "step 100 of 100 · finished"),
    ],
)
def test_a_run_is_finished_by_the_step_of_its_end_whatever_its_last_line(run, tmp_path, lines, end, said):
    path = written(tmp_path / "load.jsonl", *[step(n) for n in lines], END | {"step": end})
    assert rendered(read_log(path), now=145.0)[0] == f"M  {said}"
    document = json.loads(run("watch", path, "--json")[1])
    assert (document["step"], document["finished"], document["stopped"]) == (end, end == 100, end < 100)


def test_a_run_that_was_taken_up_again_has_not_ended(tmp_path):
    resumed = {"kind": "resume", "step": 20, "time": 31.0, "total_steps": 200}
    log = read_log(written(tmp_path / "load.jsonl", step(20), END, resumed))
    assert (log.end, log.done, log.total, log.finished) == (None, 20, 200, False)


@pytest.mark.parametrize(
    ("lang", "none", "told", "alert"),
    [
        ("en", "no data", "no data: no token was counted in the last steps", "the run: no token counted"),
        ("zh", "没有数据", "没有数据：最近几步一个 token 也没有数到", "整个训练: 没有数到 token"),
    ],
)
def test_a_verdict_is_not_shown_while_no_token_is_counted(run, tmp_path, lang, none, told, alert):
    empty = {name: [None, None] for name in step(1) if isinstance(step(1)[name], list)}
    stops = {"kind": "alert", "step": 23, "alert": "no_tokens", "layer": None, "begins": True, "message": "m"}
    path = healthy(tmp_path, *[step(n, **empty) for n in (21, 22, 23)], stops)
    code, out, err = run("watch", path, "--lang", lang)
    assert (code, err) == (2, "")
    assert f"\n{told}\n" in out
    assert f"      23  {'on' if lang == 'en' else '开始'}  {alert}\n" in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["a"])
    assert row.rstrip().endswith(none)
    with (path / "load.jsonl").open("a") as file:
        file.write(json.dumps(stops | {"step": 24, "begins": False}) + "\n")
    assert run("watch", path)[0] == 0


def test_a_strip_of_experts_over_steps_is_drawn_of_the_worst_layer_where_it_fits(tmp_path):
    log = many_layers(tmp_path / "load.jsonl", 1)
    lines = rendered(log, now=50.0)
    strip = [line for line in lines if line.endswith(" ▒█▒")]
    assert len(strip) == 8  # expert 0 has none, 1 is at 1.14 times its share, 2 at 2.3, 3 at 0.57
    assert strip[-1].split()[0] == "30"
    log.layers[0]["experts"] = 90
    assert not any("█" in line for line in rendered(log, now=50.0))


def test_age_speed_and_time_left_are_told(tmp_path):
    log = read_log(written(tmp_path / "load.jsonl", *[step(n, time=100.0 + 2 * n) for n in range(1, 21)]))
    title = rendered(log, now=145.0)[0]
    assert title == "M  step 20 of 100 · 2.0 s a step · 2 min 40 s left · last line 5.0 s ago"
    assert "silent for 16 min 40 s: stopped, killed or busy" in rendered(log, now=1140.0)[0]
    assert "left" not in rendered(log, now=1140.0)[0]


def test_a_night_between_two_lines_does_not_count_for_the_speed(tmp_path):
    times = [1.0, 2.0, 3.0, 50_000.0, 50_001.0, 50_002.0]
    log = read_log(written(tmp_path / "load.jsonl", *[step(n, time=t) for n, t in enumerate(times, 1)]))
    assert seconds_a_step(log) == 1.0
    assert outcome(log) == 2


def test_durations_and_curves_are_short():
    said = [duration(s) for s in (0.05, 5.04, 59.4, 200, 18420, 273600)]
    assert said == ["50 ms", "5.0 s", "59 s", "3 min 20 s", "5 h 07 min", "3 d 4 h"]
    assert curve([1.0, 2.0], 10) == "▁█"
    assert curve([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"
    assert curve([0.0, float("nan"), 1.0], 3) == "▁ █"


def test_a_running_job_is_followed_until_it_ends_or_ctrl_c(tmp_path):
    """On a terminal of its own, as a user has it."""
    pty = pytest.importorskip("pty")
    folder = healthy(tmp_path, time=time.time())
    for ending in ("end", "ctrl-c"):
        above, below = pty.openpty()
        command = [sys.executable, "-m", "moesaic", "watch", str(folder), "--every", "0.1"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(command, stdout=below, stderr=subprocess.STDOUT, env=environment) as process:
            os.close(below)
            shown = os.read(above, 100_000)
            while b"no alerts" not in shown:
                shown += os.read(above, 100_000)
            assert process.poll() is None
            if ending == "ctrl-c":
                process.send_signal(signal.SIGINT)
            else:
                with (folder / "load.jsonl").open("ab") as file:
                    file.write(json.dumps(END).encode() + b"\n")
            rest = b""
            try:
                while part := os.read(above, 100_000):
                    rest += part
            except OSError:  # Linux tells the end so
                pass
            assert process.wait(20) == 0
        os.close(above)
        assert b"Traceback" not in rest
        assert rest.rstrip().endswith(b"config abc")
        assert (b"stopped before its end" in rest) == (ending == "end")
        folder = healthy(tmp_path / "again", time=time.time())
