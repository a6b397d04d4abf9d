from dataclasses import replace

import pytest
import torch
from cases import GRID, configs, v3
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from traces import check_layer, made

from moesaic import rules
from moesaic.article import ASSETS
from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.trace.figures.captions import LABELS
from moesaic.trace.rule.stages import STAGES
from moesaic.trace.rule.steps import steps, versus_topk
from moesaic.trace.rule.steps_table import steps_as_dict, steps_table
from moesaic.trace.store import Trace
from moesaic.types import Routing


def traced(config, n_tokens=8, seed=0, bias_scale=0.1, **fields) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, config.n_routed_experts, generator=generator)
    bias = (
        torch.randn(config.n_routed_experts, generator=generator) * bias_scale if config.has_correction_bias else None
    )
    return one_layer(route(logits, bias, config), config, bias, **fields)


def one_layer(routing, config, bias=None, **fields) -> Trace:
    return Trace.from_routings({"moe": routing}, config, {"moe": bias}, **fields)


def by_key(of_token):
    return {step.stage.key: step for step in of_token}


def test_there_are_fifteen_stages_in_the_order_of_the_flow_chart():
    assert [stage.number for stage in STAGES] == list(range(1, 16))
    assert [stage.key for stage in STAGES] == [
        "input", "tokens", "logits", "scores", "biased", "grouped", "group_scores", "groups", "group_mask",
        "expert_mask", "masked", "experts", "normalised", "scaled", "output",
    ]  # fmt: skip
    assert len({stage.name_zh for stage in STAGES}) == len({stage.name_en for stage in STAGES}) == 15


def test_a_group_is_called_a_group_and_no_node():
    """The Chinese figure and transcript alone keep the article's words."""
    names = [name for stage in STAGES for name in (stage.name_en, stage.name_zh)]
    said = [*names, (ASSETS / "transcript.en.txt").read_text(), *map(str, LABELS["en"].values())]
    assert not [text for text in said if "node" in text or "节点" in text]


def test_shapes_are_those_of_the_articles_run():
    config = MoEConfig.preset("deepseek-v3", routed_scaling_factor=1.0)
    logits = torch.randn(256, 256)
    sequences = torch.arange(4).repeat_interleave(64)
    bias = torch.zeros(256)
    trace = Trace.from_routings({"gate": route(logits, bias, config)}, config, {"gate": bias}, sequences=sequences)
    assert [step.shape for step in steps(trace)] == [
        (4, 64, 7168), (256, 7168), (256, 256), (256, 256), (256, 256), (256, 8, 32), (256, 8), (256, 4), (256, 8),
        (256, 256), (256, 256), (256, 8), (256, 8), (256, 8), (256, 8),
    ]  # fmt: skip


@given(configs(), st.integers(0, 99))
def test_the_values_of_a_token_follow_from_each_other_and_agree_with_the_record(config, seed):
    trace = traced(config, seed=seed)
    token = seed % len(trace)
    found = {key: step.value for key, step in by_key(steps(trace, 0, token)).items()}
    assert torch.equal(found["logits"], trace.logits[0, token])
    torch.testing.assert_close(found["scores"], found["logits"].sigmoid())
    assert torch.equal(found["biased"], found["scores"] + trace.bias[0])
    if config.n_group > 1:
        assert torch.equal(found["grouped"].flatten(), found["biased"])
        torch.testing.assert_close(found["group_scores"], found["grouped"].sort(-1).values[:, -2:].sum(-1))
        best = set(found["group_scores"].topk(config.topk_group).indices.tolist())
        assert set(found["groups"].tolist()) == best == set(found["group_mask"].nonzero().flatten().tolist())
        assert found["expert_mask"].sum() == config.topk_group * config.experts_per_group
        assert torch.equal(found["masked"].isfinite(), found["expert_mask"])
        assert found["expert_mask"][found["experts"]].all()
    assert torch.equal(found["experts"], trace.picks[0, token].long())
    torch.testing.assert_close(found["normalised"].sum(), torch.tensor(1.0))
    torch.testing.assert_close(found["scaled"], found["normalised"] * config.routed_scaling_factor)
    assert found["output"][0] is found["experts"]
    step = by_key(steps(trace, 0, token))
    assert step["experts"].agrees
    assert step["scaled"].agrees
    assert step["output"].agrees


@pytest.mark.parametrize("sizes", GRID)
def test_every_token_of_a_layer_agrees_with_its_config(sizes):
    trace = traced(v3(*sizes), 200)
    check = check_layer(trace)
    assert check.experts.all()
    assert check.weights.all()
    assert not check.tied.any()


