"""`moesaic bench tune`: the search with a made-up clock, and the file of tiles that the engine reads."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moesaic.bench import tune as room
from moesaic.bench.gpu import clock as clock_room
from moesaic.bench.gpu.judge import DeviceLost
from moesaic.bench.tune import WALKERS, Tuning, as_file, neighbours, read_before
from moesaic.cli import main
from moesaic.cli.bench import _tune
from moesaic.engine.triton import blocks as table
from moesaic.engine.triton.blocks import Blocks, Tiles, built_in, tiles_for
from moesaic.engine.triton.tuned import parse_tuned, read_tuned, tuned_path

GPU = "NVIDIA H100 80GB HBM3"
HOPPER = (9, 0)
OTHER = Tiles(Blocks(32, 64, 64), Blocks(32, 128, 64, 8), Blocks(32, 64, 32), Blocks(64, 128, 32, 8, 4, 8))

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def on_a_gpu(monkeypatch, home):  # noqa: ARG001
    """As if a GPU had begun to compute. Yields where its file of tiles is looked for."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device.index)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: GPU)
    monkeypatch.setattr(table, "capability_of", lambda _device: HOPPER)
    table._tuned.cache_clear()
    path = tuned_path(GPU)
    path.parent.mkdir(parents=True)
    yield path
    table._tuned.cache_clear()


def file_of(tiles: Tiles = OTHER, device: str = GPU) -> dict:
    return as_file(device, Tuning("nano", "bfloat16", lambda *_: 1.0), {16: tiles})


def searched(seconds_of, monkeypatch, **options) -> tuple[Tuning, dict]:
    """Few candidates, as the interpreter takes its time: more columns, less depth, twice the rows."""
    monkeypatch.setattr(room, "MOVES", 1)
    monkeypatch.setattr(room, "LARGEST", {**room.LARGEST, "rows": 32, "warps": 4, "stages": 3, "group": 1})
    monkeypatch.setattr(room, "LEAST", {**room.LEAST, "columns": 64, "depth": 16, "stages": 3})
    timer = lambda op, blocks, run: (run(), seconds_of(op, blocks))[1]  # noqa: E731
    tuning = Tuning("nano", "float32", timer, device="cpu", **options)
    return tuning, tuning.run((16,))


@no_gpu
def test_the_fastest_tiles_are_found_and_ops_that_walk_over_rows_agree(monkeypatch):
    own = built_in(8, torch.float32, HOPPER)

    def seconds_of(op, blocks):
        return 1.0 / blocks.columns + (0.5 if blocks.rows == own.up.rows and op == "up" else 0.0)

    tuning, found = searched(seconds_of, monkeypatch)
    tiles = found[16]
    assert tiles.up.rows == tiles.matmul.rows == tiles.d_hidden.rows == 2 * own.up.rows
    assert {op: getattr(tiles, op).columns for op in WALKERS} == {"up": 64, "matmul": 128, "d_hidden": 128}
    assert tiles.outer == own.outer._replace(columns=2 * own.outer.columns)
    assert not [trial.note for trial in tuning.trials if trial.note]
    assert tuning.gain(16, tiles) > 1


@no_gpu
def test_what_is_hardly_faster_wrong_or_failing_is_not_taken(monkeypatch):
    own = built_in(8, torch.float32, HOPPER)
    real = room.Work.run

    def run(work, op, blocks):
        if blocks.columns > getattr(own, op).columns:
            raise RuntimeError("out of resource: shared memory")
        found = real(work, op, blocks)
        return [2 * tensor for tensor in found] if blocks.depth < getattr(own, op).depth else found

    monkeypatch.setattr(room.Work, "run", run)

    def seconds_of(op, blocks):
        return 1.0 if blocks == getattr(own, op) else 0.99

    tuning, found = searched(seconds_of, monkeypatch)
    assert found[16] == own
    notes = {trial.note.partition(":")[0] for trial in tuning.trials}
    assert notes == {"", "RuntimeError", "wrong"}
    assert tuning.gain(16, own) == 1


def test_a_candidate_that_writes_one_row_wrong_is_seen(monkeypatch):
    right = torch.randn(32768, 64)
    wrong = right.clone()
    wrong[-1] = torch.randn(64)
    given = iter([[right, right], [right, right], [right, wrong]])  # what is expected first
    monkeypatch.setattr(room.Work, "__init__", lambda work: setattr(work, "_expected", {}))
    monkeypatch.setattr(room.Work, "_own", OTHER, raising=False)
    monkeypatch.setattr(room.Work, "run", lambda *_: next(given))
    work = room.Work()
    assert work.error("up", OTHER.up) == 0
    assert work.error("up", OTHER.up) > room.BOUNDS["bfloat16"]


@no_gpu
def test_a_lost_device_ends_the_search(monkeypatch):
    def fail(_op, _blocks):
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise DeviceLost("an illegal memory access was encountered")

    with pytest.raises(DeviceLost):
        searched(fail, monkeypatch, check=lost)


