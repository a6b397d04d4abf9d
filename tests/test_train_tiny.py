"""A training run is reproducible, can be resumed, and refuses what is wrong before it starts."""

import json
import math
import os
import re
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from cases import v3
from commands import runner
from safetensors.torch import load_file

import moesaic as ms
import moesaic.train.data
from moesaic.train import evaluate, keeping
from moesaic.train.checkpoints import Checkpoints, last_checkpoint
from moesaic.train.data import Document
from moesaic.train.evaluate import DomainResult, HeldOut, Report
from moesaic.train.monitor.run_log import read_log
from moesaic.train.muon import Muon, orthogonal
from moesaic.train.training import Recipe, train

SHORT = Recipe(steps=3, warmup_steps=1, evaluate_every=1, held_out_windows=1)


@pytest.fixture(scope="module")
def small_corpus():
    """The first documents of every domain, cut short: seconds instead of minutes."""
    whole = moesaic.train.data._documents

    def cut(domain, split):
        return tuple(Document(title, text[:800]) for title, text in whole(domain, split)[:12])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moesaic.train.data, "_documents", cut)
        yield


@pytest.fixture(scope="module")
def short_run(small_corpus, tmp_path_factory):  # noqa: ARG001 (set up before)
    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, train(folder, seed=3, recipe=SHORT)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_short_run_writes_a_plain_folder_its_record_and_the_best_weights(short_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, report = short_run
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "load.jsonl", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    }  # fmt: skip
    record = json.loads((folder / "training.json").read_text("utf-8"))
    assert record["finished"]
    assert record["seed"] == 3
    assert [line["step"] for line in record["history"]] == [1, 2, 3]
    assert record["best_step"] == max(record["history"], key=lambda line: line["worst_margin"])["step"]
    assert record["held_out"]["python"]["loss"] == report.domains["python"].loss
    held_out = HeldOut(AutoTokenizer.from_pretrained(folder))
    assert held_out.judge(AutoModelForCausalLM.from_pretrained(folder)) == report


