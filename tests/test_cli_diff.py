"""`moesaic diff` and `moesaic what-if`: exit codes, JSON, mistakes; and what all commands about records share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from cases import v3
from typer.testing import CliRunner

from moesaic import __version__
from moesaic.cli.diff import diff
from moesaic.cli.stats import stats
from moesaic.cli.steps import steps
from moesaic.cli.what_if import what_if
from moesaic.rules import route
from moesaic.trace.file.reader import load
from moesaic.trace.store import Trace

CONFIG = v3(32, 4, 2, 4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("diff", ...) -> what typer's runner saw. A ValueError, which main() turns into exit 2, is its exception."""
    app = typer.Typer()
    app.command()(diff)
    app.command(name="what-if")(what_if)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    save_traces()
    return lambda *args: CliRunner().invoke(app, list(args))


def save_traces() -> None:
    """Files by what they differ in from "a"; "bare" ones have no scores."""
    logits, bias = torch.randn(2, 300, 32), torch.randn(2, 32) * 0.1

    def save(name, logits=logits, config=CONFIG) -> Trace:
        names = [f"model.layers.{i}.mlp" for i in range(2)]
        routings = {name: route(z, b, config) for name, z, b in zip(names, logits, bias, strict=True)}
        trace = Trace.from_routings(routings, CONFIG, dict(zip(names, bias, strict=True)), model="m", seed=3)
        trace.save(f"{name}.safetensors")
        return trace

    noisy = logits + 2e-3 * torch.randn(logits.shape)
    right = save("a")
    save("same")
    save("rule", config=replace(CONFIG, topk_group=3))
    save("checkpoint", logits + 0.3 * torch.randn(logits.shape))
    replace(save("near", noisy), logits=None, bias=None).save("bare_near.safetensors")
    replace(right, logits=None, bias=None).save("bare.safetensors")
    right.select(slice(0, 10)).save("short.safetensors")
    Path("p.json").write_text("[0, 1]")


@pytest.mark.parametrize(
    ("b", "options", "code", "verdict"),
    [
        ("same", (), 0, "identical"),
        ("near", ("--max-flip", "5%"), 0, "near-ties"),
        ("near", ("--max-flip", "0.0001"), 1, "near-ties"),
        ("rule", ("--max-flip", "100%"), 1, "different rule"),
        ("checkpoint", ("--max-flip", "100%"), 1, "different scores"),
    ],
)
def test_the_exit_code_is_the_verdict(run, b, options, code, verdict):
    for lang in ("en", "zh"):
        result = run("diff", "a.safetensors", f"{b}.safetensors", *options, "--lang", lang)
        assert result.exit_code == code, result.output
    shown = run("diff", "a.safetensors", f"{b}.safetensors", *options)
    assert verdict in shown.output
    assert "Reproduce:" in shown.output
    document = run("diff", "a.safetensors", f"{b}.safetensors", *options, "--json")
    found = json.loads(document.stdout, parse_constant=pytest.fail)
    assert (found["verdict"], found["exit_code"], document.exit_code) == (verdict, code, code)


def test_without_scores_only_a_limit_that_was_given_decides(run):
    assert run("diff", "bare.safetensors", "bare_near.safetensors").exit_code in (1, 2)
    assert run("diff", "bare.safetensors", "bare_near.safetensors", "--max-flip", "5%").exit_code == 0
    assert run("diff", "bare.safetensors", "bare_near.safetensors", "--max-flip", "0").exit_code == 1
    assert run("diff", "bare.safetensors", "same.safetensors").exit_code == 0


