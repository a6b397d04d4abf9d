"""benchmarks/gpu.py without a GPU: its smoke run, what it refuses, and the arithmetic behind its numbers."""

import json
import math
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench_problems import problem_of

from moesaic.bench.campaign import Journal
from moesaic.bench.ceiling import Ceiling, least_seconds
from moesaic.bench.gate import is_right, truth_of
from moesaic.bench.gpu import campaign as campaign_room
from moesaic.bench.gpu import run as run_room
from moesaic.bench.gpu import special
from moesaic.bench.gpu.campaign import GpuCampaign, measured_in, open_journal
from moesaic.bench.gpu.cells import (
    ADDING,
    FORWARD,
    GROUPED,
    INVARIANT,
    LADDER,
    LADDER_TOKENS,
    LIGER,
    OURS,
    STEP,
    TITAN,
    GpuCell,
    cells,
    smoke_cells,
)
from moesaic.bench.gpu.clock import CudaClock
from moesaic.bench.gpu.contenders import CONTENDERS
from moesaic.bench.gpu.judge import DeviceLost, judge
from moesaic.bench.gpu.limits import kernels_of, matmul_flops
from moesaic.bench.gpu.report import KERNEL, _one_cell, verdicts
from moesaic.bench.gpu.run import Measured, disjoint_ids
from moesaic.bench.gpu.truth import BOUNDS, relative_error, rows_within
from moesaic.bench.problem import Problem
from moesaic.bench.runner import Row
from moesaic.bench.shapes import SHAPES
from moesaic.bench.timing import Clock
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--smoke") -> (exit code, stdout, stderr), in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ending.value.code or 0, *capsys.readouterr()

    return call


