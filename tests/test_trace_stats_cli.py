"""`moesaic stats`: what it prints, where, and with which exit code."""

import json
import re

import pytest
import torch
import typer
from cases import v3
from typer.testing import CliRunner

from moesaic import rules
from moesaic.cli.stats import stats
from moesaic.trace.store import Trace

CONFIG = v3(32, 4, 2, 4)
app = typer.Typer()
app.command()(stats)


def run(*arguments):
    """(exit code, stdout, stderr) as `moesaic` gives them: a ValueError is exit code 2 and its line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ValueError):
        return 2, result.stdout, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def traced(n_tokens=600, layers=2, **fields) -> Trace:
    logits = torch.randn(layers * n_tokens, 32)
    routing = rules.route(logits, None, CONFIG)
    shape = (layers, n_tokens, 4)
    given = {
        "picks": routing.expert_ids.view(shape).to(torch.int16),
        "weights": routing.weights.view(shape).float(),
        "layers": tuple(f"model.layers.{i}.mlp" for i in range(layers)),
        "configs": (CONFIG,) * layers,
        "sequences": torch.arange(n_tokens) * 30 // max(n_tokens, 1),
        "input_ids": torch.arange(n_tokens),
        "labels": ("poem", "code\x1b[31m") * 15,
        "model": "tiny",
        "seed": 0,
    }
    return Trace(**(given | fields))


@pytest.fixture
def saved(tmp_path):
    def save(name="run.safetensors", **fields):
        path = tmp_path / name
        traced(**fields).save(path)
        return path

    return save


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_healthy_run_is_exit_code_0_and_says_why(saved, lang):
    code, out, err = run(saved(), "--nodes", 4, "--lang", lang)
    assert (code, err) == (0, "")
    words = {
        "en": "All 2 layers are within chance",
        "zh": "全部 2 层都在随机范围内：没有哪个专家的份额偏离到随机波动之外",
    }[lang]
    assert words in out
    assert "nodes" in out
    assert "\x1b[31m" not in out
    assert {"en": "Reproduce: ", "zh": "复现："}[lang] in out


def test_json_is_one_strict_document_with_everything_asked_for(saved):
    first, second = saved(), saved("other.safetensors")
    code, out, err = run(first, "--json", "--coselection", "--against", second, "--capacity", "1.5, 3")
    assert (code, err) == (0, "")
    read = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["status"] == "chance"
    assert {"dropped_at_1.5", "dropped_at_3"} <= read["layers"][0]["measures"].keys()
    assert read["coselection"]["tests"] == 2 * 32 * 31 // 2
    assert read["against"]["tokens"] == 600
    assert read["domains"]["permutations"] == 1000


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_collapse_is_exit_code_1_after_the_tables(saved, lang):
    picks = traced().picks
    picks[1] = torch.arange(4).to(torch.int16)
    path = saved(picks=picks)
    code, out, _ = run(path, "--lang", lang)
    assert code == 1
    assert {"en": "collapsed onto 4 of 32 experts", "zh": "1 层坍缩：layers.1：32 个专家中只有 4 个在工作"}[lang] in out
    code, out, _ = run(path, "--json")
    assert (code, json.loads(out)["status"]) == (1, "collapsed")


@pytest.mark.parametrize("kind", ["no tokens", "too few", "missing", "a layer without tokens"])
def test_what_cannot_be_judged_is_exit_code_2_and_said(saved, kind):
    picks = traced().picks
    picks[1] = 32
    fields = {
        "no tokens": {"n_tokens": 0},
        "too few": {"n_tokens": 20},
        "missing": {"missing": ("model.layers.7.mlp",)},
        "a layer without tokens": {"picks": picks},
    }[kind]
    path = saved(**fields)
    code, out, err = run(path)
    assert code == 2
    assert err.startswith("not every layer could be judged: ")
    assert "\n" not in err
    chinese = run(path, "--lang", "zh")[2]
    assert chinese.startswith("并非每一层都能判断：")
    assert not re.search(r"[A-Za-z]{3,} [a-z]{3,}", chinese)  # no English sentence in it
    words = {"no tokens": "no layer has data", "too few": "too few tokens", "missing": "layers.7"}
    assert words.get(kind, "layers.1") in out
    code, out, err = run(path, "--json")
    assert code == 2
    assert json.loads(out)["healthy"] is False
    if kind == "missing":
        assert json.loads(out)["missing"] == ["model.layers.7.mlp"]


def test_a_sick_layer_beside_missing_ones_is_exit_code_1(saved):
    picks = traced().picks
    picks[1] = torch.arange(4).to(torch.int16)
    code, out, _ = run(saved(picks=picks, missing=("model.layers.7.mlp",)))
    assert code == 1
    assert "without data" in out
    assert "layers.7" in out


def test_placements_and_other_traces(saved, tmp_path):
    path, placement = saved(), tmp_path / "placement.json"
    placement.write_text(json.dumps([e % 2 for e in range(32)]))
    code, out, _ = run(path, "--placement", placement, "--against", path)
    assert run(path, "--placement", placement.read_text(), "--against", path)[:2] == (code, out), "the list itself"
    assert code == 0
    assert "The same tokens in" in out
    other = saved("other.safetensors", input_ids=torch.arange(600) + 1)
    code, _, err = run(path, "--against", other)
    assert (code, err) == (
        2,
        "the traces are not of the same tokens: token 0 is id 0 in one and 1 in the other: record both with the same "
        "text",
    )
    unchecked = saved("unchecked.safetensors", input_ids=None)
    assert "could not be checked" in " ".join(run(path, "--against", unchecked)[1].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "5"], "nodes=5 does not divide n_routed_experts=32"),
        (["--nodes", "4", "--placement", "x"], "--nodes and --placement are both given"),
        (["--capacity", "big"], "--capacity 'big' is not a list of numbers"),
        (["--capacity", "-1"], "capacity=-1.0 must be a positive number"),
        (["--alpha", "1"], "alpha=1.0 must lie between 0 and 1"),
        (["--lang", "fr"], "--lang 'fr' is unknown: use zh or en"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(saved, arguments, message):
    code, out, err = run(saved(), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert "\n" not in err


def test_a_file_that_is_not_there_is_a_mistake(tmp_path):
    code, _, err = run(tmp_path / "none.safetensors")
    assert code == 2
    assert "none.safetensors" in err


def test_domains_that_cannot_be_tested_are_said(saved):
    few = {"sequences": torch.arange(400) // 100, "labels": ("a", "a", "b", "b"), "n_tokens": 400}
    code, out, _ = run(saved(**few))
    assert code == 0
    assert "Domains are not tested: no preference among 4 documents in 2 domains could" in " ".join(out.split())
    out = run(saved(**few), "--lang", "zh")[1]
    assert "未检验领域偏好：4 个文档分属 2 个领域，任何偏好的 p 值都不会低于 0.33" in "".join(out.splitlines())
    assert json.loads(run(saved(**few), "--json")[1])["domains"]["not_tested"]["en"].startswith(
        "no preference among 4 documents"
    )


def test_domains_that_no_p_value_of_alpha_can_come_from_are_not_called_impartial(saved):
    few = {"sequences": torch.arange(400) // 50, "labels": ("a", "b") * 4, "n_tokens": 400}
    assert "preferences" in json.loads(run(saved(**few), "--json")[1])["domains"]
    domains = json.loads(run(saved(**few), "--json", "--alpha", 0.01)[1])["domains"]
    assert domains["not_tested"]["en"].endswith("below 0.029, and alpha is 0.01: give more documents a domain")


def test_alpha_is_that_of_domains_too(saved):
    """Expert 7 is used a little more in the second of two domains, so that its p-value lies between 0.01 and 0.05."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 30, 20, 32, generator=generator) + 0.8 * torch.rand(2, 30, 1, 32, generator=generator)
    scores[1, 1::2, :, 7] += 0.3
    path = saved(picks=scores.topk(4).indices.flatten(1, 2).to(torch.int16), logits=None)
    found = json.loads(run(path, "--json")[1])["domains"]["preferences"]
    assert [row["expert"] for row in found] == [7]
    assert 0.01 < found[0]["p_value"] <= 0.05
    assert json.loads(run(path, "--json", "--alpha", 0.01)[1])["domains"]["preferences"] == []
    for alpha, shown in ((0.05, True), (0.01, False)):
        out = run(path, "--alpha", alpha)[1]
        assert f"alpha {alpha}" in out
        assert ("e7:" in out) == shown
    out = run(path, "--alpha", 1e-4)[1]
    told = "Domains are not tested: of 1,000 permutations no p-value is below 0.001, and alpha is 0.0001."
    assert told in " ".join(out.split())


def test_one_document_is_one_document(saved):
    out = run(saved(sequences=torch.zeros(600, dtype=torch.int64), labels=("a",)))[1]
    assert "2 MoE layers, 600 tokens of 1 document, top 4 of 32 experts" in out


def test_what_is_not_known_of_the_other_record_is_said(saved):
    other = saved("other.safetensors", missing=("model.layers.7.mlp",), origins=("router", "experts"))
    for lang, words in (
        ("en", "second record: Nothing is said of layers.7"),
        ("zh", "第二份记录：对 layers.7 不作判断"),
    ):
        out = run(saved(), "--against", other, "--lang", lang)[1]
        assert words in " ".join(out.split())
    found = json.loads(run(saved(), "--against", other, "--json")[1])
    assert found["against"]["missing"] == ["model.layers.7.mlp"]
    assert found["records"][1]["origins"] == ["router", "experts"]