def test_a_run_that_is_cut_keeps_the_rows_that_it_has_found(monkeypatch, tmp_path):
    def tiles(_tuning, most, *_):
        if most == 80:
            raise DeviceLost("an illegal memory access was encountered")
        return OTHER

    for owner, name in ((room, "make_experts"), (room, "Work"), (Tuning, "_problem")):
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(Tuning, "_tiles", tiles)
    monkeypatch.setattr(clock_room, "CudaClock", clock_room.Clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)
    with pytest.raises(
        ValueError, match=r"lost \(an illegal .* is kept in .*tiles.json; run again for another --dtype"
    ):
        _tune("nano", ("bfloat16",), 60.0, tmp_path / "tiles.json")
    assert parse_tuned(read_before(tmp_path / "tiles.json"), GPU) == {"bfloat16": {16: OTHER, 24: OTHER}}


@no_gpu
def test_when_the_time_is_up_the_tables_own_tiles_stay(monkeypatch):
    tuning, found = searched(lambda *_: 1.0, monkeypatch, seconds=0.0)
    assert found[16] == built_in(8, torch.float32, HOPPER)
    assert tuning.trials == []


@pytest.mark.parametrize("op", room.OPS)
def test_neighbours_differ_in_one_number_or_are_half_as_large_and_walkers_keep_their_rows(op):
    blocks = Blocks(64, 128, 64, 8, 4, 8)
    half, *others = neighbours(blocks, op)
    assert half == Blocks(64, 64, 64, 4, 3, 8)
    for other in others:
        assert sum(a != b for a, b in zip(blocks, other, strict=True)) == 1
        assert op == "outer" or other.rows == blocks.rows
    assert all(other.warps >= 4 for other in neighbours(half, op))


def test_the_engine_takes_what_the_file_has_and_the_table_for_the_rest(on_a_gpu):
    on_a_gpu.write_text(json.dumps(file_of()))
    assert tiles_for(8, torch.bfloat16, HOPPER) == OTHER
    assert tiles_for(32, torch.bfloat16, HOPPER) == built_in(32, torch.bfloat16, HOPPER)
    assert tiles_for(8, torch.float16, HOPPER) == built_in(8, torch.float16, HOPPER)
    assert tiles_for(8, torch.bfloat16, (8, 0)) == built_in(8, torch.bfloat16, (8, 0)), "asked for another GPU"
    on_a_gpu.unlink()
    assert tiles_for(8, torch.bfloat16, HOPPER) == OTHER, "read once"


def test_before_a_gpu_computes_no_file_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(table, "_tuned", lambda _device: pytest.fail("read"))
    assert tiles_for(8, torch.bfloat16, HOPPER) == built_in(8, torch.bfloat16, HOPPER)


def changed(**fields) -> str:
    return json.dumps({**file_of(), **fields})


UNEQUAL = {"bfloat16": {"16": {op: [16 if op == "up" else 32, 64, 64, 4, 3, 1] for op in room.OPS}}}
ODD = {"bfloat16": {"16": {op: [48, 64, 64, 4, 3, 1] for op in room.OPS}}}
REFUSED = {
    "no json": ("{", "Expecting property name"),
    "a list": ("[]", "list indices"),
    "another format": (changed(format="tiles 0"), "its format is 'tiles 0'"),
    "another GPU": (changed(device="NVIDIA A100"), "it was made on NVIDIA A100, this is NVIDIA H100"),
    "another Triton": (changed(versions={"triton": "2.0"}), "it was made with triton 2.0, here is"),
    "unequal rows": (changed(tiles=UNEQUAL), "they share one layout"),
    "odd tiles": (changed(tiles=ODD), "powers of two from 16"),
    "ops missing": (changed(tiles={"bfloat16": {"16": {"up": [16, 64, 64]}}}), "missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_or_foreign_file_is_one_warning_and_the_table_serves(case, on_a_gpu):
    text, reason = REFUSED[case]
    on_a_gpu.write_text(text)
    with pytest.warns(UserWarning, match="not used") as warned:
        assert tiles_for(8, torch.bfloat16, HOPPER) == built_in(8, torch.bfloat16, HOPPER)
    assert len(warned) == 1
    assert str(on_a_gpu) in str(warned[0].message)
    assert reason in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles_for(8, torch.bfloat16, HOPPER)


def test_a_second_run_keeps_what_the_first_found_for_other_rows(home):
    first = file_of()
    second = as_file(GPU, Tuning("nano", "bfloat16", lambda *_: 1.0), {24: OTHER}, first)
    assert parse_tuned(second, GPU) == {"bfloat16": {16: OTHER, 24: OTHER}}
    foreign = as_file(GPU, Tuning("nano", "float16", lambda *_: 1.0), {0: OTHER}, file_of(device="NVIDIA A100"))
    assert parse_tuned(foreign, GPU) == {"float16": {0: OTHER}}
    assert read_before(home / "none.json") is None
    assert read_tuned(GPU) == {}


@no_gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CUDA device here"),
        (["--shape", "qwen3-30b,olmoe"], "--shape qwen3-30b,olmoe: give one of"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown"),
    ],
)
def test_without_a_gpu_or_with_a_mistake_it_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moesaic", "bench", "tune", *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    out, err = capsys.readouterr()
    assert (ending.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_options_of_bench_before_tune_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moesaic", "bench", "--rounds", "3", "tune"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--rounds is none of tune's options" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["gpt-oss-20b", "qwen3-30b"])
def test_a_search_on_sm_100_begins_from_the_tiles_that_the_engine_takes(shape):
    tuning = Tuning(shape, "bfloat16", lambda *_: 1.0, capability=(10, 0))
    assert max(tuning._own(most).up.columns for most in room.ROWS) == 64, "gate and up are 128 columns of one matmul"