@no_gpu
def test_the_smoke_run_measures_every_kind_of_cell_and_goes_on_where_it_ended(run, tmp_path):
    code, out, err = run("--smoke", "--out", str(tmp_path), "--only", "decode")
    assert code == 0, err
    code, out, err = run("--smoke", "--out", str(tmp_path))
    assert code == 0, err
    assert out.count("decode nano") == 1, "measured in the first run, in the table of the second"
    report = json.loads((tmp_path / "report.json").read_text())
    results = [Measured.of(line) for line in report["cells"]]
    assert {result.cell for result in results} == set(smoke_cells())
    assert report["machine"]["commit"] or report["machine"]["sources"]
    for result in results:
        assert not result.note
        ours = [row for row in result.rows if row.kind == "ours"]
        assert not [row for row in ours if row.note], result.cell.key
    text = (tmp_path / "report.md").read_text()
    assert "Not measured on a GPU" in text
    assert "256 MB read" in text
    assert "Python and launching" not in text, "on a CPU a call is its computation"
    assert (
        "Reproduce: `python benchmarks/gpu.py --smoke --only decode`, then `python benchmarks/gpu.py --smoke`" in text
    )
    assert out.rstrip().endswith(f"everybody's numbers: {tmp_path / 'report.md'}")
    before = (tmp_path / "journal.jsonl").read_text()
    assert run("--smoke", "--out", str(tmp_path))[0] == 0
    assert before == (tmp_path / "journal.jsonl").read_text(), "nothing is measured twice"


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line(run, tmp_path):
    code, out, err = run("--out", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no CUDA device" in err


def test_a_journal_of_other_code_or_another_gpu_is_refused(tmp_path):
    machine = {"kind": "machine", "device": "H100", "versions": {}, "commit": "a", "sources": "b", "smoke": False}
    open_journal(tmp_path, machine)
    assert open_journal(tmp_path, {**machine, "date": "later"}).machine == machine
    with pytest.raises(ValueError, match="measured with sources=b, here it is c: give another --out"):
        open_journal(tmp_path, {**machine, "sources": "c"})


@pytest.mark.parametrize(
    ("kind", "rows", "bad"),
    [
        ("experts", [Row(OURS, "ours"), Row(TITAN, "peer", note="wrong")], False),
        ("experts", [Row(OURS, "ours", note="wrong")], True),
        ("experts", [Row(OURS, "ours"), Row(INVARIANT, "variant", note="failed: illegal access")], True),
        ("experts", [Row(OURS, "ours"), Row(GROUPED, "variant", note="failed: out of memory")], False),
        ("decode", [Row(f"{OURS} (graph)", "ours", note="no graph: not permitted")], True),
    ],
)
def test_it_ends_in_1_where_ours_is_wrong_in_any_way(tmp_path, kind, rows, bad):
    machine = {"kind": "machine", "device": "H100", "versions": {}, "commit": "a", "sources": "b", "smoke": False}
    journal = open_journal(tmp_path, machine)
    journal.add(Measured(GpuCell(kind, "nano", 2), rows).to_dict())
    assert runpy.run_path(str(SCRIPT))["any_wrong"](journal) == bad


SOME = (GpuCell("experts", "nano", 2), GpuCell("experts", "nano", 3))


def campaign_of(journal: Journal, **options) -> GpuCampaign:
    return GpuCampaign(journal, Clock(), 600.0, rounds=1, **options)


def test_a_cell_that_raises_is_a_row_and_one_that_ended_the_run_twice_is_left_alone(monkeypatch):
    def fail(_self, cell):
        raise torch.OutOfMemoryError(f"no room for T={cell.tokens}\nand more")

    monkeypatch.setattr(GpuCampaign, "_run", fail)
    journal = Journal(lines=[{"kind": "begin", "key": SOME[1].key}] * 2)
    assert campaign_of(journal).run(SOME) == []
    notes = [result.note for result in measured_in(journal)]
    assert notes == ["failed: OutOfMemoryError: no room for T=2", "ended the run 2 times without a result"]


def test_a_lost_device_ends_the_run_with_its_cell_in_the_journal(monkeypatch):
    def lose(_clock):
        raise DeviceLost("an illegal memory access was encountered")

    monkeypatch.setattr(GpuCampaign, "_run", lambda _self, cell: Measured(cell, note="failed: illegal access"))
    monkeypatch.setattr(campaign_room, "check_device", lose)
    journal = Journal()
    with pytest.raises(DeviceLost, match="illegal"):
        campaign_of(journal).run(SOME)
    assert [result.cell for result in measured_in(journal)] == [SOME[0]]


class Losing(Clock):
    """Of a device that is lost when somebody says so."""

    lost = False

    def wait(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered\nand more")

    def after(self, calls: int, name: str = OURS):
        """A contender of this name whose calls from so many on lose the device; what they raise names nobody."""
        right, seen = CONTENDERS[GROUPED], []

        def build(problem):
            call = right.build(problem)

            def run(*args):
                seen.append(args)
                self.lost = len(seen) > calls
                return call(*args)

            return run

        return right.__class__(name, "ours", build)


@pytest.mark.parametrize("calls", [0, 3])  # judged, and before the first round that is timed
def test_a_lost_device_has_a_name_and_leaves_the_rows_of_the_others(monkeypatch, tmp_path, calls):
    clock, journal = Losing(), open_journal(tmp_path, dict.fromkeys(("kind", "device"), "machine"))
    monkeypatch.setitem(CONTENDERS, OURS, clock.after(calls))
    with pytest.raises(DeviceLost, match=f"{OURS}: an illegal memory access was encountered$"):
        GpuCampaign(journal, clock, 600.0).run([GpuCell("experts", "nano", 5, "float32", who=(OURS, TITAN))])
    (result,) = measured_in(journal)
    ours, theirs = result.row(OURS), result.row(TITAN)
    assert ours.note.startswith("failed: RuntimeError: an illegal memory access")
    assert (theirs.note, theirs.errors["out"] < 1e-5) == ("", True)
    assert result.note.startswith(f"failed: DeviceLost: {OURS}")
    assert ours.note in _one_cell(result)
    assert runpy.run_path(str(SCRIPT))["any_wrong"](journal)


def test_who_fails_before_the_rounds_is_the_only_one_without_seconds():
    problem = problem_of("tiny", tokens=6)
    result = Measured(GpuCell("experts", "tiny", 6), [Row(name, "ours") for name in "ab"])
    entrants = [run_room._entrant(problem, name, {name: CONTENDERS[GROUPED].build(problem)}) for name in "ab"]
    bench = run_room.Bench(Clock(), {}, None)
    seconds = run_room.timed(
        result, [entrants[0]._replace(run=lambda: 1 / 0), entrants[1]], {"a": 1.0, "b": 1.0}, bench
    )
    assert seconds.keys() == {"b"}
    assert [row.note for row in result.rows] == ["failed: ZeroDivisionError: division by zero", ""]


class OddReplays(Clock):
    """Of a graph whose second call gives what the first gave."""

    def replay(self, calls):
        return super().replay([calls[0], calls[0], *calls[2:]])


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (GpuCell("decode", "nano", 1, "float32", who=(OURS, TITAN)), f"{OURS} (graph)"),
        (GpuCell("router", "deepseek-v3", 2, "float32", who=()), KERNEL),
    ],
    ids=["decode", "router"],
)
@no_gpu
def test_a_graph_that_gives_other_numbers_has_no_speed(cell, name):
    campaign = GpuCampaign(Journal(), OddReplays(), 600.0, rounds=1)
    assert campaign.run([cell]) == []
    (result,) = measured_in(campaign.journal)
    notes = {row.name: row.note for row in result.rows if row.note}
    assert notes == {name: "failed: ValueError: replayed, it gives other numbers"}
    assert result.row(name).median_ms is None


