"""Recorded scores routed again by another rule, judged by a gate in plain Python."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from cases import GRID, configs, v3
from hf_models import FAMILIES, tiny, token_ids
from hypothesis import given
from hypothesis import strategies as st
from oracles import route_one
from rich.console import Console
from traces import assert_equal, check_layer

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.trace.file.reader import load
from moesaic.trace.recording.record import record
from moesaic.trace.reroute.what_if import what_if
from moesaic.trace.reroute.what_if_table import what_if_table
from moesaic.trace.rule.steps import steps
from moesaic.trace.statistics.stats import layer_reports
from moesaic.trace.store import Trace
from moesaic.types import Routing

CONFIG = v3(16, 4, 2, 4)


def traced(config=CONFIG, n_tokens=60, layers=2, scale=0.1, seed=0, **fields) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    routings, biases = {}, {}
    for layer in range(layers):
        logits = torch.randn(n_tokens, config.n_routed_experts, generator=generator)
        bias = torch.randn(config.n_routed_experts, generator=generator) * scale if config.has_correction_bias else None
        name = f"model.layers.{layer}.mlp"
        routings[name], biases[name] = route(logits, bias, config), bias
    return Trace.from_routings(routings, config, biases, **fields)


def by_hand(logits, bias, config, dropped=()) -> list[dict[int, float]]:
    """{expert: weight} of every token, by the gate in plain Python; a dropped expert has a bias of minus infinity."""
    counted = {"top2_sum": 2, "max": 1, "k_over_m_sum": config.num_experts_per_tok // config.topk_group}
    bias = [-math.inf if e in dropped else b for e, b in enumerate(bias.tolist())]
    return [
        route_one(
            row.tolist(), bias, k=config.num_experts_per_tok, n_group=config.n_group, topk_group=config.topk_group,
            counted=counted[config.group_score_rule], scale=config.routed_scaling_factor, norm=config.norm_topk_prob,
        )
        for row in logits.sigmoid()
    ]  # fmt: skip


def agrees_with(found, config, bias=None, dropped=()):
    """Experts, weights, flips and score lost of a WhatIf are those of the gate in plain Python."""
    before = found.before
    for layer in range(before.n_layers):
        used = before.bias[layer] if bias is None else bias[layer]
        expected = by_hand(before.logits[layer], used, config, dropped)
        had = [set(row) for row in before.picks[layer].tolist()]
        lost = [0.0, 0.0]
        for token, wanted in enumerate(expected):
            ids, weights = found.trace.picks[layer, token].tolist(), found.trace.weights[layer, token].tolist()
            assert set(ids) == set(wanted)
            for expert, weight in zip(ids, weights, strict=True):
                assert weight == pytest.approx(wanted[expert], rel=1e-5)
            scores = before.logits[layer, token].sigmoid().tolist()
            assert bool(found.flipped[layer, token]) == (had[token] != set(wanted))
            lost[0] += sum(scores[e] for e in had[token])
            lost[1] += sum(scores[e] for e in wanted)
        assert float(found.score_lost[layer]) == pytest.approx(1 - lost[1] / lost[0], abs=1e-6)


@given(configs(), st.integers(0, 99))
def test_unchanged_settings_give_the_record(config, seed):
    trace = traced(config, seed=seed)
    found = what_if(trace)
    assert torch.equal(found.trace.picks, trace.picks)
    assert torch.equal(found.trace.weights, trace.weights)
    assert not found.flipped.any()
    assert found.score_lost.tolist() == [0.0, 0.0]
    assert found.changes == {}
    assert found.to_dict()["reproduced"]


@pytest.mark.parametrize(
    "asked",
    [
        {"k": 2}, {"k": 7}, {"topk_group": 1}, {"topk_group": 4}, {"n_group": 1}, {"n_group": 2, "topk_group": 1},
        {"group_score": "max"}, {"k": 6, "group_score": "k_over_m_sum"},
        {"k": 2, "topk_group": 1, "group_score": "max"},
    ],
    ids=str,
)  # fmt: skip
def test_another_rule_gives_what_the_gate_in_plain_python_gives(asked):
    found = what_if(traced(), **asked)
    fields = {"num_experts_per_tok" if name == "k" else name: value for name, value in asked.items()}
    fields |= {"topk_group": 1} if asked.get("n_group") == 1 else {}
    config = replace(CONFIG, **fields)
    assert found.trace.configs == (config, config)
    agrees_with(found, config)
    assert found.flipped.any()
    assert found.changes == asked


@pytest.mark.parametrize("sizes", GRID)
def test_every_size_can_be_asked(sizes):
    config = v3(*sizes)
    found = what_if(traced(config, 20, 1), bias=False)
    agrees_with(found, config, torch.zeros(1, config.n_routed_experts))


def test_biases_are_left_out_replaced_or_shifted():
    trace = traced(scale=0.3)
    agrees_with(found := what_if(trace, bias=False), CONFIG, torch.zeros(2, 16))
    assert found.changes == {"bias": False}
    assert float(found.score_lost.sum()) < 0  # without the bias the better scores win
    other = torch.randn(2, 16)
    agrees_with(what_if(trace, bias=other), CONFIG, other)
    agrees_with(what_if(trace, bias=other[0]), CONFIG, other[:1].expand(2, 16))
    shifted = trace.bias.clone()
    shifted[:, 3] += 0.2
    shifted[:, 5] -= 0.3
    agrees_with(what_if(trace, bias={3: 0.2, 5: -0.3}), CONFIG, shifted)
    shifted = trace.bias.clone()
    shifted[:, 3] += 5.0
    found = what_if(trace, bias={3: 5.0})
    agrees_with(found, CONFIG, shifted)
    assert (found.trace.picks == 3).any(-1).all()
    assert found.changes == {"bias": {"3": 5.0}}


@pytest.mark.parametrize("dropped", [[3], [0, 1, 2], [0, 5, 10, 15], [0, 1, 2, 3]])
def test_dropped_experts_are_never_chosen(dropped):
    found = what_if(traced(), drop_experts=dropped)
    assert not torch.isin(found.trace.picks.long(), torch.tensor(dropped)).any()
    agrees_with(found, CONFIG, dropped=dropped)
    assert all(check_layer(found.trace, layer).experts.all() for layer in range(2))


def test_the_old_mask_does_not_bring_dropped_experts_back():
    trace = traced(replace(CONFIG, group_mask="zero"), 200)
    below = replace(trace, bias=trace.bias - 2.0)
    picks = torch.stack(
        [route(z, b, trace.configs[0]).expert_ids for z, b in zip(below.logits, below.bias, strict=True)]
    )
    below = replace(below, picks=picks.short(), weights=None)
    assert (picks == 0).any()
    found = what_if(below, drop_experts=[0])
    assert not (found.trace.picks == 0).any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop_experts": range(13)}, "too few experts are left for num_experts_per_tok=4: 60 tokens of layer 'model"),
        ({"drop_experts": [0, 1, 2, 4, 5, 6, 8, 9, 10], "group_score": "max"}, "as few as 2 experts in their groups"),
        ({"k": 9}, "num_experts_per_tok=9 exceeds the 8 experts of topk_group=2 groups"),
        ({"k": 0}, "num_experts_per_tok=0 must be at least 1"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ({"n_group": 3}, "n_routed_experts=16 is not a multiple of n_group=3"),
        ({"group_score": "mean"}, "group_score='mean' is unknown"),
        ({"drop_experts": [16]}, "^expert 16 is not there: use 0 to 15"),
        ({"bias": {-1: 0.5}}, "^expert -1 is not there: use 0 to 15"),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\]: give \[E\] = \[16\] or \[L, E\] = \[2, 16\]"),
        ({"bias": torch.full((16,), torch.nan)}, "bias holds NaN"),
        ({"bias": torch.full((16,), torch.inf)}, "bias holds NaN or infinity: give numbers, or -inf"),
        ({"bias": {3: math.inf}}, r"bias={3: inf} is not finite: give a number, or drop_experts \(--drop\)"),
        ({"bias": {3: -1e39}}, r"bias={3: -1e\+39} is not finite"),
        ({"bias": True}, "bias=True is not understood"),
        ({"placement": [0, 1]}, r"placement has shape \[2\], not \[16\]: give the node of every expert"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_in_one_line(asked, message):
    with pytest.raises(ValueError, match=message) as raised:
        what_if(traced(), **asked)
    assert "\n" not in str(raised.value)


def test_a_record_of_another_rule_is_refused_unless_forced():
    trace = replace(traced(), configs=(replace(CONFIG, topk_group=1),) * 2)
    with pytest.raises(ValueError, match=r"do not give the recorded picks of .* the recorded rule is not this one"):
        what_if(trace, k=2)
    found = what_if(trace, k=2, anyway=True)
    assert found.astray.tolist() != [0, 0]
    assert not found.to_dict()["reproduced"]
    assert found.sentences()[1].startswith("careful: the recorded rule does not give the recorded experts")
    assert found.sentences("zh")[1].startswith("注意：按记录的规则推不出")


def test_what_cannot_be_derived_is_refused_with_the_reason():
    trace = traced()
    foreign = MoEConfig(hidden_size=8, n_routed_experts=16, num_experts_per_tok=4, topk_method="unknown")
    for wrong, message in (
        (replace(trace, configs=(CONFIG, foreign)), "'model.layers.1.mlp': the rule of this layer is not known"),
        (replace(trace, logits=None, bias=None), "logits were not recorded"),
        (replace(trace, bias=None), "the correction bias was not recorded"),
        (traced(replace(CONFIG, topk_method="balanced")), "deals experts out in turn"),
        (traced(MoEConfig.preset("mixtral", hidden_size=8)), "this trace has no correction bias"),
    ):
        with pytest.raises(ValueError, match=message):
            what_if(wrong, bias=False)


def test_exact_ties_are_counted_and_are_no_flips():
    config = v3(8, 1, 1, 2)
    logits = torch.randn(1, 30, 8).sort(-1, descending=True).values
    logits[0, :10, 2] = logits[0, :10, 1]
    routing = route(logits[0], torch.zeros(8), config)
    ids = routing.expert_ids.clone()
    ids[:10] = torch.tensor([2, 0])  # another machine's order of the tie
    trace = Trace.from_routings({"a": Routing(logits[0], routing.weights, ids)}, config, {"a": torch.zeros(8)})
    found = what_if(trace)
    assert (found.ties.tolist(), found.astray.tolist()) == ([10], [0])
    assert not found.flipped.any()
    assert torch.equal(found.trace.picks, trace.picks)
    assert "in 10 of them by exact ties" in found.sentences()[1]
    found = what_if(trace, bias={0: -5.0})
    assert found.flipped.all()


def test_tokens_without_experts_stay_without_and_partly_missing_ones_are_refused():
    trace = traced()
    picks = trace.picks.clone()
    picks[:, 5] = 16
    found = what_if(replace(trace, picks=picks), k=3)
    assert found.kept == 2
    assert (found.trace.picks[:, 5] == 16).all()
    assert not found.flipped[:, 5].any()
    assert found.trace.weights[:, 5].eq(0).all()
    picks[0, 6, 2] = 16
    with pytest.raises(ValueError, match="such as token 6: experts are missing there"):
        what_if(replace(trace, picks=picks), k=3)


def test_groups_can_be_given_to_a_model_that_has_none_and_experts_dropped_from_it():
    config = MoEConfig.preset("qwen3-moe", hidden_size=8, n_routed_experts=16, num_experts_per_tok=4)
    trace = traced(config)
    found = what_if(trace, n_group=4, topk_group=2)
    assert found.trace.configs[0].topk_method == "group_limited_greedy"
    groups = [len({e // 4 for e in row}) for row in found.trace.picks[0].tolist()]
    assert max(groups) <= 2
    assert found.by_layer()[0]["groups"][1] == pytest.approx(sum(groups) / len(groups))
    found = what_if(trace, drop_experts=[7])
    best = torch.stack([z.index_fill(-1, torch.tensor([7]), -torch.inf).topk(4).indices for z in trace.logits])
    assert torch.equal(found.trace.picks.long().sort(-1).values, best.sort(-1).values)
    assert all(check_layer(found.trace, layer).experts.all() for layer in range(2))


def test_loads_nodes_and_assignments_are_those_of_the_two_traces():
    trace = traced()
    placement = [e % 3 for e in range(16)]
    found = what_if(trace, topk_group=1, placement=placement)
    for layer, row in enumerate(found.by_layer()):
        for side, source in enumerate((trace, found.trace)):
            ids = source.picks[layer].tolist()
            assert row["load"][side] == [sum(e in token for token in ids) for e in range(16)]
            assert row["nodes"][side] == pytest.approx(sum(len({placement[e] for e in token}) for token in ids) / 60)
        gone = sum(
            len(set(x) - set(y))
            for x, y in zip(trace.picks[layer].tolist(), found.trace.picks[layer].tolist(), strict=True)
        )
        assert row["assignments_lost"] == row["assignments_gained"] == gone


def test_the_new_trace_is_a_trace_like_any_other(tmp_path):
    found = what_if(traced(), k=2, drop_experts=[3])
    found.trace.save(tmp_path / "other.safetensors")
    again = load(tmp_path / "other.safetensors")
    assert torch.equal(again.picks, found.trace.picks)
    assert again.origins == ("derived", "derived")
    assert len(layer_reports(again)) == 2
    assert steps(again, 1, 4)[11].agrees
    assert steps(again, 1, 4)[14].agrees
    assert not what_if(again).flipped.any()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_recorded_families_are_reproduced_and_can_be_asked(family):
    model = tiny(family)
    with record(model, detail="scores") as recorder, torch.no_grad():
        model(input_ids=token_ids(2, 20))
    found = what_if(recorder.trace)
    assert not found.flipped.any()
    assert found.astray.sum() == 0
    assert what_if(recorder.trace, k=1).trace.top_k == 1


def test_scores_that_a_model_computed_in_bfloat16_are_taken_in_bfloat16():
    """There many of them tie; in float32 they would not, and other experts would be chosen."""
    config = v3(64, 8, 4, 6, score_dtype="model", router_dtype="model")
    logits, bias = torch.randn(200, 64).bfloat16(), torch.randn(64).mul(0.1)
    routing = route(logits, bias, config)
    trace = Trace.from_routings({"a": routing}, config, {"a": bias})
    assert trace.dtypes == {"logits": "bfloat16", "weights": "bfloat16"}
    assert not what_if(trace).flipped.any()
    found = what_if(replace(trace, weights=None))
    assert torch.equal(found.trace.weights[0], routing.weights.float())
    with pytest.raises(ValueError, match="the recorded rule is not this one"):
        what_if(replace(trace, dtypes={"logits": "float32", "weights": "float32"}))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_table_words_and_json_say_the_same(lang):
    trace = replace(traced(), layers=("\x1b[31ma[bold]", "b"))
    found = what_if(trace, k=2, bias=False, drop_experts=[3, 7], topk_group=1)
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(what_if_table(found, lang))
    text = capture.get()
    assert "\x1b" not in text
    assert "a[bold]" in text
    for sentence in found.sentences(lang):
        assert sentence in text
    assert "e3 e7" in found.sentences(lang)[0]
    about = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert about["changes"] == {"k": 2, "topk_group": 1, "bias": False, "drop_experts": [3, 7]}
    assert [row["flipped"] for row in about["layers"]] == found.flipped.sum(1).tolist()
    with pytest.raises(ValueError, match="lang='fr' is unknown"):
        found.sentences("fr")


def test_experts_that_few_tokens_do_not_choose_are_not_called_dead():
    """Dead is a verdict of stats, which a handful of tokens does not allow; here it is a count."""
    found = what_if(traced(), drop_experts=[3, 7])
    unused = [sum(row["unused"][side] for row in found.by_layer()) for side in (0, 1)]
    assert f"experts never chosen: {unused[0]} before, {unused[1]} after" in found.sentences()
    assert f"未被选中的专家：原有 {unused[0]} 个，改后 {unused[1]} 个" in found.sentences("zh")
    assert not re.search("dead|死专家", found._repr_html_())


@pytest.mark.parametrize("asked", [{"k": 2}, {"k": 6}, {"k": 2, "bias": False}, {"k": 6, "drop_experts": [3]}], ids=str)
def test_sets_of_another_size_are_compared_by_what_they_share(asked):
    found = what_if(traced(), **asked)
    pairs = [
        (set(one), set(two))
        for before, after in zip(found.before.picks.tolist(), found.trace.picks.tolist(), strict=True)
        for one, two in zip(before, after, strict=True)
    ]
    share = sum(len(one & two) for one, two in pairs) / sum(min(len(one), len(two)) for one, two in pairs)
    assert (share == 1.0) == (len(asked) == 1), "the best two are among the best four"
    said = found.sentences()[2]
    assert said.startswith("another number of experts, so every set and its summed score differ; ")
    assert f" {share:.1%} of their experts in the larger ones" in said
    assert f" {share:.1%} " in found.sentences("zh")[2]
    assert not any("other experts for" in line for line in found.sentences())


def test_what_a_question_about_groups_leaves_open_is_said():
    flat = traced(MoEConfig.preset("qwen3-moe", hidden_size=8, n_routed_experts=16, num_experts_per_tok=4))
    asked = {"n_group": 4}
    assert what_if(flat, **asked).sentences()[0] == "what if: n_group = 4 (assumed: topk_group = 1, group_score = max)"
    assert what_if(flat, **asked).sentences("zh")[0] == "假如：n_group = 4（假定：topk_group = 1，group_score = max）"
    asked |= {"topk_group": 2}
    said = what_if(flat, **asked).sentences()[0]
    assert said == "what if: n_group = 4 (assumed: group_score = max), topk_group = 2"
    said = what_if(flat, **asked, drop_experts=[3]).sentences()[0]
    assert said == "what if: n_group = 4 (assumed: group_score = max), topk_group = 2, without e3"
    asked |= {"group_score": "top2_sum"}
    assert "assumed" not in what_if(flat, **asked).sentences()[0]
    assert "assumed" not in what_if(traced(), n_group=2).sentences()[0], "the record says how groups are scored"


def test_layers_without_data_and_picks_from_elsewhere_are_said():
    trace = replace(traced(), missing=("model.layers.7.mlp",), origins=("router", "experts"))
    picks = trace.picks.clone()
    picks[1] = 16
    found = what_if(replace(trace, picks=picks), k=2)
    assert found.sentences()[-2:] == [
        "Nothing is said of layers.1, layers.7: the record has no data of them.",
        "The picks of layers.0 were read at the router's output, not at the experts.",
    ]
    assert found.sentences("zh")[-2] == "对 layers.1、layers.7 不作判断：记录中没有这些层的数据。"
    assert found.to_dict()["missing"] == ["model.layers.1.mlp", "model.layers.7.mlp"]
    assert found.to_dict()["notes"]["en"] == found.sentences()[-2:]
    assert [row["origin"] for row in found.by_layer()] == ["router", "experts"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"placement": [10**12] * 16}, "placement has nodes 1000000000000 to 1000000000000: number them from 0"),
        ({"placement": [-1] * 16}, "placement has nodes -1 to -1"),
        ({"placement": [0.5] * 16}, "placement holds float64, not whole numbers"),
        ({"nodes": 5}, "nodes=5 does not divide n_routed_experts=16"),
        ({"nodes": 4, "placement": [0] * 16}, "nodes and placement are both given"),
    ],
)  # fmt: skip
def test_a_placement_is_checked_as_in_stats(asked, message):
    with pytest.raises(ValueError, match=message):
        what_if(traced(), **asked)


def test_groups_and_nodes_are_two_columns_each_with_its_name():
    without, with_nodes = what_if(traced(), k=2), what_if(traced(), k=2, nodes=8)
    for lang, names in (("en", ("groups", "nodes")), ("zh", ("组数", "节点数"))):
        texts = [" ".join(found.sentences(lang)) for found in (without, with_nodes)]
        assert [name in texts[0] for name in names] == [True, False]
        assert [name in texts[1] for name in names] == [True, True]
    assert without.by_layer()[0]["nodes"] is None
    for side, trace in enumerate((with_nodes.before, with_nodes.trace)):
        expected = sum(len({e // 2 for e in row}) for row in trace.picks[0].tolist()) / len(trace)
        assert with_nodes.by_layer()[0]["nodes"][side] == pytest.approx(expected)


def test_a_question_in_the_console_is_its_sentences_and_in_a_notebook_a_table():
    found = what_if(replace(traced(), model="<script>x</script>", layers=("<img src=x>", "y\u202e")), k=2)
    assert repr(found).startswith("what if: k = 2\n")
    assert len(repr(found)) < 700
    html = found._repr_html_()
    assert "what if: k = 2" in html
    assert "假如：k = 2" in html
    assert "&lt;img" in html
    assert not re.search(r"<script|<img|\u202e", html)


def test_scores_are_routed_for_some_tokens_at_a_time_and_the_answer_is_the_same(monkeypatch):
    trace = traced()
    asked = [{"bias": False}, {"k": 2}, {"drop_experts": [3, 7]}, {"topk_group": 1}]
    whole = [what_if(trace, **each) for each in asked]
    expected, rows, score = [found.by_layer() for found in whole], [], rules.score

    def seen(logits, config):
        rows.append(len(logits))
        return score(logits, config)

    monkeypatch.setattr(rules, "score", seen)
    monkeypatch.setattr("moesaic.trace.rule.derive.SLICE", 7)
    for each, found, layers in zip(asked, whole, expected, strict=True):
        sliced = what_if(trace, **each)
        # how torch adds up a row may hang on the number of rows
        torch.testing.assert_close(sliced.trace.weights, found.trace.weights, rtol=1e-6, atol=0)
        assert_equal(replace(sliced.trace, weights=found.trace.weights), found.trace)
        for here, there in zip(sliced.by_layer(), layers, strict=True):
            assert here.pop("score_lost") == pytest.approx(there.pop("score_lost"), rel=1e-6)
            assert here == there
    assert max(rows) == 7
    with pytest.raises(ValueError, match=f"num_experts_per_tok=4: {len(trace)} tokens of layer"):
        what_if(trace, drop_experts=range(13))
