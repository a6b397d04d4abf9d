"""Runs side by side: what is read from their records, its spread over seeds, tables and figure."""

import io
import json

import numpy as np
import pytest
from commands import runner
from rich.console import Console

from moesaic.cli.compare import compare
from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import balance_numbers, random_loads
from moesaic.train.comparing.figure import runs_figure
from moesaic.train.comparing.runs import as_dict, by_balance, chance_of, names_of, read_run, read_runs
from moesaic.train.comparing.table import balances_table, runs_table
from moesaic.train.evaluate import DomainResult, Report, mutual_information
from moesaic.train.sizes import tiny_config

DOMAINS = ("english_verse", "chinese_verse", "manual", "python")
LAYERS = ("model.layers.1.mlp", "model.layers.2.mlp")


def report(loads, loss=4.0) -> Report:
    domains = {domain: DomainResult(10, loss + i, 9.0) for i, domain in enumerate(DOMAINS)}
    return Report(domains, {layer: dict(zip(DOMAINS, loads, strict=True)) for layer in LAYERS})


def write_run(folder, balance, seed, *, loss=4.0, finished=True, steps=(2, 4), size="tiny", **recipe):
    """A run of two evaluations in which expert 3 of 4 is idle in the first and busy in the second."""
    reports = [report([[4, 4, 4, 0]] * 4, loss + 1), report([[4, 4, 4, 4 + seed]] * 4, loss)]
    bias = {} if balance == "none" else {layer: [0.0, 0.1, 0.2, -0.3] for layer in LAYERS}
    history = [
        {"step": step, "loss": {d: r.loss for d, r in rep.domains.items()}, "loads": rep.loads, "bias": bias}
        for step, rep in zip(steps, reports, strict=True)
    ]
    recipe = {"balance": balance, "steps": 4, "evaluate_every": 2, "held_out_windows": 40, "loss_alpha": 0.01} | recipe
    record = {"size": size, "seed": seed, "recipe": recipe, "history": history, "finished": finished}
    record |= {"best_step": steps[-1], "held_out": {domain: {"tokens": 10_000} for domain in DOMAINS}}
    last = reports[-1]
    if finished:
        record |= {"loss": last.loss, "max_violation": last.max_violation, "unused": last.unused}
        record |= {"specialisation": last.specialisation, "command": "moesaic train", "versions": {"torch": "2.x"}}
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / f"{balance}-{seed}", balance, seed, loss=loss + 0.1 * seed)
        for balance, loss in (("none", 4.0), ("bias", 3.9))
        for seed in (0, 1, 2)
    ]


def shown(what) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_loss_and_violation_count_domains_by_their_share_of_the_training_text():
    found = report([[1, 0], [0, 1], [1, 1], [3, 1]])
    assert found.loss == pytest.approx(0.3 * 4 + 0.3 * 5 + 0.1 * 6 + 0.3 * 7)
    share = 0.3 * 1 + 0.1 * 0.5 + 0.3 * 0.75  # of expert 0, whatever the number of tokens of a domain
    assert found.max_violation[LAYERS[0]] == pytest.approx(2 * share - 1)


def test_an_expert_below_a_tenth_of_its_share_is_unused():
    assert report([[100, 100, 9, 10]] * 4).unused[LAYERS[0]] == 0
    assert report([[100, 100, 100, 7]] * 4).unused[LAYERS[0]] == 1
    assert report([[1, 0, 0, 0]] * 4).unused[LAYERS[0]] == 3


def test_specialisation_is_the_information_between_domain_and_expert():
    assert report([[5, 5]] * 4).specialisation[LAYERS[0]] == pytest.approx(0.0, abs=1e-12)
    each_its_own = report([[7, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 9]]).specialisation[LAYERS[0]]
    shares = np.array([0.3, 0.3, 0.1, 0.3])
    assert each_its_own == pytest.approx(-(shares * np.log2(shares)).sum())
    assert mutual_information(np.array([[0.25, 0.25], [0.5, 0.0]])) == pytest.approx(0.311278, abs=1e-6)


def test_a_run_is_read_as_it_was_judged(folders):
    run = read_run(folders[4])
    assert (run.name, run.balance, run.seed, run.steps) == ("bias-1", "bias", 1, [2, 4])
    recipe = {"balance": "bias", "steps": 4, "evaluate_every": 2, "held_out_windows": 40, "loss_alpha": 0.01}
    assert run.setting == {"size": "tiny", **recipe}
    loads = np.array([4, 4, 4, 5]) / 17
    np.testing.assert_allclose(run.loads[LAYERS[0]][1], loads)
    np.testing.assert_allclose(run.max_vio[LAYERS[0]], [1 / 3, 4 * 5 / 17 - 1])
    np.testing.assert_allclose(run.worst_vio, run.max_vio[LAYERS[1]])
    assert run.loss[1] == pytest.approx(run.final.loss)
    assert run.bias[LAYERS[0]].shape == (2, 4)
    assert run.final.dead == 0