def test_an_edited_record_is_found_out():
    trace = traced(v3(16, 4, 2, 4))
    picks = trace.picks.clone()
    absent = next(e for e in range(16) if e not in picks[0, 3].tolist())
    picks[0, 3, 1] = absent
    check = check_layer(replace(trace, picks=picks))
    assert check.experts.tolist() == [t != 3 for t in range(8)]
    assert check.weights.tolist() == [t != 3 for t in range(8)]
    forged = by_key(steps(replace(trace, picks=picks), 0, 3))
    assert (forged["experts"].agrees, forged["scaled"].agrees, forged["output"].agrees) == (False, False, False)
    weights = trace.weights * torch.tensor([1.0, 1.0, 1.0, 1 + 1e-4])
    check = check_layer(replace(trace, weights=weights))
    assert check.experts.all()
    assert not check.weights.any()


@pytest.mark.parametrize("wrong", [{"topk_group": 1}, {"group_score": "max"}, {"routed_scaling_factor": 1.0}])
def test_a_wrong_config_is_found_out(wrong):
    trace = traced(v3(32, 4, 2, 4), 400)
    check = check_layer(replace(trace, configs=(replace(trace.configs[0], **wrong),)))
    assert not (check.experts & check.weights).all()


def agrees(logits, ids, config):
    bias = torch.zeros(config.n_routed_experts)
    step = by_key(steps(one_layer(route(logits, bias, config, replay=torch.tensor([ids])), config, bias)))["experts"]
    return step.agrees, step.tied


def test_tied_experts_may_stand_for_each_other_and_no_others():
    config, logits = v3(8, 1, 1, 2), torch.tensor([[3.0, 1, 1, 0, 0, 0, 0, 0]])
    assert agrees(logits, [0, 1], config) == (True, True)
    assert agrees(logits, [2, 0], config) == (True, True)
    assert agrees(logits, [1, 2], config) == (False, True)  # the best one is left out
    assert agrees(logits, [0, 3], config) == (False, True)  # 3 is worse than those that tie
    assert agrees(logits, [0], v3(8, 1, 1, 1)) == (True, False)


def test_tied_groups_may_stand_for_each_other_and_no_others():
    config = v3(8, 4, 2, 2)
    logits = torch.tensor([[4.0, 0, 1, 1, 1, 1, -1, -1]])  # groups 1 and 2 tie for the second place
    assert agrees(logits, [0, 2], config) == (True, True)
    assert agrees(logits, [0, 5], config) == (True, True)
    assert agrees(logits, [2, 4], config) == (False, True)  # both of the tied groups, and not the best
    assert agrees(logits, [0, 6], config) == (False, True)  # a group that was not kept
    assert agrees(logits, [0, 1], config) == (False, True)  # 1 is worse than any expert of the tied groups


def test_a_worse_group_is_not_excused_by_a_tie_of_others():
    logits = torch.tensor([[4.0, -3, 0, 0, 0, 0, 0.5, -0.7]])  # group scores 1.03, 1, 1, 0.95
    assert agrees(logits, [0, 4], v3(8, 4, 2, 2)) == (True, True)
    assert agrees(logits, [0, 6], v3(8, 4, 2, 2)) == (False, True)


def test_picks_alone_give_what_was_recorded_and_say_what_was_not():
    trace = replace(traced(v3(16, 4, 2, 4)), logits=None, bias=None)
    found = by_key(steps(trace, 0, 2))
    known = {key for key, step in found.items() if step.value is not None}
    assert known == {"experts", "scaled", "output"}
    assert found["scores"].note == {"zh": "未记录", "en": "not recorded"}
    assert all(step.agrees is None for step in found.values())
    with pytest.raises(ValueError, match="scores were not recorded"):
        versus_topk(steps(trace))
    with pytest.raises(ValueError, match="picks only"):
        check_layer(trace)


def test_configs_without_groups_or_bias_say_so():
    found = by_key(steps(traced(MoEConfig.preset("mixtral", hidden_size=8))))
    for key in ("grouped", "group_scores", "groups", "group_mask", "expert_mask", "masked"):
        assert found[key].value is None
        assert found[key].note["en"] == "not in this model: one group"
    assert found["biased"].note["en"] == "not in this model: no correction bias"
    assert found["output"].agrees
    ignoring = by_key(steps(traced(MoEConfig.preset("mixtral", hidden_size=8, n_group=4, topk_group=2))))
    assert ignoring["groups"].note["en"] == "not in this model: the rule ignores groups"
    classic = by_key(steps(traced(MoEConfig.preset("classic"))))
    assert classic["scores"].stage.formula == "scores = logits (scored after top-k)"
    assert classic["scores"].note["en"] == "not in this model: logits are ranked, scored later"
    assert classic["normalised"].stage.formula == "w = softmax over the kept"
    assert classic["normalised"].note is None
    assert classic["output"].agrees