def test_nobody_can_tell_is_2_within_the_limit_that_nobody_gave(run):
    trace = load("bare.safetensors")
    picks = trace.picks.clone()
    picks[0, 0, 0] = next(e for e in range(32) if e not in picks[0, 0].tolist())
    replace(trace, picks=picks).save("one.safetensors")
    assert run("diff", "bare.safetensors", "one.safetensors").exit_code == 2
    picks[0, 0, 0] = 32  # an expert is missing: a limit on flips says nothing about that
    replace(trace, picks=picks).save("dropped.safetensors")
    assert run("diff", "bare.safetensors", "dropped.safetensors", "--max-flip", "5%").exit_code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("diff", "a.safetensors", "short.safetensors"), "300 tokens in one and 10 in the other"),
        (("diff", "a.safetensors", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("diff", "a.safetensors", "a.safetensors", "--max-flip", "many"), "--max-flip 'many' is no share"),
        (("diff", "a.safetensors", "a.safetensors", "--max-flip", "101%"), "--max-flip '101%' is no share"),
        (("diff", "a.safetensors", "a.safetensors", "--precision", "bf16"), "dtype 'bf16' is not one of torch"),
        (("diff", "a.safetensors", "a.safetensors", "--lang", "fr"), "--lang 'fr' is unknown"),
        (("what-if", "bare.safetensors", "--k", "2"), "logits were not recorded"),
        (("what-if", "a.safetensors", "--k", "20"), "num_experts_per_tok=20 exceeds"),
        (("what-if", "a.safetensors", "--drop", "3;7"), "--drop '3;7' is not understood: give experts such as 3,7"),
        (("what-if", "a.safetensors", "--bias", "3"), "--bias '3' is not understood"),
        (("what-if", "a.safetensors", "--bias", "3:1", "--no-bias"), "--no-bias and --bias are both given"),
        (("what-if", "a.safetensors", "--bias", "1:1,2:1,1:2"), "--bias '1:1,2:1,1:2' names expert 1 twice"),
        (
            ("what-if", "a.safetensors", "--bias", "3:inf", "--json", "-o", "b.safetensors"),
            "bias={3: inf} is not finite",
        ),
        (("what-if", "a.safetensors", "--bias", "3:1e39", "-o", "b.safetensors"), "bias={3: 1e+39} is not finite"),
        (("what-if", "a.safetensors", "-o", "a.safetensors"), "--out a.safetensors is the record itself"),
        (("what-if", "a.safetensors", "-o", "same.safetensors"), "exists already: give another file, or --force"),
        (("what-if", "a.safetensors", "-o", "none/b.safetensors"), "--out none/b.safetensors: cannot be written"),
        (("what-if", "a.safetensors", "-o", "."), "--out .: is a folder"),
        (("what-if", "a.safetensors", "--nodes", "5"), "nodes=5 does not divide n_routed_experts=32"),
        (("what-if", "a.safetensors", "--placement", "p.json"), "placement has shape [2], not [32]"),
        (("what-if", "a.safetensors", "--nodes", "4", "--placement", "p.json"), "--nodes and --placement are both"),
        (("what-if", "rule.safetensors", "--k", "2"), "the recorded rule is not this one"),
    ],
)
def test_a_mistake_is_one_line(run, args, message):
    result = run(*args)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not Path("b.safetensors").exists()


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_what_if_says_what_changes_and_saves_the_new_record(run, lang):
    result = run(
        "what-if", "a.safetensors", "--k", "2", "--drop", "3,7", "--no-bias", "-o", "b.safetensors", "--lang", lang
    )
    assert result.exit_code == 0, result.output
    assert {"en": "what if: k = 2, no correction bias, without e3 e7", "zh": "假如：k = 2，去掉选择偏置，去掉 e3 e7"}[
        lang
    ] in result.output
    saved = load("b.safetensors")
    assert saved.top_k == 2
    assert not torch.isin(saved.picks.long(), torch.tensor([3, 7])).any()


def test_what_if_as_json_and_forced(run):
    found = json.loads(
        run("what-if", "a.safetensors", "--bias", "3:5,4:-5", "--json").stdout, parse_constant=pytest.fail
    )
    assert found["changes"] == {"bias": {"3": 5.0, "4": -5.0}}
    assert found["reproduced"]
    result = run("what-if", "rule.safetensors", "--k", "2", "--anyway", "--json")
    assert not json.loads(result.stdout)["reproduced"]
    unchanged = run("what-if", "a.safetensors")
    assert "the recorded rule gives the recorded experts of all 600" in unchanged.output