def test_a_loss_that_was_no_number_is_none_in_json_too(tmp_path):
    folder = write_run(tmp_path / "run", "none", 1)
    record = json.loads((folder / "training.json").read_text())
    record["history"][0]["loss"]["python"] = None
    (folder / "training.json").write_text(json.dumps(record))
    run = read_run(folder)
    assert np.isnan(run.loss).tolist() == [True, False]
    assert as_dict([run])["runs"][0]["loss"] == [None, run.loss[1]]
    runs_figure([run])
    runs_figure([run._replace(loss=np.full(2, np.nan))])


def test_a_record_of_another_version_is_named(tmp_path):
    folder = write_run(tmp_path / "run", "none", 1)
    record = json.loads((folder / "training.json").read_text())
    del record["recipe"]["held_out_windows"]
    (folder / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"not the record of a `moesaic train` run of this version"):
        read_run(folder)


def test_dead_experts_are_those_of_the_evaluation_whose_weights_were_kept(tmp_path):
    folder = write_run(tmp_path / "run", "none", 1)
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"best_step": 2}))
    assert read_run(folder).final.dead == 2, "one in each layer"


def test_max_vio_stands_beside_that_of_random_routing(folders):
    run = read_run(folders[0])
    assert run.assignments == pytest.approx(1 / ((3 * 0.3**2 + 0.1**2) / 12))
    tiny = MoEConfig.from_hf(tiny_config())
    assert run.chance == chance_of("tiny", len(LAYERS), run.assignments / 4)
    (found,) = by_balance([run])
    low, high = found.chance
    loads = random_loads(tiny, round(10_000 / 0.28), 1000 * len(LAYERS), np.random.default_rng(1))
    worst = balance_numbers(loads)["max_vio"].reshape(1000, -1).max(1)
    assert np.mean(worst < low) == pytest.approx(0.05, abs=0.03)
    assert np.mean(worst > high) == pytest.approx(0.05, abs=0.03)
    assert f"worst layer; random routing gives {low:.2f} to {high:.2f}" in shown(balances_table([run]))
    (balance,) = as_dict([run])["balances"]
    assert balance["chance_max_vio"] == [low, high]
    vio = runs_figure([run]).axes[1]
    assert vio.patches[0].get_extents().transformed(vio.transData.inverted()).intervaly == pytest.approx(run.chance)


def test_runs_that_differ_in_more_than_the_seed_are_not_put_together(tmp_path):
    write_run(tmp_path / "a", "none", 0)
    write_run(tmp_path / "b", "aux", 0)
    write_run(tmp_path / "c", "aux", 1, loss_alpha=0.1)
    write_run(tmp_path / "d", "bias", 0, size="small", learning_rate=1.0)
    runs = read_runs([tmp_path / name for name in "dcba"])
    assert [run.name for run in runs] == ["a", "b", "c", "d"], "in the order of balances, then of seeds"
    assert names_of(runs) == ["none", "aux loss_alpha=0.01", "aux loss_alpha=0.1", "bias"]
    none, weak, strong, bias = by_balance(runs)
    assert weak.gain_over(none).values == (0.0,), "a recipe may differ in how it balances"
    assert strong.gain_over(none) is None, "another seed"
    assert bias.gain_over(none) is None, "another size"
    assert "random routing" not in shown(balances_table(runs))


def test_seeds_of_one_balance_give_mean_spread_and_a_difference_seed_by_seed(folders):
    none, bias = by_balance([read_run(folder) for folder in folders])
    assert (none.name, none.seeds) == ("none", (0, 1, 2))
    assert bias.loss.mean == pytest.approx(none.loss.mean - 0.1)
    assert none.loss.sd == pytest.approx(0.1)
    gain = bias.gain_over(none)
    assert gain.mean == pytest.approx(-0.1)
    assert gain.sd == pytest.approx(0.0, abs=1e-9), "the seeds differ, the difference does not"
    assert none.gain_over(none) is None


def test_runs_that_are_not_finished_take_no_part_in_the_spread(folders, tmp_path):
    runs = [read_run(folder) for folder in folders] + [
        read_run(write_run(tmp_path / "late", "bias", 7, loss=99.0, finished=False))
    ]
    assert by_balance(runs)[1].seeds == (0, 1, 2)
    assert "not finished, so not in this table: late" in shown(balances_table(runs))
    text = shown(runs_table(runs))
    assert "late" in text
    assert "40 held-out windows a domain" in text, "which the numbers below it are not of"