def test_the_same_seed_gives_the_same_weights_and_nothing_is_printed(short_run, tmp_path, capfd):
    folder, report = short_run
    assert train(tmp_path / "again", seed=3, recipe=SHORT) == report
    assert capfd.readouterr() == ("", "")
    first, second = weights(folder), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_run_goes_on_to_the_same_weights(short_run, tmp_path, monkeypatch):
    from moesaic.train.keeping import KeepBest

    go_on = KeepBest.on_step_end

    def stop_at_step_3(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return go_on(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "on_step_end", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", seed=3, recipe=SHORT)
    with pytest.raises(ValueError, match="use --resume to continue"):
        train(tmp_path / "cut", recipe=SHORT)
    cut_short = tmp_path / "cut" / "checkpoint-2" / "optimizer.pt"
    cut_short.write_bytes(cut_short.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"optimizer.pt has 1000 bytes where \d+ were written: .* from checkpoint-1"):
        train(resume=tmp_path / "cut")
    shutil.rmtree(cut_short.parent)
    assert train(resume=tmp_path / "cut") == short_run[1]

    whole, resumed = weights(short_run[0]), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    history = [
        json.loads((folder / "training.json").read_text())["history"] for folder in (short_run[0], tmp_path / "cut")
    ]
    assert history[0] == history[1]
    (tmp_path / "cut" / "checkpoint-3").mkdir()  # of a kill while they were removed
    with pytest.raises(ValueError, match="has finished after 3 steps"):
        train(resume=tmp_path / "cut")
    assert not (tmp_path / "cut" / "checkpoint-3").exists()


@pytest.mark.usefixtures("small_corpus")
def test_ctrl_c_saves_the_step_that_runs_and_loses_nothing(tmp_path, monkeypatch):
    from moesaic.train.keeping import KeepBest

    begin = KeepBest.on_step_end

    def interrupt_in_step_2(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return begin(self, args, state, control, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    rarely = replace(SHORT, evaluate_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "on_step_end", interrupt_in_step_2)
        with pytest.raises(KeyboardInterrupt, match="after step 2"):
            train(tmp_path / "cut", seed=3, recipe=rarely)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    assert train(resume=tmp_path / "cut") == train(tmp_path / "whole", seed=3, recipe=rarely)


@pytest.mark.usefixtures("small_corpus")
def test_ctrl_c_before_the_first_step_or_twice_leaves_a_run_that_can_be_resumed(tmp_path, monkeypatch, capsys):
    import moesaic.train.training as training
    from moesaic.cli.train import train as command
    from moesaic.train.keeping import KeepBest

    def twice(self, args, state, control, **kwargs):  # noqa: ARG001
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "Recipe", lambda **_: SHORT)
    run = runner(monkeypatch, capsys, train=command)
    for place, (holder, name, patch) in enumerate(
        [(training, "train_tokenizer", lambda: os.kill(os.getpid(), signal.SIGINT)), (KeepBest, "on_step_end", twice)]
    ):
        folder = tmp_path / str(place)
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, patch)
            code, _, err = run("train", "tiny", "--out", folder)
        assert code == 130
        assert place == 0 or re.search(r"training +0/3 0:00:\d\d -:--:--", err), "done, time gone, time left"
        assert err.splitlines()[-1] == f"interrupted: go on with moesaic train tiny --resume {folder}"
    monkeypatch.undo()
    assert train(resume=tmp_path / "0") == train(resume=tmp_path / "1")


def test_the_bar_shows_the_time_left_as_soon_as_the_number_of_steps_is_known(capsys):
    bar = keeping.ProgressBar(disable=False)
    with bar.shown:
        bar.shown.refresh()  # while the tokenizer is trained
        bar.on_train_begin(None, SimpleNamespace(max_steps=3, global_step=0), None)
    assert "0/3 0:00:00 -:--:--" in capsys.readouterr().err.splitlines()[-1], "done, time gone, time left"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_its_log_again(short_run, tmp_path):
    folder, (whole, report) = tmp_path / "run", short_run
    folder.mkdir()
    record = json.loads((whole / "training.json").read_text())
    begun = {name: record[name] for name in ("size", "seed", "recipe")} | {"finished": False, "history": []}
    (folder / "training.json").write_text(json.dumps(begun))
    shutil.copy(whole / "load.jsonl", folder)
    assert train(resume=folder) == report
    log = read_log(folder)
    assert ([line["step"] for line in log.steps], log.resumed, log.finished) == ([3], None, True)
    assert log.steps[0]["load"] == read_log(whole).steps[0]["load"]


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize(
    ("most", "reason"),
    [
        (1_000, "File too large"),  # bytes that a file may have: the tokenizer does not fit
        (9_000_000, "File too large"),  # the weights of a checkpoint do not, which safetensors writes
        (14_000_000, r"disk full\?"),  # nor the optimizer, which torch writes
    ],
)
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_when_there_is_room(most, reason, short_run, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(ValueError, match=rf"run cannot be written \(.*{reason}.*\): make room .* resume"):
            train(tmp_path / "run", seed=3, recipe=SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert train(resume=tmp_path / "run") == short_run[1]


def test_a_checkpoint_that_was_cut_short_is_named_and_the_one_before_it_loads(tmp_path):
    for step in (100, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345678")
        Checkpoints(tmp_path).on_save(None, SimpleNamespace(global_step=step), None)
    (tmp_path / "checkpoint-300").mkdir()  # half written: it never was whole
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-200"
    assert not (tmp_path / "checkpoint-300").exists()
    (tmp_path / "checkpoint-200" / "optimizer.pt").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"optimizer.pt has 3 bytes where 8 were .* from checkpoint-100"):
        last_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-200")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_outside_of_the_main_thread_ctrl_c_is_left_to_others(tmp_path):
    def inside():
        with Checkpoints(tmp_path).saving_on_interrupt():
            return signal.getsignal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is before
    assert inside() is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_not_a_run_is_refused_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume=.*nowhere does not exist"):
        train(resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"resume=.* is not a run of `moesaic train` \(no readable training.json\)"):
        train(resume=tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match="is not a run of"):
        train(resume=tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 0, "recipe": {"pages": 3}, "history": []}')
    with pytest.raises(ValueError, match="is not a run of"):
        train(resume=tmp_path)
    with pytest.raises(ValueError, match="out=None: name a new folder"):
        train()
    record = {"size": "small", "seed": 0, "recipe": asdict(SHORT), "history": []}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is a run of size small, not tiny: give its own size"):
        train(resume=tmp_path, size="tiny")
    (tmp_path / "training.json.part").mkdir()  # what cannot be written is refused before training, too
    with pytest.raises(ValueError, match=r"cannot be written \(Is a directory\): make room or give the right to write"):
        train(resume=tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loss_alpha": None}, "its recipe lacks loss_alpha: go on with the moesaic that began it"),
        ({"pages": 3}, "its recipe has 'pages', not known here: go on"),
        ({"steps": None, "seed": None, "a\x1b": 1}, r"lacks steps and has 'a\\x1b', not known here: "),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_another_version_is_told_what_its_recipe_lacks_or_has(tmp_path, change, told, finished):
    recipe = {name: value for name, value in (asdict(SHORT) | change).items() if value is not None}
    record = {"size": "tiny", "seed": 0, "recipe": recipe, "history": [], "finished": finished}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"resume=.* is a run of another version: .*{told}"):
        train(resume=tmp_path)


def test_an_out_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out=.*file is a file"):
        train(tmp_path / "file")
    with pytest.raises(ValueError, match=r"out=.*file/below cannot be written \(Not a directory\)"):
        train(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed, tmp_path):
    with pytest.raises(ValueError, match=f"seed={seed} is no seed"):
        train(tmp_path / "new", seed=seed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("field", ["steps", "batch_size", "evaluate_every", "held_out_windows"])
def test_a_recipe_without_steps_is_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(Recipe(), **{field: 0})


def test_a_batch_that_cannot_hold_the_shares_is_refused():
    with pytest.raises(
        ValueError, match="batch_size=7 does not hold whole windows of every domain: use a multiple of 10"
    ):
        Recipe(batch_size=7)


def test_muon_takes_the_matrices_of_experts_and_spares_routers_whatever_a_block_calls_them():
    nn, block = torch.nn, torch.nn.Module()
    block.router, block.experts = ms.Router(v3(4, 1, 1, 2)), ms.Experts(v3(4, 1, 1, 2))
    block.shared_expert_gate = nn.Linear(32, 1, bias=False)  # of Qwen2-MoE: a vector in the shape of a matrix
    matrices, beside, vectors = Muon(nn.Sequential(nn.Embedding(8, 32), block, nn.Linear(32, 8)), lr=1.0).param_groups
    assert [p.ndim for p in matrices["params"]] == [3, 3, 2]
    assert [tuple(p.shape) for p in beside["params"]] == [(8, 32), (4, 32), (1, 32)]
    assert [p.ndim for p in vectors["params"]] == [1]


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (3, 6, 6), (2, 3, 4, 9)])
def test_orthogonal_has_the_singular_vectors_of_its_input_and_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonal(matrices) @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-6)
    assert (values[s > 0.05 * s.amax(-1, keepdim=True)] - 0.95).abs().max() < 0.3


def test_the_weights_of_the_best_evaluation_are_kept(tmp_path, monkeypatch):
    """Not those of the last one."""
    margins, saved = iter([0.1, 0.3, 0.2]), []
    loads = {"gate": {"python": [1, 2]}}
    held_out = SimpleNamespace(judge=lambda _: Report({"python": DomainResult(1, 1.0, 1.0 + next(margins))}, loads))
    router = ms.Router(v3(4, 1, 1, 2))
    monkeypatch.setattr(keeping, "save_weights", lambda _model, _folder: saved.append(record["history"][-1]["step"]))
    record = {"history": []}
    keep = keeping.KeepBest(held_out, tmp_path, record, every=10)
    for step in (10, 15, 20, 30):
        keep.on_step_end(None, SimpleNamespace(global_step=step, max_steps=30), None, model=router)
    assert saved == [10, 20]
    assert record["best_step"] == 20
    assert [line["step"] for line in record["history"]] == [10, 20, 30]
    assert record["history"][0]["loads"] == loads
    assert record["history"][0]["bias"] == {"gate": [0.0] * 4}


def test_a_loss_that_is_no_number_is_never_the_best_and_the_record_is_strict_json(tmp_path, monkeypatch):
    """A later domain alone, then all of them, then numbers again, then a margin that is worse, infinity, and better."""
    nan, inf = float("nan"), float("inf")
    course, saved = [(1.0, nan), (nan, nan), (1.0, 3.0), (2.0, 4.0), (1.0, inf), (0.5, 2.0)], []
    judged = iter(course)

    def judge(_model):
        losses = dict(zip(("english_verse", "python"), next(judged), strict=True))
        return Report(
            {domain: DomainResult(1, loss, 5.0) for domain, loss in losses.items()}, {"gate": {"python": [1, 2]}}
        )

    monkeypatch.setattr(keeping, "save_weights", lambda _model, _folder: saved.append(record["history"][-1]["step"]))
    record = {"history": []}
    keep = keeping.KeepBest(SimpleNamespace(judge=judge), tmp_path, record, every=1)
    for step in range(1, 7):
        keep.on_step_end(None, SimpleNamespace(global_step=step, max_steps=6), None, model=ms.Router(v3(4, 1, 1, 2)))
    assert saved == [3, 6]
    text = (tmp_path / "training.json").read_text()
    history = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["history"]
    assert [line["worst_margin"] for line in history] == [None, None, 2.0, 1.0, None, 3.0]
    assert [line["loss"]["python"] for line in history] == [None, None, 3.0, 4.0, None, 2.0]


@pytest.mark.usefixtures("small_corpus")
def test_a_run_that_diverged_says_so_also_when_it_is_resumed(tmp_path, monkeypatch):
    """Weights too large for float16, in which they are kept; and none that were kept."""
    wild, loss = replace(SHORT, steps=1, warmup_steps=0, learning_rate=1e30), evaluate._loss
    for folder in (tmp_path / "large", tmp_path / "none"):
        for arguments in ({"out": folder, "recipe": wild}, {"resume": folder}):
            with pytest.raises(ValueError, match=r"training diverged: .* lower learning_rate"):
                train(**arguments)
        record = json.loads((folder / "training.json").read_text())
        assert (record["finished"], record.get("best_step")) == (False, 1 if folder.name == "large" else None)
        monkeypatch.setattr(evaluate, "_loss", lambda *given: math.nan * loss(*given))