def test_a_file_is_replaced_where_that_is_asked_for_and_checked_before_the_work(run, monkeypatch):
    before = load("same.safetensors").picks.clone()
    with monkeypatch.context() as patched:
        patched.setattr("moesaic.trace.reroute.what_if.what_if", lambda *_, **__: pytest.fail("worked first"))
        for out in ("same.safetensors", "none/b.safetensors"):
            assert isinstance(run("what-if", "a.safetensors", "--drop", "3", "-o", out).exception, ValueError)
    assert torch.equal(load("same.safetensors").picks, before)
    assert run("what-if", "a.safetensors", "--drop", "3", "-o", "same.safetensors", "--force").exit_code == 0
    assert not (load("same.safetensors").picks == 3).any()


def test_records_of_one_model_are_told_apart_by_their_files(run):
    assert "a: a.safetensors   b: rule.safetensors" in run("diff", "a.safetensors", "rule.safetensors").output
    found = json.loads(run("diff", "a.safetensors", "rule.safetensors", "--json").stdout)
    assert (found["a"], found["b"]) == ("a.safetensors", "rule.safetensors")
    replace(load("rule.safetensors"), model="another").save("other.safetensors")
    assert "a: m   b: another" in run("diff", "a.safetensors", "other.safetensors").output


def test_what_if_counts_nodes_where_they_are_given(run):
    for options in (("--nodes", "4"), ("--placement", "four.json")):
        Path("four.json").write_text(json.dumps([e // 8 for e in range(32)]))
        found = json.loads(run("what-if", "a.safetensors", "--k", "2", *options, "--json").stdout)
        assert found["placement"] == [e // 8 for e in range(32)]
        assert found["layers"][0]["nodes"] == found["layers"][0]["groups"]  # the groups of this rule are the nodes


def test_json_of_every_command_begins_with_the_same_keys(tmp_path, monkeypatch):
    """Program, command, and each record with its file, config, seed and versions."""
    monkeypatch.chdir(tmp_path)
    save_traces()
    app = typer.Typer()
    for name, command in (("diff", diff), ("what-if", what_if), ("stats", stats), ("steps", steps)):
        app.command(name=name)(command)
    for args, files in (
        (("diff", "a.safetensors", "same.safetensors"), ["a.safetensors", "same.safetensors"]),
        (("what-if", "a.safetensors", "--k", "2"), ["a.safetensors"]),
        (("stats", "a.safetensors", "--against", "same.safetensors"), ["a.safetensors", "same.safetensors"]),
        (("steps", "--trace", "a.safetensors"), ["a.safetensors"]),
        (("steps", "two words"), [None]),
    ):
        result = CliRunner().invoke(app, [*args, "--json"])
        assert result.stderr == "", args
        found = json.loads(result.stdout, parse_constant=pytest.fail)
        assert list(found)[:4] == ["moesaic", "torch", "command", "records"]
        assert (found["moesaic"], found["torch"]) == (__version__, torch.__version__)
        assert [record["file"] for record in found["records"]] == files
        for record in found["records"]:
            assert set(record) == {
                "file", "model", "config", "seed", "versions", "layers", "origins", "missing",
            }  # fmt: skip
        if files[0]:
            assert found["records"][0]["config"] == CONFIG.digest()
            assert found["records"][0]["seed"] == 3
            assert {"moesaic", "torch"} <= found["records"][0]["versions"].keys()


def test_a_terminal_is_shown_how_many_layers_are_routed_again(run, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    result = run("what-if", "a.safetensors", "--k", "2")
    assert "Routing layers again" in result.stderr
    assert "100%" in result.stderr
    assert run("what-if", "a.safetensors", "--k", "2", "--json").stderr == ""
