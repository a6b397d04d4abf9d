"""`moesaic steps` of a record: token text, what is not known, JSON."""

import json
from dataclasses import replace

import pytest
import torch
from cases import v3

from moesaic.cli.steps import recorded_word, steps
from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.trace.rule.stages import NO_LOGITS
from moesaic.trace.store import Trace


def trace_of(config=None, **fields) -> Trace:
    config = config or v3(16, 4, 2, 4)
    bias = torch.randn(16) * 0.1
    return Trace.from_routings({"moe": route(torch.randn(6, 16), bias, config)}, config, {"moe": bias}, **fields)


def shown(capsys, trace, tmp_path, **options) -> str:
    trace.save(tmp_path / "t.safetensors")
    steps(trace=tmp_path / "t.safetensors", **{"layer": 0, "token": 1, "vs": "topk", "lang": "en", **options})
    return capsys.readouterr().out


def test_the_text_of_a_token_comes_from_the_record_and_cannot_steer_the_terminal(capsys, tmp_path):
    ids = torch.arange(6)
    trace = trace_of(input_ids=ids, pieces={1: " \x1b[31mred\u202e[bold]"})
    out = shown(capsys, trace, tmp_path)
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[31mred" in out
    assert "[bold]" in out
    assert recorded_word(trace, 2) == ""
    assert recorded_word(trace_of(), 1) == ""


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_layer_whose_rule_is_not_known_says_so(capsys, tmp_path, lang):
    foreign = MoEConfig(hidden_size=8, n_routed_experts=16, num_experts_per_tok=4, topk_method="unknown")
    trace = replace(trace_of(), configs=(foreign,))
    out = shown(capsys, trace, tmp_path, lang=lang)
    assert {"en": "the rule of this layer is not known", "zh": "此层的路由规则未知"}[lang] in out.replace("\n", "")
    assert {"en": "classic top-4: no data (", "zh": "经典 top-4：没有数据（"}[lang] in out
    assert "sigmoid" not in out


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_record_without_logits_says_how_to_have_them(capsys, tmp_path, lang):
    assert NO_LOGITS[lang] not in shown(capsys, trace_of(), tmp_path, lang=lang)
    picks = replace(trace_of(), logits=None, bias=None)
    assert NO_LOGITS[lang] in shown(capsys, picks, tmp_path, lang=lang)
    others = replace(picks, origins=("imported",))
    assert NO_LOGITS[lang] not in shown(capsys, others, tmp_path, lang=lang), "we did not record it"


def test_json_is_one_strict_document_with_every_stage(capsys, tmp_path):
    trace = trace_of()
    found = json.loads(shown(capsys, trace, tmp_path, json=True), parse_constant=pytest.fail)
    assert [step["number"] for step in found["steps"]] == list(range(1, 16))
    by_key = {step["key"]: step for step in found["steps"]}
    assert by_key["experts"]["value"] == trace.picks[0, 1].tolist()
    assert by_key["masked"]["value"].count(None) == 8  # minus infinity, which JSON has not
    assert by_key["input"]["why"]["en"] == "not recorded"
    assert set(found["versus_topk"]["topk"]) == set(trace.logits[0, 1].topk(4).indices.tolist())
    foreign = MoEConfig(hidden_size=8, n_routed_experts=16, num_experts_per_tok=4, topk_method="unknown")
    assert json.loads(shown(capsys, replace(trace, configs=(foreign,)), tmp_path, json=True))["versus_topk"] is None