def test_forced_balance_is_not_judged_by_scores():
    found = by_key(steps(traced(v3(8, 1, 1, 2, topk_method="balanced")), 0, 3))
    assert found["experts"].agrees is None
    assert found["experts"].note["en"] == "dealt out in turn, not by score"
    assert found["output"].agrees


def test_a_token_with_nan_still_has_its_steps():
    config = v3(16, 4, 2, 4)
    logits = torch.randn(3, 16)
    logits[1] = torch.nan
    trace = one_layer(route(logits, torch.zeros(16), config), config, torch.zeros(16))
    assert by_key(steps(trace, 0, 1))["scaled"].agrees
    assert check_layer(trace).weights.all()


def test_what_is_not_in_the_trace_is_refused():
    trace = traced(v3(16, 4, 2, 4))
    with pytest.raises(ValueError, match="token=8 is not in the trace: it has 8 tokens"):
        steps(trace, 0, 8)
    with pytest.raises(ValueError, match="layer=1 is not in the trace"):
        steps(trace, 1)
    assert torch.equal(steps(trace, 0, -1)[2].value, steps(trace, 0, 7)[2].value)


@given(configs(), st.integers(0, 99))
def test_plain_topk_never_scores_less_and_differs_only_by_bias_and_groups(config, seed):
    trace = traced(config, 1, seed)
    versus = versus_topk(steps(trace))
    scores = trace.logits[0, 0].sigmoid()
    assert versus.score_lost >= -1e-6
    assert set(versus.topk.tolist()) == set(scores.topk(config.num_experts_per_tok).indices.tolist())
    here = set(trace.picks[0, 0].tolist())
    assert set(versus.only_topk.tolist()) == set(versus.topk.tolist()) - here
    assert set(versus.only_here.tolist()) == here - set(versus.topk.tolist())
    assert len(versus.groups_here) <= config.topk_group
    unbiased = traced(replace(config, n_group=1, topk_group=1), 1, seed, bias_scale=0.0)
    same = versus_topk(steps(unbiased))
    assert len(same.only_topk) == len(same.only_here) == 0
    assert same.score_lost == pytest.approx(0, abs=1e-6)


def test_score_lost_is_a_share_of_the_score_of_topk():
    config = v3(4, 2, 1, 2)
    logits = torch.tensor([[0.9, 0.1, 0.8, 0.3]]).logit()
    versus = versus_topk(steps(one_layer(route(logits, None, config), config, torch.zeros(4))))
    assert versus.topk.tolist() == [0, 2]
    assert versus.only_here.tolist() == [3]
    assert versus.only_topk.tolist() == [0]
    assert versus.score_lost == pytest.approx((1.7 - 1.1) / 1.7)
    assert (versus.groups_here, versus.groups_topk) == ((1,), (0, 1))


def test_the_id_for_no_expert_is_no_expert_lost():
    config = v3(8, 1, 1, 2)
    logits = torch.randn(1, 8)
    best = rules.largest(logits, 2)
    ids = torch.tensor([[int(best[0, 0]), 8]])
    routing = Routing(logits, torch.tensor([[1.0, 0.0]]), ids)
    versus = versus_topk(steps(one_layer(routing, config, torch.zeros(8))))
    assert versus.only_here.tolist() == []
    assert versus.only_topk.tolist() == [int(best[0, 1])]


def unknown(config):
    sizes = {"hidden_size": config.hidden_size, "num_experts_per_tok": config.num_experts_per_tok}
    return MoEConfig(n_routed_experts=config.n_routed_experts, topk_method="unknown", **sizes)


def test_nothing_is_derived_from_a_rule_that_is_not_known():
    trace = traced(v3(16, 4, 2, 4))
    foreign = replace(trace, configs=(unknown(trace.configs[0]),))
    of_token = steps(foreign, 0, 2)
    found = by_key(of_token)
    assert {key for key, step in found.items() if step.value is not None} == {"logits", "experts", "scaled", "output"}
    for key in ("scores", "biased", "groups", "masked", "normalised"):
        assert found[key].note["en"] == "the rule of this layer is not known"
        assert found[key].note["zh"] == "此层的路由规则未知"
        assert (found[key].stage.formula, found[key].shape) == ("?", ())
    assert all(step.agrees is None and not step.tied for step in of_token)
    assert torch.equal(found["scaled"].value, trace.weights[0, 2])
    with pytest.raises(ValueError, match="the rule of this layer is not known"):
        versus_topk(of_token)
    with pytest.raises(ValueError, match=r"nothing can be derived for layer 'moe': the rule of this layer"):
        check_layer(foreign)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_softmax_top_2_model_shows_what_it_has_and_says_what_it_has_not(lang):
    of_token = steps(traced(MoEConfig.preset("mixtral", hidden_size=8)), 0, 3)
    found = by_key(of_token)
    shown = {key for key, step in found.items() if step.value is not None}
    assert shown == {"logits", "scores", "experts", "normalised", "scaled", "output"}
    missing = [step for step in of_token if step.value is None and step.stage.number > 2]
    beginning = {"en": "not in this model", "zh": "此模型没有"}[lang]
    assert len(missing) == 7
    assert all(step.note[lang].startswith(beginning) for step in missing)
    assert found["scores"].stage.formula == "softmax(logits)"
    assert found["experts"].stage.formula == "topk(choice, 2)"
    assert found["output"].agrees