HANGS = """
import json, sys, time
from pathlib import Path
from moesaic.bench.campaign import Journal
from moesaic.bench.gpu import campaign
from moesaic.bench.gpu.cells import GpuCell
from moesaic.bench.timing import Clock

class Gpu(Clock):
    is_cuda = True

campaign.STUCK_SECONDS = 0.3
campaign.GpuCampaign._run = lambda self, cell: time.sleep(60)
campaign.GpuCampaign(Journal(Path(sys.argv[1])), Gpu(), 600.0).run([GpuCell("experts", "nano", 2)])
"""


def test_a_cell_without_an_end_ends_the_process_and_says_where(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path / "journal.jsonl"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert run.returncode == 1
    assert "Timeout" in run.stderr
    assert "in _measure" in run.stderr
    assert [json.loads(line)["kind"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()] == ["begin"]


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_a_row_of_the_journal(monkeypatch, tmp_path, error):
    """A missing gradient, or 16 bits that were too few: JSON has neither."""

    def measure(_self, cell):
        return Measured(cell, [Row(OURS, "ours", note="wrong", errors={"out": error, "up": 1e-6}), Row(TITAN, "peer")])

    monkeypatch.setattr(GpuCampaign, "_run", measure)
    assert campaign_of(Journal(tmp_path / "journal.jsonl")).run(SOME) == []
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    found = measured_in(Journal(lines=lines))
    assert [result.cell for result in found] == list(SOME)
    assert found[0].row(OURS).errors == {"out": math.inf, "up": 1e-6}


def test_gradients_are_added_to_in_cells_that_say_so():
    for mode, times in ((STEP, 1), (ADDING, 3)):
        problem = problem_of("tiny", mode=mode)
        call = CONTENDERS["ours: grouped"].build(problem)
        entrant = run_room._entrant(problem, "ours", {"ours": call})
        entrant.prepare()
        entrant.run()
        once = problem.experts.up.grad.clone()
        for _ in range(2):
            entrant.prepare()
            entrant.run()
        torch.testing.assert_close(problem.experts.up.grad, times * once)


def test_a_gradient_that_is_added_to_is_read_as_well():
    fresh, adding = (sum(phase.bytes for _, phase in kernels_of(ladder_problem(mode))) for mode in (STEP, ADDING))
    assert adding - fresh == 2 * 128 * 3 * 2048 * 768


def test_gradients_that_are_added_to_are_judged_as_such():
    problem = problem_of("tiny", tokens=6, mode=ADDING)
    right = CONTENDERS["ours: grouped"]

    def fresh(problem):
        call = right.build(problem)

        def run(*args):
            problem.experts.up.grad = None
            return call(*args)

        return run

    contenders = [right, CONTENDERS[TITAN], right.__class__("fresh", "ours", fresh)]
    judged = judge(problem, truth_of(problem), contenders, Clock())
    assert [entry.row.note for entry in judged] == ["", "", "wrong"]


def test_no_cell_is_begun_when_the_time_is_up():
    campaign = campaign_of(Journal())
    campaign.seconds = 1.0
    assert campaign.run(SOME) == list(SOME)
    assert campaign.journal.lines == []


def test_cells_are_told_apart_and_the_ladder_comes_first_after_a_small_one_that_shows_what_fails():
    found, without = list(cells(liger=True)), list(cells(liger=False))
    assert without == [cell for cell in found if LIGER not in cell.who]
    assert len({cell.key for cell in found}) == len(found)
    assert [(c.shape, c.tokens, c.mode) for c in found[:2]] == [(LADDER, 128, STEP), (LADDER, LADDER_TOKENS, FORWARD)]
    assert {name for cell in found for name in cell.who} <= CONTENDERS.keys() | {special.COMPILED_RULES}
    assert {cell.who for cell in found if LIGER in cell.who} == {(OURS, TITAN, LIGER)}
    assert {cell.shape for cell in found} >= {name for name in SHAPES if name.startswith("sonic-")}
    assert GpuCell.of(json.loads(json.dumps(found[0].__dict__))) == found[0]


def ladder_problem(mode: str) -> Problem:
    """Without memory for weights."""
    shape = SHAPES[LADDER]
    d, i, n, k = shape.hidden_size, shape.width, shape.n_experts, shape.k
    cell = GpuCell("experts", LADDER, LADDER_TOKENS, mode=mode).problem_cell
    ids = torch.arange(LADDER_TOKENS * k).view(LADDER_TOKENS, k) % n

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    tokens = empty(LADDER_TOKENS, d)
    experts = ExpertWeights(empty(n, 2 * i, d), empty(n, d, i))
    return Problem(cell, shape.config(), ExpertSpec(), experts, tokens, ids, empty(LADDER_TOKENS, k), tokens)


def test_the_least_time_of_the_ladder_shape_is_the_published_ceiling():
    problem = ladder_problem(FORWARD)
    seconds = least_seconds([phase for _, phase in kernels_of(problem)], Ceiling(700e12, 3.35e12))
    assert seconds == pytest.approx(3.94e-3, rel=0.02)
    assert matmul_flops(problem) == 6 * LADDER_TOKENS * 8 * 2048 * 768
    assert matmul_flops(ladder_problem(STEP)) == 3 * matmul_flops(problem)


def test_rows_are_as_many_as_the_work_allows():
    problem = problem_of("tiny", tokens=200)
    assert len(rows_within(problem, 1e12)) == 200
    assert len(rows_within(problem, 0.0)) == 64


def test_errors_are_judged_by_a_bound_or_by_torch():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert is_right({"out": 0.009}, {}, BOUNDS["bfloat16"])
    assert not is_right({"out": 0.011}, {}, BOUNDS["bfloat16"])
    assert is_right({"out": 0.011}, {"out": 0.008}, BOUNDS["bfloat16"])
    assert not is_right({"out": float("nan")}, {"out": 1.0}, BOUNDS["bfloat16"])


@pytest.mark.parametrize("shape", [(32768, 64), (4, 8192, 64), (32768,)], ids=str)
def test_one_wrong_row_of_many_is_seen(shape):
    truth = torch.randn(shape, dtype=torch.float64)
    found = truth + 3e-3 * torch.randn_like(truth)  # a good one in 16 bits
    assert is_right({"out": relative_error(found, truth)}, {}, BOUNDS["bfloat16"])
    found.view(-1, *shape[1:][-1:])[123] *= -1
    assert not is_right({"out": relative_error(found, truth)}, {}, BOUNDS["bfloat16"])


def test_the_wrong_and_the_failing_have_no_speed():
    problem = problem_of("tiny", tokens=6)
    truth = truth_of(problem)
    right = CONTENDERS["ours: grouped"]

    def doubled(problem):
        call = right.build(problem)
        return lambda *args: 2 * call(*args)

    def half_written(problem):
        call = right.build(problem)

        def run(*args):
            out = call(*args)
            return torch.cat([out[:3], torch.empty_like(out[3:])])

        return run

    def broken(_problem):
        raise RuntimeError("no such kernel")

    def kind(build):
        return right.__class__(build.__name__, "ours", build)

    judged = judge(problem, truth, [right, *map(kind, (doubled, half_written, broken))], Clock())
    notes = [entry.row.note for entry in judged]
    assert notes[:2] == ["", "wrong"]
    assert notes[2] == "failed: ValueError: an element of the result is never written"
    assert notes[3] == "failed: RuntimeError: no such kernel"
    assert [entry.call is None for entry in judged] == [False, True, True, True]


def test_calls_in_a_graph_share_no_expert_while_there_are_enough():
    problem = problem_of("tiny", tokens=1)  # 16 experts, 4 a token
    ids = disjoint_ids(problem, 6)
    assert len(ids) == 6
    assert torch.cat(ids[:4]).unique().numel() == 16
    many = disjoint_ids(problem_of("tiny", tokens=9), 3)
    assert [len(set(row)) for call in many for row in call.tolist()] == [4] * 27


def test_memory_of_the_parts_is_what_the_design_says():
    problem = ladder_problem(STEP)
    assignments = LADDER_TOKENS * 8
    expected = {"X": 2 * LADDER_TOKENS * 2048, "H": 2 * assignments * 1536, "A": 2 * assignments * 768}
    found = run_room._expected_bytes(problem)
    assert {name: found[name] for name in expected} == expected
    assert (found["Y"], found["metadata"]) == (2 * assignments * 2048, 16 * assignments)


def test_targets_are_met_missed_or_not_measured():
    def row(name, kind, ms, **fields):
        return Row(name, kind, median_ms=ms, **fields)

    ladder = Measured(GpuCell("experts", LADDER, LADDER_TOKENS))
    ladder.rows = [
        row(OURS, "ours", 5.0, gflops=400e3, errors={"out": 4e-3}),
        row(TITAN, "peer", 10.0, errors={"out": 4e-3}),
    ]
    memory = Measured(GpuCell("memory", LADDER, LADDER_TOKENS, mode=STEP))
    memory.facts = {"X": 10, "H": 80, "A": 40, "Y": 100, "metadata": 10}
    memory.facts[OURS] = {"held": 105, "forward_peak": 200, "backward_peak": 300}
    router = Measured(GpuCell("router", "deepseek-v3", 1, "float32"), [row(KERNEL, "ours", 6e-3)])
    words = {verdict.what: verdict.word for verdict in verdicts([ladder, memory, router])}
    assert words["forward TF/s, Liger main"] == "met"
    assert words["forward TF/s, goal"] == "missed"
    assert words["forward+backward TF/s"] == "not measured"
    assert words["route kernel T=1, us"] == "met"
    assert words["held for backward / (X + H + metadata)"] == "met"
    assert words["peak / (X + H + A + Y)"] == "missed"
    assert words["least speed over torch's grouped_mm"] == "met"


def test_a_decode_cell_says_what_python_takes_of_a_call():
    ticks, waits = [], []

    class Counting(CudaClock):
        def __init__(self):
            pass

        def wait(self):
            waits.append(len(ticks))

    seconds = Counting().host_seconds([lambda: ticks.append(time.sleep(2e-3))] * 3, rounds=3)
    assert 2e-3 <= seconds < 0.1
    assert waits == [0, 3, 6, 9]
    decode = Measured(GpuCell("decode", LADDER, 1), [Row(OURS, "ours", median_ms=0.03)], {"host_us": {OURS: 90.4}})
    assert f"Python and launching, us a call: {OURS} 90" in _one_cell(decode)


@pytest.mark.parametrize(
    ("ours", "peer", "word"),
    [
        ((10.0, 3.0), (9.0, None), "met"),
        ((10.0, 3.0), (9.0, 2.0), "missed"),
        ((10.0, None), (9.0, None), "missed"),
        ((4.0, None), (9.0, 5.0), "met"),
    ],
)
def test_a_decode_cell_is_judged_by_the_faster_way_of_each(ours, peer, word):
    """Medians launched one by one and in a graph, None where there is no graph."""
    decode = Measured(GpuCell("decode", LADDER, 1))
    for name, kind, (eager, graph) in ((OURS, "ours", ours), (TITAN, "peer", peer)):
        decode.rows += [Row(name, kind, median_ms=eager), Row(f"{name} (graph)", kind, median_ms=graph)]
    words = {verdict.what: verdict.word for verdict in verdicts([decode])}
    assert words["least speed over torch's grouped_mm"] == word
