"""Statistics of whole runs: numbers against loops, what is not known, words, HTML, and the collapse of a real model."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from cases import RULES, v3
from rich.console import Console

import moesaic as ms
from moesaic import rules
from moesaic.trace.chance.placement import distinct_places, place_experts, read_placement
from moesaic.trace.compare.diff_table import diff_table
from moesaic.trace.reroute.what_if_table import what_if_table
from moesaic.trace.rule.derive import derive
from moesaic.trace.shown import sparkline
from moesaic.trace.statistics.measures import MEANINGS, meaning
from moesaic.trace.statistics.per_token import margins_of, overlap_of
from moesaic.trace.statistics.stats import layer_report, stats
from moesaic.trace.statistics.tables import stats_tables
from moesaic.trace.statistics.verdict import STATUSES
from moesaic.trace.store import Trace
from moesaic.types import Routing

CONFIG = v3(32, 4, 2, 4)


def scored(config=CONFIG, n_tokens=300, n_layers=2, documents=1, **fields) -> Trace:
    """A trace with scores, weights and biases, routed by the rule."""
    routings, biases = {}, {}
    for layer in range(n_layers):
        bias = torch.randn(config.n_routed_experts) * 0.01 if config.has_correction_bias else None
        name = f"model.layers.{layer}.mlp"
        routings[name] = rules.route(torch.randn(n_tokens, config.n_routed_experts), bias, config)
        biases[name] = bias
    sequences = torch.arange(n_tokens) * documents // n_tokens
    return Trace.from_routings(routings, config, biases, sequences=sequences, **fields)


def shown(renderable, width=200) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# numbers


def test_nodes_are_counted_as_a_loop_counts_them():
    trace = scored()
    placement = torch.randint(0, 5, (32,)).tolist()
    run = stats(trace, placement=placement)
    for layer in range(2):
        counted = [len({placement[e] for e in row}) for row in trace.picks[layer].tolist()]
        assert run.values["nodes"][layer] == pytest.approx(np.mean(counted))
        assert run.layers[layer].measures["nodes"].band.low > 1
    by_group = stats(trace, nodes=4)
    assert by_group.values["nodes"] == pytest.approx(by_group.values["groups_reached"])
    assert by_group.low["nodes"] == pytest.approx(by_group.low["groups_reached"])
    assert "nodes" not in stats(trace).values


@pytest.mark.parametrize("n_places", [1, 3, 8, 9, 63, 64, 130])
def test_distinct_places_for_any_number_of_them(n_places):
    place = np.random.default_rng(n_places).integers(0, n_places, 130)
    place[0] = n_places - 1
    picks = np.random.default_rng(0).integers(0, 131, (200, 6))
    expected = [len({place[e] for e in row if e < 130}) for row in picks]
    assert distinct_places(picks, place).tolist() == expected
    assert distinct_places(picks[:0], place).tolist() == []


def test_placements_that_make_no_sense_are_refused(tmp_path):
    for given, message in (
        ({"nodes": 5}, "nodes=5 does not divide n_routed_experts=32: use a divisor"),
        ({"nodes": 0}, "nodes=0 does not divide"),
        ({"placement": [0, 1]}, r"placement has shape \[2\], not \[32\]"),
        ({"placement": [0.5] * 32}, "placement holds float64, not whole numbers"),
        ({"placement": [-1] * 32}, "placement has nodes -1 to -1: number them from 0"),
        ({"placement": [10**6] * 32}, "placement has nodes 1000000 to 1000000"),
        ({"placement": [0] * 32, "nodes": 4}, "nodes and placement are both given"),
    ):
        with pytest.raises(ValueError, match=message):
            place_experts(32, **given)
    file = tmp_path / "placement.json"
    for content, message in (
        ("[true]", "not a list of whole numbers"),
        ("[[0]]", "not a list of whole numbers"),
        ("[0, 1", r"placement.json is not JSON, or cut short \(JSONDecodeError\): give the node of every expert"),
        ("[" * 100_000, r"is not JSON, or cut short \(RecursionError\): give the node"),
        ("[" + "1" * 5000 + "]", "holds a number that is too long: give the node"),
        ("[99999999999999999999]", "beyond 2"),
        ("[0, 1]", r"placement has shape \[2\]"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_placement(str(file), 32)
        with pytest.raises(ValueError, match=message.replace("placement.json", "--placement")):
            read_placement(content, 32)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"placement\.json: not a list of whole numbers"):
        read_placement(str(file), 32)
    with pytest.raises(ValueError, match=r"none\.json: cannot be read .*: give the node of every expert, .*or a file"):
        read_placement(str(tmp_path / "none.json"), 32)
    file.write_text(json.dumps([0, 1] * 16))
    for given in (str(file), file.read_text()):
        assert read_placement(given, 32).tolist() == [0, 1] * 16


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0, 32.0])
def test_what_a_capacity_drops_is_what_a_loop_drops(factor):
    trace = scored(n_tokens=301)
    run = stats(trace, capacity=[factor])
    for layer in range(2):
        room = dict.fromkeys(range(32), math.ceil(factor * 301 * 4 / 32))
        dropped = 0
        for expert in trace.picks[layer].flatten().tolist():
            dropped += room[expert] == 0
            room[expert] -= room[expert] > 0
        assert run.values[f"dropped_at_{factor:g}"][layer] == pytest.approx(dropped / (301 * 4))
    measure = run.layers[0].measures[f"dropped_at_{factor:g}"]
    assert measure.band.low - 1e-4 <= measure.band.mean <= measure.band.limit
    if factor == 0.5:
        assert measure.value == pytest.approx(0.5, abs=0.01)


def test_a_capacity_for_all_and_more_drops_nothing():
    run = stats(scored(n_tokens=301), capacity=[1e307])
    assert run.values["dropped_at_1e+307"].tolist() == [0, 0]


@pytest.mark.parametrize("config", [CONFIG, v3(16, 1, 1, 3, topk_method="greedy", scoring_func="softmax")])
def test_margins_are_the_lead_of_the_last_chosen_over_the_best_left(config):
    trace = scored(config)
    for layer in range(2):
        leads = []
        for token in range(len(trace)):
            scores = rules.score(trace.logits[layer, token][None], config)[0]
            scores = scores if trace.bias is None else scores + trace.bias[layer]
            chosen = set(trace.picks[layer, token].tolist())
            size, kept = config.experts_per_group, range(config.n_group)
            if config.n_group > 1:
                best_two = scores.view(config.n_group, size).topk(2).values.sum(-1)
                kept = best_two.topk(config.topk_group).indices.tolist()
            left = [e for e in range(config.n_routed_experts) if e // size in kept and e not in chosen]
            leads.append(float(min(scores[e] for e in chosen)) - float(max(scores[e] for e in left)))
        measure = layer_report(trace, layer).measures["margin"]
        assert measure.value == pytest.approx(np.median(leads), rel=1e-4)
        assert measure.kind == "sample"
        assert measure.band.low < measure.value < measure.band.high


@pytest.mark.parametrize("rule", ["V3", "softmax", "zero mask", "softmax after"])
def test_overlap_and_margin_are_those_of_ranked_scores_where_scores_tie_too(rule):
    config = v3(32, 4, 2, 4, **RULES[rule])
    logits, bias = torch.randint(-3, 4, (200, 32)) / 2.0, torch.zeros(32)  # seven values: most tokens have a tie
    logits[0, 3], logits[1, 5], logits[2] = torch.nan, torch.inf, torch.nan
    trace = Trace.from_routings({"a": rules.route(logits, bias, config)}, config, {"a": bias})
    trace.picks[0, 4, 1], trace.picks[0, 5] = 32, 32
    scores = rules.score(logits, config)
    plain = rules.largest(scores, 4)
    assert overlap_of(trace, 0).tolist() == [
        len(set(a) & set(b)) for a, b in zip(trace.picks[0].tolist(), plain.tolist(), strict=True)
    ]
    masked = derive(logits, bias, config, plain)["masked"].topk(5).values.double()
    assert np.array_equal(margins_of(trace, 0), (masked[:, 3] - masked[:, 4]).numpy(), equal_nan=True)


def test_a_margin_is_no_data_where_it_cannot_be_known():
    trace = scored()
    unknown = tuple(dataclasses.replace(c, topk_method="unknown", n_group=1, topk_group=1) for c in trace.configs)
    cases = {
        "picks only": dataclasses.replace(trace, logits=None),
        "bias not recorded": dataclasses.replace(trace, bias=None),
        "rule not known": dataclasses.replace(trace, configs=unknown),
        "another rule chose": dataclasses.replace(trace, picks=trace.picks.roll(1, 1)),
        "nobody left": scored(v3(8, 4, 1, 2)),
    }
    for why, case in cases.items():
        assert math.isnan(layer_report(case).measures["margin"].value), why
        assert stats(case).to_dict()["layers"][0]["measures"]["margin"] == {"value": None, "band": None}, why
    assert not math.isnan(layer_report(trace).measures["margin"].value)


def test_weight_entropy_is_that_of_each_tokens_shares():
    trace = scored()
    share = trace.weights[0].double() / trace.weights[0].double().sum(-1, keepdim=True)
    expected = -(share * share.log()).sum(-1).mean() / math.log(4)
    assert layer_report(trace).measures["weight_entropy"].value == pytest.approx(float(expected), rel=1e-5)
    even = dataclasses.replace(trace, weights=torch.full_like(trace.weights, 0.25))
    assert layer_report(even).measures["weight_entropy"].value == pytest.approx(1.0)
    none = dataclasses.replace(trace, weights=None, logits=None)
    assert math.isnan(stats(none).values["weight_entropy"][0])
    broken = trace.weights.clone()
    broken[0, :150] = torch.nan
    assert 0 < layer_report(dataclasses.replace(trace, weights=broken)).measures["weight_entropy"].value < 1


def test_slots_without_an_expert_are_said_and_counted_nowhere_else():
    trace = scored(n_tokens=400)
    picks, weights = trace.picks.clone(), trace.weights.clone()
    picks[0, :100], picks[0, 100:200, 3] = 32, 32
    weights[0, 100:200, 3] = 99.0  # to be ignored
    ragged = dataclasses.replace(trace, picks=picks, weights=weights)
    report = layer_report(ragged)
    assert report.n_tokens == 300
    assert report.measures["no_expert"].value == pytest.approx(500 / 1600)
    counted = [len({e // 8 for e in row if e < 32}) for row in picks[0, 100:].tolist()]
    assert report.measures["groups_reached"].value == pytest.approx(np.mean(counted))
    real = torch.where(picks[0, 100:] < 32, weights[0, 100:], 0.0).double()
    share = real / real.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1).mean() / math.log(4)
    assert report.measures["weight_entropy"].value == pytest.approx(float(entropy), rel=1e-5)
    assert report.status == "chance"
    assert report.load.sum() == 1100


def test_a_rule_that_keeps_fewer_groups_than_are_reached_is_seen():
    trace = scored()
    wide = dataclasses.replace(trace, picks=torch.tensor([0, 8, 16, 24]).repeat(2, 300, 1).to(torch.int16))
    assert stats(wide).values["over_limit"].tolist() == [1.0, 1.0]
    assert stats(trace).values["over_limit"].tolist() == [0.0, 0.0]
    assert stats(trace).values["groups_kept"].tolist() == [2.0, 2.0]
    wide.picks[:, ::2] = 32  # tokens without an expert reach none
    assert stats(wide).values["over_limit"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["unknown", "balanced", "greedy"])
def test_a_layer_without_a_known_rule_is_judged_as_k_of_e(method):
    config = dataclasses.replace(CONFIG, topk_method=method, n_group=1, topk_group=1)
    picks = torch.rand(1, 500, 32).topk(4).indices.to(torch.int16)
    run = stats(Trace(picks=picks, layers=("a",), configs=(config,), sequences=torch.zeros(500, dtype=torch.int64)))
    assert run.status == "chance"
    assert {"overlap", "groups_reached"}.isdisjoint(run.values)


def test_the_report_of_a_layer_is_that_of_the_run():
    trace = scored(documents=30)
    one, run = layer_report(trace, 1), stats(trace).layers[1]
    assert one.measures == run.measures
    assert (one.status, one.p_value, one.verdict()) == (run.status, run.p_value, run.verdict())


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.0), ("alpha", 1.0), ("capacity", [0.0]), ("capacity", [math.nan])]
)
def test_arguments_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        stats(scored(n_tokens=10), **{name: value})


# what is not there


def test_layers_without_data_and_missing_layers_are_said():
    trace = dataclasses.replace(scored(n_tokens=400), missing=("model.layers.9.mlp", "evil\x1b[31m.layers.7"))
    run = stats(trace)
    assert (run.status, run.is_healthy, run.is_sick) == ("partly", False, False)
    assert "2 of 4 layers without data, so nothing is said of them: layers.9, layers.7" in run.verdict("en")
    assert "4 层中有 2 层没有数据，对其不作判断：layers.9、layers.7" in run.verdict("zh")
    for text in (shown(stats_tables(run, "en")), shown(stats_tables(run, "zh")), run._repr_html_(), run.verdict()):
        assert "layers.9" in text
        assert "\x1b" not in text
    picks = trace.picks.clone()
    picks[1] = 32
    run = stats(dataclasses.replace(trace, picks=picks, missing=()))
    assert run.status == "partly"
    assert run.layers[1].status == "no_data"
    assert "1 of 2 layers without data" in run.verdict()
    assert math.isnan(run.values["cv"][1])
    assert "nan" not in shown(stats_tables(run)) + run._repr_html_() + json.dumps(run.to_dict(), allow_nan=False)


@pytest.mark.parametrize("n_layers", [0, 2])
def test_nothing_recorded_is_no_data_and_never_healthy(n_layers):
    trace = Trace(
        picks=torch.zeros(n_layers, 0, 4, dtype=torch.int16),
        layers=tuple("ab"[:n_layers]),
        configs=(CONFIG,) * n_layers,
        missing=("c",),
    )
    run = stats(trace)
    assert (run.status, run.is_healthy) == ("no_data", False)
    assert run.verdict("en").startswith("Nothing can be said: no layer has data.")
    assert run.verdict("zh").startswith("无法下结论：没有任何一层有数据。")
    assert "healthy" not in run._repr_html_()
    json.dumps(run.to_dict(), allow_nan=False)
    assert "c" in shown(stats_tables(run))


def test_too_few_tokens_are_no_ground_for_a_verdict():
    run = stats(scored(n_tokens=20))
    assert (run.status, run.is_healthy) == ("too_few", False)
    assert "too few tokens to judge (it takes 8 assignments per expert)" in run.verdict()
    assert run.layers[0].hot == run.layers[0].dead == ()


def test_too_few_documents_of_alike_tokens_are_no_ground_either():
    trace = scored(v3(64, 8, 4, 4), n_tokens=24)
    alike = trace.select(torch.arange(24).repeat_interleave(50))
    run = stats(dataclasses.replace(alike, sequences=torch.arange(24).repeat_interleave(50)))
    assert run.status == "too_few"
    assert run.layers[0].verdict() == "too few documents to judge: their tokens count as 24"
    assert run.verdict() == (
        "All 2 layers have too few documents to judge (their tokens are alike and count as fewer; read more "
        "documents): layers.0, layers.1."
    )
    assert run.verdict("zh").startswith("全部 2 层文档都太少，无法判断（同一文档的 token 彼此相像")


def test_too_few_tokens_and_too_few_documents_are_told_apart_in_one_run():
    trace = scored(v3(64, 8, 4, 4), n_tokens=24)
    alike = trace.select(torch.arange(24).repeat_interleave(50))
    picks = alike.picks.clone()
    picks[1, 100:] = 64  # the id for "no expert"
    both = dataclasses.replace(
        alike, picks=picks, weights=None, logits=None, bias=None, sequences=torch.arange(24).repeat_interleave(50)
    )
    tokens, documents = stats(both).verdict().splitlines()
    assert tokens == "1 of 2 layers with too few tokens to judge (it takes 8 assignments per expert): layers.1."
    assert documents.startswith("1 of 2 layers with too few documents to judge (their tokens are alike")
    assert documents.endswith(": layers.0.")


# how it is shown


class Parts(HTMLParser):
    """Tags and attribute names of a piece of HTML, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("br", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_self_contained_escaped_and_says_the_verdict():
    trace = scored(n_tokens=400)
    evil = dataclasses.replace(
        trace, model="<script>alert(1)</script>", layers=("<img src=x onerror=alert(1)>", 'a" onclick="x\u202e')
    )
    html = stats(evil, nodes=4)._repr_html_()
    parts = Parts(html)
    assert parts.open == []
    assert parts.tags <= {"div", "details", "summary", "b", "br", "table", "thead", "tbody", "tr", "th", "td", "span",
                          "svg", "rect", "line"}  # fmt: skip
    assert not any(name.startswith("on") or name in ("src", "href") for name in parts.attributes)
    assert not re.search(r"https?:|url\(|<script|<img|\u202e", html)
    assert "within chance" in html
    assert "在随机范围内" in html


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_tables_hold_every_number_with_its_meaning(lang):
    run = stats(scored(n_tokens=400), nodes=4)
    text = shown(stats_tables(run, lang))
    for name in run.values:
        assert name in text
        assert meaning(name, lang)[:12] in text
    for report in run.layers:
        assert report.verdict(lang) in text
    with pytest.raises(ValueError, match="lang='fr' is unknown: use 'zh' or 'en'"):
        stats_tables(run, "fr")


def test_every_measure_has_a_meaning_in_both_languages():
    run = stats(scored(n_tokens=400), nodes=4)
    assert {name.partition("_at_")[0] for name in run.values} == set(MEANINGS)
    assert all(set(words) == {"en", "zh"} for words in MEANINGS.values())


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_picks_that_were_not_read_at_the_experts_are_said_wherever_the_verdict_is(lang):
    trace = dataclasses.replace(scored(n_tokens=400), origins=("experts", "router"))
    run = stats(trace)
    note = {
        "en": "The picks of layers.1 were read at the router's output, not at the experts.",
        "zh": "layers.1 的选择取自路由器的输出，不是在专家处读到的。",
    }[lang]
    assert run.verdict(lang).splitlines()[-1] == note
    assert run.to_dict()["verdict"][lang][-1] == note
    assert run.to_dict()["notes"][lang] == [note]
    assert [layer["origin"] for layer in run.to_dict()["layers"]] == ["experts", "router"]
    assert note.replace("'", "&#x27;") in run._repr_html_()
    everywhere = stats(dataclasses.replace(trace, origins=("derived", "derived"))).verdict(lang)
    assert {"en": "The picks of all layers were derived from scores", "zh": "所有层的选择是按规则"}[lang] in everywhere
    assert "picks" not in stats(scored(n_tokens=400)).verdict()


def test_a_run_in_the_console_is_its_verdict_and_a_hint():
    run = stats(scored(n_tokens=400))
    assert repr(run) == run.verdict() + "\n(more: .layers, .values, .load, .to_dict(), .verdict('zh'))"
    assert repr(run.layers[0]) == "LayerReport(layers.0: within chance; see .load, .measures, .hot, .starved, .dead)"


def test_what_is_printed_by_rich_is_the_verdict_and_the_tables_with_the_load_of_every_expert():
    run = stats(dataclasses.replace(scored(n_tokens=400), missing=("model.layers.9.mlp",)))
    for text in (shown(run, 80), run._repr_html_(), shown(run.table("zh"), 80)):
        assert all(sparkline(torch.from_numpy(report.load), low=0.0) in text for report in run.layers)
    assert shown(run).startswith(run.verdict())


def test_a_language_without_words_is_refused():
    run = stats(scored(n_tokens=400))
    for ask in (run.verdict, run.layers[0].verdict, lambda lang: meaning("cv", lang)):
        with pytest.raises(ValueError, match="lang='fr' is unknown: use 'zh' or 'en'"):
            ask("fr")


@pytest.mark.parametrize(("n_tokens", "en", "zh"), [
    (400, "The one layer is within chance: no expert", "仅有的一层在随机范围内："),
    (20, "The one layer has too few tokens to judge (it takes 8",
     "仅有的一层 token 太少，无法判断（平均每个专家需要 8 次分配"),
])  # fmt: skip
def test_a_single_layer_is_spoken_of_in_the_singular(n_tokens, en, zh):
    trace = scored(n_tokens=n_tokens)
    one = dataclasses.replace(
        trace,
        picks=trace.picks[:1], weights=None, logits=None, bias=None, layers=trace.layers[:1],
        configs=trace.configs[:1], origins=("experts",),
    )  # fmt: skip
    assert stats(one).verdict("en").startswith(en)
    assert stats(one).verdict("zh").startswith(zh)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_layer_without_a_name_is_the_layer_and_never_nothing(lang):
    config = ms.MoEConfig(hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2)
    layer = ms.MoE(config)
    layer.gate.e_score_correction_bias[0] = 0.1

    def recorded(n_tokens):
        with ms.record(layer, detail="scores") as rec, torch.no_grad():
            layer(torch.randn(n_tokens, 16))
        return rec.trace

    trace, word = recorded(2000), {"en": "the layer", "zh": "该层"}[lang]
    run = stats(trace)
    assert run.is_sick
    said = {"en": "The one layer is imbalanced: e0 at ", "zh": "仅有的一层不均衡：e0 为均值的 "}[lang]
    assert run.verdict(lang).startswith(said)
    few = stats(recorded(9)).verdict(lang)
    assert {"en": "per expert): the layer.", "zh": "次分配）：该层。"}[lang] in few
    tables = [stats_tables(run, lang), diff_table(ms.diff(trace, trace), lang), what_if_table(ms.what_if(trace), lang)]
    for table in tables:
        assert word in shown(table)
    assert word in ms.steps(trace)._repr_html_()
    assert repr(run.layers[0]).startswith("LayerReport(the layer: imbalanced")


GOOD = scored(n_tokens=40)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: ms.stats("run.safetensors"),
            "trace='run.safetensors' is no trace: give a Trace, such as",
        ),
        (
            lambda: ms.steps("run.safetensors"),
            "source='run.safetensors' is no trace: give a Trace, such as",
        ),
        (lambda: ms.what_if(None), "trace=None is no trace: give a Trace"),
        (lambda: ms.diff("a", "b"), "a='a' is no trace: give a Trace, such as ms.load(path)"),
        (lambda: ms.diff(GOOD, "b"), "b='b' is no trace: give a Trace, such as ms.load(path)"),
        (lambda: ms.diff(GOOD, GOOD, precision=16), "dtype 16 is not one of torch: use float32"),
        (lambda: ms.steps(GOOD, layer="a"), "layer='a' is not in the trace: it has layers 0 to 1, layers.0, layers.1"),
        (lambda: ms.steps(GOOD, token=1.5), "token=1.5 is no whole number: use 0, say"),
        (lambda: ms.stats(GOOD, capacity="a"), "capacity='a' is no number: use 1.25, say"),
        (lambda: ms.stats(GOOD, capacity=[1.0, None]), "capacity=None is no number: use 1.25, say"),
        (lambda: ms.stats(GOOD, alpha="a"), "alpha='a' is no number: use 0.05, say"),
        (lambda: ms.stats(GOOD, seed=1.5), "seed=1.5 is no whole number: use 0, say"),
        (lambda: ms.stats(GOOD, seed=-3), "seed=-3 must lie between 0 and 2^32 - 1: use 0, say"),
        (lambda: ms.stats(GOOD, nodes="a"), "nodes='a' is no whole number: use 8, say"),
    ],
)
def test_a_wrong_type_is_refused_in_one_line_with_a_way_out(ask, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refused:
        ask()
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_and_torch_are_numbers():
    same = stats(GOOD, capacity=np.array([1.25]), seed=np.int64(3), alpha=np.float32(0.05)).to_dict()
    assert same["seed"] == 3
    assert ms.steps(GOOD, layer=np.int64(1), token=torch.tensor(2)).token == 2


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_what_holds_for_all_layers_is_said_of_all(lang):
    few = {"en": "All 2 layers have too few tokens to judge (it takes", "zh": "全部 2 层 token 都太少，无法判断（"}[
        lang
    ]
    assert stats(scored(n_tokens=20)).verdict(lang).startswith(few)
    fine = {"en": "All 2 layers are within chance: no expert", "zh": "全部 2 层都在随机范围内：没有哪个专家"}[lang]
    assert stats(scored(n_tokens=400)).verdict(lang).startswith(fine)
    trace = scored(n_tokens=400)
    flat = dataclasses.replace(trace, picks=torch.arange(4, dtype=trace.picks.dtype).expand(2, 400, 4).clone(),
                               weights=None, logits=None, bias=None)  # fmt: skip
    sick = {"en": "All 2 layers collapsed: layers.0", "zh": "全部 2 层都坍缩：layers.0"}[lang]
    assert stats(flat).verdict(lang).startswith(sick)


def test_a_layer_of_one_expert_is_spoken_of_in_the_singular():
    layer = ms.MoE(ms.MoEConfig(hidden_size=8, moe_intermediate_size=8, n_routed_experts=1, num_experts_per_tok=1))
    with ms.record(layer) as rec, torch.no_grad():
        layer(torch.randn(4, 8))
    assert "e0 of 1 expert\n" in repr(ms.steps(rec.trace))


def test_layers_of_one_short_name_are_told_apart():
    run = stats(dataclasses.replace(scored(n_tokens=400), layers=("encoder.block.1.mlp", "decoder.block.1.mlp")))
    for text in (shown(stats_tables(run)), run._repr_html_()):
        assert "encoder.block.1.mlp" in text
        assert "decoder.block.1.mlp" in text


def test_one_capacity_factor_is_as_good_as_a_list_of_one():
    trace = scored(n_tokens=400)
    one, many = stats(trace, capacity=1.5), stats(trace, capacity=[1.5])
    assert one.values["dropped_at_1.5"].tolist() == many.values["dropped_at_1.5"].tolist()
    assert [name for name in one.values if name.startswith("dropped")] == ["dropped_at_1.5"]
    assert "dropped_at_2" in stats(trace, capacity=2).values
    with pytest.raises(ValueError, match=r"^capacity=-1.0 must be a positive number"):
        stats(trace, capacity=-1.0)


def test_whoever_waits_hears_of_every_layer():
    heard = []
    stats(scored(n_tokens=50), done=heard.append)
    assert heard == [1, 1]


def test_the_dictionary_is_strict_json_and_complete():
    run = stats(scored(n_tokens=400, documents=40), nodes=4)
    read = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert read["status"] in STATUSES
    assert [layer["load"] for layer in read["layers"]] == run.load.tolist()
    assert set(read["layers"][0]["measures"]) == set(run.values) == set(read["overall"]) == set(read["meanings"])
    for name, about in read["overall"].items():
        if about is not None:
            assert about["median"] == pytest.approx(float(np.nanmedian(run.values[name])))


# the collapse of ecosystem's first finding


@pytest.fixture(scope="module")
def collapsed() -> Trace:
    """A tiny DeepSeek-V3 of transformers whose first layer is forced onto four experts by its correction bias."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16, "vocab_size": 64}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    routing = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **routing, **layers)).eval()
    model.model.layers[0].mlp.gate.e_score_correction_bias[:4] = 50
    with ms.record(model, detail="scores") as recorder, torch.no_grad():
        model(torch.randint(0, 64, (1, 128)))
    return recorder.trace


def test_the_collapse_that_other_tools_miss_is_called_by_its_name(collapsed):
    run = stats(collapsed)
    assert run.load[0].tolist() == [128] * 4 + [0] * 12
    assert run.status == run.layers[0].status == "collapsed"
    assert run.is_sick
    assert "layers.0 collapsed onto 4 of 16 experts (all load sits on e0 e1 e2 e3)" in run.verdict("en")
    assert "layers.0：16 个专家中只有 4 个在工作（全部负载落在 e0 e1 e2 e3 上）" in run.verdict("zh")
    assert "about this text" in run.verdict("en")
    assert run.layers[0].dead == tuple(range(4, 16))
    assert run.layers[0].hot == (0, 1, 2, 3)
    assert run.layers[0].measures["carriers"].value == 4
    assert "collapsed onto 4 of 16 experts" in run._repr_html_()
    assert run.layers[1].status != "collapsed"


@pytest.mark.parametrize("n_documents", [1, 2, 4, 8, 64])
def test_a_collapse_is_seen_in_any_number_of_documents(collapsed, n_documents):
    split = dataclasses.replace(collapsed, sequences=torch.arange(128) * n_documents // 128)
    assert stats(split).layers[0].verdict() == "collapsed onto 4 of 16 experts"


def test_a_trace_from_routings_without_scores_is_judged_too():
    ids = torch.arange(4).repeat(128, 1)
    trace = Trace.from_routings({"moe": Routing(None, torch.ones(128, 4), ids)}, v3(16, 4, 2, 4))
    assert stats(trace).verdict("en").startswith("The one layer is collapsed: moe collapsed onto 4 of 16 experts")
    assert stats(trace).verdict("zh").startswith("仅有的一层坍缩：moe：16 个专家中只有 4 个在工作")