def test_ids_alone_give_ids_and_weights_are_said_to_be_derived_where_they_can_be():
    trace = replace(traced(v3(16, 4, 2, 4)), weights=None)
    found = by_key(steps(trace, 0, 2))
    torch.testing.assert_close(found["scaled"].value, traced(v3(16, 4, 2, 4)).weights[0, 2])
    assert found["scaled"].note["en"] == "derived, not recorded"
    assert (found["experts"].agrees, found["scaled"].agrees, found["output"].agrees) == (True, None, None)
    assert torch.equal(found["output"].value, trace.picks[0, 2].long())
    assert found["output"].note["en"] == "weights were not recorded"
    bare = by_key(steps(replace(trace, logits=None, bias=None), 0, 2))
    assert {key for key, step in bare.items() if step.value is not None} == {"experts", "output"}
    assert bare["scaled"].note["en"] == "not recorded"
    assert check_layer(trace).experts.all()


def test_a_bias_that_was_not_recorded_is_not_taken_for_none():
    trace = traced(v3(16, 4, 2, 4))
    found = by_key(steps(replace(trace, bias=None), 0, 2))
    assert found["biased"].note["en"] == "the correction bias was not recorded"
    assert all(found[key].value is None for key in ("biased", "grouped", "group_scores", "groups", "masked"))
    torch.testing.assert_close(found["scores"].value, trace.logits[0, 2].sigmoid())
    assert (found["experts"].agrees, found["scaled"].agrees, found["output"].agrees) == (None, True, True)
    with pytest.raises(ValueError, match="the correction bias was not recorded; record again"):
        check_layer(replace(trace, bias=None))


def test_a_slot_without_an_expert_is_no_disagreement():
    trace = traced(v3(16, 4, 2, 4))
    picks, weights = trace.picks.clone(), trace.weights.clone()
    picks[0, 2, 1], weights[0, 2, 1] = 16, 0.0
    found = by_key(steps(replace(trace, picks=picks, weights=weights), 0, 2))
    assert found["experts"].agrees is None
    assert found["experts"].note["en"] == "some slots hold no expert"
    assert found["experts"].value.tolist()[1] == 16


def test_a_dtype_that_torch_does_not_have_is_refused():
    trace = replace(traced(v3(16, 4, 2, 4)), dtypes={"logits": "load", "weights": "float32"})
    with pytest.raises(ValueError, match="dtype 'load' is not one of torch"):
        steps(trace)


def test_the_steps_of_a_token_say_whose_they_are_and_where_its_picks_were_read():
    trace = made(v3(16, 4, 2, 4), origins=("experts", "router"))
    at_experts, at_router = steps(trace, 0, 3), steps(trace, 1, -1)
    assert (at_experts.layer, at_experts.token, at_experts.notes()) == ("layers.0", 3, [])
    assert (at_router.layer, at_router.token) == ("layers.1", 11)
    note = "The picks of layers.1 were read at the router's output, not at the experts."
    assert at_router.notes() == [note]
    assert note in repr(at_router)
    assert steps_as_dict(at_router)["notes"]["en"] == [note]
    for lang in ("en", "zh"):
        console = Console(width=200, no_color=True)
        with console.capture() as capture:
            console.print(steps_table(at_router, lang))
        assert at_router.notes(lang)[0] in capture.get()


def test_steps_in_the_console_are_short_and_in_a_notebook_a_table():
    of_token = steps(replace(made(v3(16, 4, 2, 4)), layers=("<img src=x>", "y")), 0, 3)
    experts = " ".join(f"e{e}" for e in of_token[11].value.tolist())
    assert repr(of_token).splitlines()[0] == f"token 3 of <img src=x>: {experts} of 16 experts"
    assert repr(of_token[11]) == "Step(12 pick experts: topk(masked, 4), shape [12, 4])"
    html = of_token._repr_html_()
    assert html.count("<tr>") == 2 * 16
    assert "应用掩码" in html
    assert "apply mask" in html
    assert "classic top-4" in html
    assert "&lt;img" in html
    assert "<img" not in html
