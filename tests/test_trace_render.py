from dataclasses import replace

import pytest
import torch
from cases import v3
from rich.console import Console

from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.trace.rule.stages import STAGES
from moesaic.trace.rule.steps import steps, versus_topk
from moesaic.trace.rule.steps_table import WORDS as STEPS_WORDS
from moesaic.trace.rule.steps_table import rank_changes, steps_table
from moesaic.trace.shown import short_layer, sparkline
from moesaic.trace.statistics.load_table import WORDS, load_table, preference_table
from moesaic.trace.statistics.preference import domain_preference
from moesaic.trace.statistics.stats import layer_reports
from moesaic.trace.store import Trace
from moesaic.types import Routing


def shown(renderable, width=160) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def traced(config, n_tokens=40, layers=1, bias_scale=0.1) -> Trace:
    routings, biases = {}, {}
    for layer in range(layers):
        bias = torch.randn(config.n_routed_experts) * bias_scale if config.has_correction_bias else None
        name = f"model.layers.{layer + 1}.mlp"
        routings[name], biases[name] = route(torch.randn(n_tokens, config.n_routed_experts), bias, config), bias
    return Trace.from_routings(routings, config, biases)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("preset", ["deepseek-v3", "deepseek-v2", "mixtral", "gpt-oss", "classic"])
def test_the_table_has_a_row_for_every_stage(preset, lang):
    of_token = steps(traced(MoEConfig.preset(preset, hidden_size=8)), 0, 3)
    text = shown(steps_table(of_token, lang, versus=True))
    for stage in STAGES:
        assert (stage.name_zh if lang == "zh" else stage.name_en) in text
    for step in of_token:
        assert "[" + ", ".join(map(str, step.shape)) + "]" in text
    for expert in of_token[11].value.tolist():
        assert f"e{expert}" in text
    assert STEPS_WORDS[lang]["disagrees"] not in text


def test_groups_that_are_kept_carry_a_star():
    config = v3(16, 4, 2, 4)
    of_token = steps(traced(config), 0, 3)
    text = shown(steps_table(of_token))
    for group, (score, kept) in enumerate(zip(of_token[6].value.tolist(), of_token[8].value.tolist(), strict=True)):
        assert (f"g{group} {score:.3f}*" in text) == kept
        assert f"g{group} {score:.3f}" in text
    assert "8 of 16 experts open" in text
    assert "sum 2.5" in text
    assert "mask[groups] = 1" in text  # and not taken for markup


def test_the_line_on_topk_names_what_changes():
    config = v3(32, 4, 2, 4)
    trace = traced(config)
    for token in range(len(trace)):
        of_token = steps(trace, 0, token)
        versus, line = versus_topk(of_token), shown(steps_table(of_token, versus=True)).splitlines()[-1]
        if len(versus.only_topk):
            assert f"score lost {100 * versus.score_lost:.2f} %" in line
            assert all(f"e{e} (g{e // 8})" in line for e in versus.only_topk.tolist() + versus.only_here.tolist())
            assert f"groups {len(versus.groups_topk)} -> {len(versus.groups_here)}" in line
        else:
            assert line == "classic top-4 would take the same experts"


def test_a_forged_record_is_marked_in_the_table():
    trace = traced(v3(16, 4, 2, 4))
    forged = replace(trace, picks=trace.picks.flip(1), weights=trace.weights * 1.5)
    text = shown(steps_table(steps(forged, 0, 3)))
    assert text.count(STEPS_WORDS["en"]["disagrees"]) >= 2


def test_what_was_not_recorded_is_not_shown():
    trace = replace(traced(v3(16, 4, 2, 4)), logits=None, bias=None)
    text = shown(steps_table(steps(trace), versus=True))
    rows, note = text.split("logits were not recorded: ")
    assert rows.count("not recorded") == 12
    assert note.startswith("record with detail='scores' (--detail scores)\n")
    assert "classic top-4: no data" in note


def test_rank_changes_are_places_won_by_the_bias():
    scores, biased = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([0.6, 0.8, 0.7, 0.1])
    assert rank_changes(scores, biased) == [(0, -2), (1, 1), (2, 1)]
    assert rank_changes(scores, scores + 5) == []


def test_sparklines_reach_from_least_to_greatest():
    assert sparkline(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])) == "▁▂▃▄▅▆▇█"
    assert sparkline(torch.tensor([-torch.inf, 1.0, 2.0])) == " ▁█"
    assert sparkline(torch.full((3,), 2.0)) == "▁▁▁"
    assert sparkline(torch.full((2,), torch.nan)) == "  "
    assert sparkline(torch.tensor([3.0, 4.0]), low=0.0) == "▆█"
    assert len(sparkline(torch.randn(256))) == 16
    assert sparkline(torch.zeros(64).index_fill(0, torch.tensor([63]), 1.0))[-1] == "█"


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_load_table_keeps_every_verdict_and_number_at_any_width(lang, width):
    config = v3(32, 4, 2, 4)
    healthy, collapsed = traced(config, 200), torch.arange(4).repeat(200, 1)
    trace = Trace.from_routings(
        {"model.layers.1.mlp": healthy.layer(0), "model.layers.2.mlp": Routing(None, torch.ones(200, 4), collapsed)},
        config,
    )
    reports = layer_reports(trace)
    text = shown(load_table(reports, lang), width)
    assert "…" not in text
    squeezed = "".join(text.split())
    for index, report in enumerate(reports):
        assert f"{index}layers.{index + 1}" in squeezed
        assert f"{report.load.max()} / 25" in text
        cv = report.measures["cv"]
        assert f"{cv.value:.3f}".lstrip("0") in text
        assert f"({cv.band.low:.3f}–{cv.band.high:.3f})".replace("0.", ".") in text
    words = {"en": "collapsed", "zh": "坍缩"}[lang]
    assert words in text


def test_no_data_is_shown_as_no_data():
    config = v3(32, 4, 2, 4)
    none = Routing(torch.zeros(0, 32), torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))
    text = shown(load_table(layer_reports(Trace.from_routings({"a": none}, config))))
    assert "no data" in text
    assert "nan" not in text


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_preferences_are_listed_by_layer_and_domain(lang):
    config = v3(32, 4, 2, 4)
    labels = tuple(("诗", "a", "b", "[c]")[i % 4] for i in range(32))
    scores = torch.randn(2, 32, 50, 32)
    scores[0, 3::4, :, 7] += 3
    ids = scores.flatten(1, 2).topk(4).indices
    trace = Trace.from_routings(
        {f"model.layers.{i}.mlp": Routing(None, torch.ones(layer.shape), layer) for i, layer in enumerate(ids)},
        config, sequences=torch.arange(32).repeat_interleave(50), labels=labels,
    )  # fmt: skip
    found = domain_preference(trace)
    text = shown(preference_table(found, lang), 80)
    assert f"e7:{found.lift[0, 7]:.1f}x" in text
    assert "[c]" in text  # and not taken for markup
    assert "layers.0" in text
    assert "layers.1" in text
    assert WORDS[lang]["none"] in text
    assert "1000" in text
    less = {
        "en": "no expert found for 诗 (8 of 32 documents), a (8 of",
        "zh": "的专家：诗（32 个文档中的 8 个）、a（32",
    }
    assert less[lang].replace(" ", "") in "".join(text.split())


def test_layer_names_are_shortened_to_what_tells_them_apart():
    assert short_layer("model.layers.12.mlp") == "layers.12"
    assert short_layer("gate") == "gate"


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="lang='fr' is unknown: use 'zh' or 'en'"):
        steps_table(steps(traced(v3(16, 4, 2, 4))), "fr")