@pytest.mark.parametrize(("lang", "words"), [("en", "against none"), ("zh", "相对 none")])
def test_the_tables_say_it_in_both_languages(folders, lang, words):
    runs = [read_run(folder) for folder in folders]
    text = shown(balances_table(runs, lang))
    assert words in text
    assert "-0.100 ±0.000" in text
    assert "5.500 ±0.100" in text
    single = shown(balances_table(runs[:1], lang))
    assert "±" not in single.splitlines()[2]
    assert {"en": "one seed has no spread", "zh": "只有一个种子"}[lang] in single


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_figure_has_curves_of_all_runs_and_strips_of_each_balance(folders, lang):
    runs = [read_run(folder) for folder in folders]
    fig = runs_figure(runs, lang)
    loss, vio, last, none, bias, no_bias, path, *_ = fig.axes
    assert len(loss.lines) == len(vio.lines) == 6 + 2, "the runs, and the mean of each balance"
    np.testing.assert_allclose(loss.lines[4].get_ydata(), runs[3].loss)
    np.testing.assert_allclose(loss.lines[3].get_ydata(), np.mean([run.loss for run in runs[:3]], axis=0))
    np.testing.assert_allclose(last.lines[2].get_xdata(), [run.loss[-1] for run in runs[3:]])
    np.testing.assert_allclose(none.images[0].get_array()[:, 0], np.array([4, 4, 4, 0]) / 3)
    assert [axis.get_title() for axis in (none, bias)] == ["none", "bias"]
    assert {"en": "no bias", "zh": "没有偏置"}[lang] in no_bias.texts[0].get_text()
    assert len(path.lines) == 4
    with pytest.raises(ValueError, match="layer='x' is not in run none-0: use one of model"):
        runs_figure(runs, layer="x")


def test_json_has_every_curve_and_spread(folders):
    found = as_dict([read_run(folder) for folder in folders])
    json.dumps(found, allow_nan=False)
    assert [run["name"] for run in found["runs"]][:2] == ["none-0", "none-1"]
    assert found["balances"][1]["loss"]["sd"] == pytest.approx(0.1)


def test_what_is_no_run_is_named(tmp_path, folders):
    with pytest.raises(ValueError, match=r"cannot be read .*: give folders of `moesaic train` runs"):
        read_run(tmp_path / "nowhere")
    (folders[0] / "training.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="not the record of a `moesaic train` run of this version"):
        read_run(folders[0])
    (folders[0] / "training.json").write_text("{")
    with pytest.raises(ValueError, match="not the record of"):
        read_run(folders[0])
    (tmp_path / "q.safetensors").write_bytes(b"\x08\x00\xaf\xff")
    with pytest.raises(ValueError, match=r"q\.safetensors: not the record of .*: give the folder of one, or tr"):
        read_run(tmp_path / "q.safetensors")
    write_run(tmp_path / "other", "magic", 0)
    with pytest.raises(ValueError, match="not the record of a `moesaic train` run of this version"):
        read_run(tmp_path / "other")
    record = {"seed": 0, "recipe": {"evaluate_every": 200}, "history": []}
    (folders[0] / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not one evaluation yet: wait for step 200"):
        read_run(folders[0])
    with pytest.raises(ValueError, match="two runs of balance bias with seed 1: leave one of them out"):
        by_balance([read_run(folders[4]), read_run(folders[4])])


def test_logs_of_a_monitor_are_sent_to_watch(tmp_path, folders):
    (tmp_path / "watched" / "mine").mkdir(parents=True)
    (tmp_path / "watched" / "mine" / "load.jsonl").write_text("{}\n{}\n")
    for path in (tmp_path / "watched", tmp_path / "watched" / "mine", tmp_path / "watched" / "mine" / "load.jsonl"):
        with pytest.raises(ValueError, match=r"logs of ms\.LoadMonitor are for `moesaic watch`: give") as told:
            read_runs([path])
        assert str(told.value).startswith(f"{path}: ")
    (folders[0] / "load.jsonl").write_text("{}\n")
    assert read_run(folders[0]).balance == "none"  # `moesaic train` writes one too


def test_a_run_given_twice_is_refused_before_anything_is_printed_or_drawn(folders, tmp_path, monkeypatch, capsys):
    call = runner(monkeypatch, capsys, compare=compare)
    told = call("compare", folders[0], folders[0], "-o", tmp_path / "runs.png")
    assert told == (2, "", "moesaic: two runs of balance none with seed 0: leave one of them out\n")
    assert not (tmp_path / "runs.png").exists()


def test_the_command_prints_draws_and_refuses(folders, tmp_path, monkeypatch, capsys):
    call = runner(monkeypatch, capsys, compare=compare)
    code, out, _ = call("compare", *folders, "-o", tmp_path / "runs.png")
    assert code == 0
    assert "against none" in out
    assert f"Reproduce: moesaic compare {folders[0]}" in out
    assert f"with torch 2.x, config {MoEConfig.from_hf(tiny_config()).digest()}" in out
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert call("compare", folders[0].parent)[1].splitlines()[:9] == out.splitlines()[:9], "all that lie in it"
    code, out, _ = call("compare", folders[0], "--json")
    said = json.loads(out)
    assert said["command"] == f"moesaic compare {folders[0]} --json"
    assert [run["made"] for run in said["runs"]] == [{"command": "moesaic train", "torch": "2.x"}]
    code, out, err = call("compare", folders[0], "-o", "x.doc")
    assert (code, out) == (2, "")
    assert err == "moesaic: --out x.doc: what ends in .doc is not drawn: use .png, .svg or .pdf\n"
