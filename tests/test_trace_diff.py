"""Two records of the same tokens: what differs, and what the difference is put down to."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from cases import METHODS, configs, v3
from hf_models import tiny, token_ids
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.rules import route
from moesaic.trace.compare.diff import diff
from moesaic.trace.compare.diff_table import diff_table
from moesaic.trace.compare.judge import VERDICTS
from moesaic.trace.recording.record import record
from moesaic.trace.reroute.what_if import what_if
from moesaic.trace.rule.derive import derive
from moesaic.trace.rule.margins import lead_of, margin_between, rounding_bound
from moesaic.trace.store import Trace

CONFIG = v3(32, 4, 2, 4)


def logits_of(layers=3, n_tokens=400, n_experts=32):
    return torch.randn(layers, n_tokens, n_experts)


def biases_of(layers=3, n_experts=32, scale=0.1):
    return torch.randn(layers, n_experts) * scale


def traced(logits, bias, config=CONFIG, *, ruled_by=None, used_bias=True, **fields) -> Trace:
    """A trace that says `config` and `bias`; `ruled_by` and `used_bias` are what it really did."""
    routings, biases = {}, {}
    for layer, (z, b) in enumerate(zip(logits, bias, strict=True)):
        name = f"model.layers.{layer}.mlp"
        used = {True: b, False: None}.get(used_bias, used_bias)
        routings[name], biases[name] = route(z, used, ruled_by or config), b
    return Trace.from_routings(routings, config, biases, **{"model": "m", **fields})


def without_scores(trace, **fields):
    return replace(trace, logits=None, bias=None, **fields)


def test_two_runs_of_the_same_are_identical_and_so_are_permuted_slots():
    trace = traced(logits_of(), biases_of())
    found = diff(trace, trace)
    assert found.verdict == "identical"
    assert (found.share, found.token_share) == (0.0, 0.0)
    order = torch.randperm(4)
    permuted = replace(trace, picks=trace.picks[..., order], weights=trace.weights[..., order])
    found = diff(trace, permuted)
    assert found.verdict == "identical"
    assert found.weight_differences.tolist() == [0, 0, 0]
    assert found.first_split.tolist() == [3] * 400
    assert diff(without_scores(trace), without_scores(permuted)).verdict == "identical"


def test_flips_are_other_sets_and_the_first_split_is_the_first_layer_with_one():
    a, b = (traced(logits_of(), biases_of()) for _ in range(2))
    found = diff(a, b)
    sets = [[[set(token) for token in layer] for layer in trace.picks.tolist()] for trace in (a, b)]
    for layer in range(3):
        expected = [x != y for x, y in zip(sets[0][layer], sets[1][layer], strict=True)]
        assert found.flips[layer].tolist() == expected
        assert found.by_layer()[layer].flips == sum(expected)
    first = [next((i for i in range(3) if sets[0][i][t] != sets[1][i][t]), 3) for t in range(400)]
    assert found.first_split.tolist() == first
    assert found.share == found.flips.float().mean()
    assert found.to_dict()["first_splits"] == [first.count(i) for i in range(3)]


def test_origins_are_flips_that_nothing_before_in_their_text_explains():
    base = traced(logits_of(2, 6), biases_of(2), sequences=torch.tensor([0, 0, 0, 1, 1, 1]))
    picks = base.picks.clone()
    for layer, token in ((0, 1), (1, 0), (1, 1), (1, 2), (1, 4)):  # token 1 parts in layer 0; then 0, 1, 2 and 4
        absent = next(e for e in range(32) if e not in picks[layer, token].tolist())
        picks[layer, token, 0] = absent
    found = diff(base, replace(base, picks=picks))
    assert found.origins[0].nonzero().flatten().tolist() == [1]
    assert found.origins[1].nonzero().flatten().tolist() == [0, 4]  # 1 and 2 read token 1, which had parted before


@given(configs(), st.integers(0, 99))
def test_a_margin_is_no_wider_than_the_scores_moved(config, seed):
    """The choice can only change where scores moved by the margin: once up, once down, for each score summed."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, config.n_routed_experts, generator=generator)
    other = logits + 0.3 * torch.randn(logits.shape, generator=generator)
    target = route(other, None, config).expert_ids
    here, there = (derive(z, None, config, target) for z in (logits, other))
    margins = margin_between(here, target, config)
    moved = (here["biased"] - there["biased"]).abs().amax(-1)
    same = (here["derived_ids"].sort(-1).values == target.sort(-1).values).all(-1)
    assert torch.equal(margins.isnan(), same)
    assert (margins[~same] >= 0).all()
    summed = 2 if config.n_group > 1 else 1
    assert (margins[~same] <= 2 * summed * moved[~same] + 1e-6).all()


def test_without_groups_a_margin_is_that_of_the_widest_pair():
    config = v3(8, 1, 1, 2)
    scores = torch.tensor([[0.9, 0.8, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1]])
    derived = derive(scores.logit(), None, config, torch.tensor([[0, 1]]))
    for target, margin in (([0, 2], 0.2), ([0, 3], 0.3), ([2, 3], 0.4), ([1, 2], 0.3)):
        assert margin_between(derived, torch.tensor([target]), config)[0] == pytest.approx(margin, abs=1e-6)
    for target in ([1, 0], [0, 8]):  # the same set, and a slot without an expert
        assert margin_between(derived, torch.tensor([target]), config)[0].isnan()


def test_with_groups_a_margin_is_that_of_the_group_that_went_in_or_out():
    config = v3(8, 4, 2, 2)
    scores = torch.tensor([[0.9, 0.5, 0.8, 0.1, 0.45, 0.44, 0.05, 0.05]])  # groups 1.4, 0.9, 0.89, 0.1
    derived = derive(scores.logit(), None, config, torch.tensor([[0, 2]]))
    for target, margin in (
        ([0, 4], 0.01),  # group 2 instead of group 1
        ([0, 1], 0.01),  # the same, and none of group 2 was good enough
        ([0, 3], 0.7),  # both groups stay
        ([2, 6], 0.8),  # group 3 came in, at the cost of the least kept
    ):
        assert margin_between(derived, torch.tensor([target]), config)[0] == pytest.approx(margin, abs=1e-6)


def both_precisions(family):
    wide = tiny(family, num_hidden_layers=4)
    narrow = copy.deepcopy(wide).bfloat16()
    ids = token_ids(8, 64)
    traces = []
    for model in (wide, narrow):
        with record(model, detail="scores") as recorder, torch.no_grad():
            model(input_ids=ids)
        traces.append(recorder.trace)
    return traces


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral", "gpt_oss"])
def test_float32_against_bfloat16_are_near_ties_with_scores_on_both_sides_or_one(family):
    a, b = both_precisions(family)
    for found in (diff(a, b), diff(b, a), diff(a, without_scores(b)), diff(without_scores(a), b)):
        assert found.verdict == "near-ties", found.sentences()
        assert 0 < found.share < 0.05
    assert 0.002 < found.__class__.by_layer(diff(a, b))[0].score_difference < 0.01
    with pytest.raises(ValueError, match="dtype 'bf16' is not one of torch"):
        diff(a, b, precision="bf16")
    assert diff(a, b, precision="float32").verdict == "different scores"


def wrong(how):
    """(what the right engine recorded, what the wrong one did)."""
    logits, bias = logits_of(), biases_of()
    if how == "group_mask":
        bias = bias - 1.0  # only then is an expert of a masked group, filled with 0, better than one of a kept group
    right = traced(logits, bias)
    engine = {
        "bias is left out": {"used_bias": False},
        "bias is zero": {"used_bias": torch.zeros(32)},
        "group_mask": {"ruled_by": replace(CONFIG, group_mask="zero")},
        "group_score": {"ruled_by": replace(CONFIG, group_score="max")},
        "k_over_m_sum": {"ruled_by": v3(32, 4, 1, 4, group_score="k_over_m_sum")},
        "no groups": {"ruled_by": v3(32, 1, 1, 4)},
        "topk_group": {"ruled_by": v3(32, 4, 3, 4)},
    }[how]
    return right, traced(logits + 1e-6 * torch.randn(logits.shape), bias, **engine)


ALL_WRONG = ["bias is left out", "bias is zero", "group_mask", "group_score", "k_over_m_sum", "no groups", "topk_group"]


@pytest.mark.parametrize("how", ALL_WRONG)
def test_another_rule_is_found_with_scores_on_both_sides_or_on_the_right_one(how):
    right, bad = wrong(how)
    found = diff(right, bad)
    assert found.verdict == "different rule", found.sentences()
    assert "do not follow from the trace's own scores" in found.judgement.reasons[0]["en"]
    assert diff(bad, right).verdict == "different rule"
    one_sided = diff(right, without_scores(bad))
    assert one_sided.verdict == "different rule", one_sided.sentences()
    assert diff(right, bad, precision="float32").verdict == "different rule"


def test_a_rule_that_the_traces_name_is_named_in_the_reasons():
    logits, bias = logits_of(), biases_of()
    other = replace(CONFIG, topk_group=3)
    found = diff(traced(logits, bias), traced(logits, bias * 0.5, other))
    reasons = [reason["en"] for reason in found.judgement.reasons]
    assert "layers.0: topk_group 2 / 3" in reasons
    assert any(reason.startswith("correction biases differ by up to") for reason in reasons)


def test_another_bias_is_another_rule_although_each_follows_its_own():
    logits, bias = logits_of(), biases_of()
    found = diff(traced(logits, bias), traced(logits, bias * 0.5))
    assert found.verdict == "different rule"
    reasons = [reason["en"] for reason in found.judgement.reasons]
    assert reasons[1:] == [f"correction biases differ by up to {float((bias / 2).abs().max()):.3g}"]
    without = what_if(traced(logits, bias), drop_experts=[3, 7]).trace
    found = diff(traced(logits, bias), without)
    assert found.verdict == "different rule"
    assert [reason["en"] for reason in found.judgement.reasons][1:] == ["never chosen in one of the two: e3 e7"]


def test_scores_recorded_a_little_otherwise_than_they_were_used_are_no_other_rule():
    """Another device rounds a sigmoid otherwise: wider than a tie of float32, and far from being a rule."""
    config = v3(8, 1, 1, 2)
    scores = torch.full((1, 200, 8), 0.2)
    scores[..., 0], scores[..., 1], scores[..., 2] = 0.9, 0.5, 0.5 - 1e-6
    a = traced(scores.logit(), torch.zeros(1, 8), config)
    picks = a.picks.clone()
    picks[0, :50] = torch.tensor([0, 2], dtype=torch.int16)
    found = diff(a, replace(a, picks=picks), precision="float32")
    assert found.verdict == "near-ties", found.sentences()
    assert (found.by_layer()[0].flips, found.by_layer()[0].ties) == (50, 0)


def test_a_rare_fault_is_another_rule_and_not_a_near_tie():
    """Only where fewer than four experts of the kept groups are above zero does the old mask let others in."""
    logits, bias = logits_of(), biases_of(scale=0.0)
    bias[:, torch.arange(32) % 8 > 0] = -0.6
    right, bad = traced(logits, bias), traced(logits, bias, ruled_by=replace(CONFIG, group_mask="zero"))
    found = diff(right, bad)
    assert 0 < found.share < 0.2
    assert found.verdict == "different rule"


def test_another_checkpoint_has_other_scores_and_the_same_rule():
    logits, bias = logits_of(), biases_of()
    found = diff(traced(logits, bias), traced(logits + 0.3 * torch.randn(logits.shape), bias))
    assert found.verdict == "different scores"
    one_sided = diff(traced(logits, bias), without_scores(traced(logits + 0.3 * torch.randn(logits.shape), bias)))
    assert one_sided.verdict == "different rule"
    assert "only one of the two recorded them" in one_sided.judgement.reasons[1]["en"]


def test_weights_of_another_rule_are_found_where_all_picks_agree():
    logits, bias = logits_of(), biases_of()
    right = traced(logits, bias)
    unscaled = traced(logits, bias, ruled_by=replace(CONFIG, routed_scaling_factor=1.0))
    assert diff(right, unscaled).verdict == "different rule"
    found = diff(without_scores(right), without_scores(unscaled))
    assert found.verdict == "different rule"
    assert "weights of the same experts differ by 60 %" in found.judgement.reasons[0]["en"]
    biased = right.weights + 0.01 * right.bias[:, None].expand(-1, 400, -1).gather(-1, right.picks.long())
    found = diff(right, replace(right, weights=biased))
    assert "of the weights of a layer do not follow" in found.judgement.reasons[0]["en"]


def with_weights(trace, change):
    weights = trace.weights.clone()
    change(weights)
    return replace(trace, weights=weights)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda w: w[1].mul_(2), "different rule"),  # one layer of three
        (lambda w: w[:, :180].mul_(2), "different rule"),  # 45 % of the tokens
        (lambda w: w[2].fill_(torch.nan), "different rule"),
        (lambda w: w[0, :7].mul_(1.5), "different scores"),
        (lambda w: w[0, 3].fill_(torch.nan), "different scores"),
    ],
)
def test_weights_that_are_wrong_somewhere_are_never_identical(change, verdict, scores):
    right = traced(logits_of(), biases_of())
    wrong = with_weights(right, change)
    if not scores:
        right, wrong = without_scores(right), without_scores(wrong)
    for found in (diff(right, wrong), diff(wrong, right)):
        assert found.verdict == verdict


def test_weights_that_differ_for_some_tokens_are_told_by_layer():
    right = traced(logits_of(), biases_of())
    found = diff(right, with_weights(right, lambda w: w[0, :7].mul_(1.5)))
    (reason,) = found.judgement.reasons
    assert reason["en"].endswith("the weights of 7 (layer, token) pairs differ by more than rounding, in layers.0")


@pytest.mark.parametrize("change", [lambda w: w.div_(2.5), lambda w: w.fill_(torch.nan)])
def test_where_nothing_flips_the_headline_speaks_of_weights_and_of_no_flips(change):
    right = traced(logits_of(), biases_of())
    wrong = with_weights(right, change)
    for found in (diff(right, wrong), diff(without_scores(right), without_scores(wrong))):
        assert found.sentences()[0] == "different rule: the same experts, other weights"
        assert found.sentences("zh")[0] == "规则不同：专家相同，权重不同"
    flipped = diff(right, traced(logits_of(), biases_of(), ruled_by=replace(CONFIG, n_group=1, topk_group=1)))
    assert flipped.sentences()[0] == "different rule: rounding does not explain the flips"


def test_layers_without_data_leave_no_good_verdict():
    a = traced(logits_of(), biases_of())
    found = diff(a, replace(a, missing=("evil\x1b[2J",)))
    assert found.verdict == "cannot tell"
    assert found.judgement.reasons[0]["en"] == r"1 layer of the model gave no data: evil\x1b[2J"
    wrong = with_weights(a, lambda w: w[1].mul_(2))
    assert diff(a, replace(wrong, missing=("x",))).verdict == "different rule"


def test_a_layer_that_is_empty_in_both_is_named_once_whatever_they_call_it():
    picks = traced(logits_of(), biases_of()).picks.clone()
    picks[1] = 32
    a = replace(traced(logits_of(), biases_of()), picks=picks, missing=("late",))
    assert a.without_data == ("model.layers.1.mlp", "late")
    b = replace(a, layers=("layers.0", "layers.1", "layers.2"), missing=())
    assert diff(a, b).missing == ("model.layers.1.mlp", "late")
    assert diff(b, a).missing == ("layers.1", "late")


def test_without_scores_or_with_unknown_rules_nobody_can_tell():
    a, b = traced(logits_of(), biases_of()), traced(logits_of(), biases_of())
    found = diff(without_scores(a), without_scores(b))
    assert found.verdict == "cannot tell"
    assert found.margins is None
    assert [reason["en"] for reason in found.judgement.reasons] == ["trace a: not recorded", "trace b: not recorded"]
    foreign = MoEConfig(hidden_size=8, n_routed_experts=32, num_experts_per_tok=4, topk_method="unknown")
    found = diff(replace(a, configs=(foreign,) * 3), without_scores(b))
    assert found.verdict == "cannot tell"
    assert found.judgement.reasons[0]["en"] == "trace a: the rule of this layer is not known"
    lying = replace(a, configs=(replace(CONFIG, topk_group=1),) * 3)
    found = diff(lying, without_scores(b))
    assert found.verdict == "cannot tell"
    assert found.judgement.reasons[0]["en"] == "trace a: its picks do not follow from its scores by its rule"


def test_exact_ties_are_counted_apart():
    config = v3(8, 1, 1, 2)
    logits = torch.randn(1, 50, 8).sort(-1, descending=True).values
    logits[0, :10, 2] = logits[0, :10, 1]
    a = traced(logits, torch.zeros(1, 8), config)
    picks = a.picks.clone()
    picks[0, :10] = torch.tensor([0, 2], dtype=torch.int16)
    found = diff(a, replace(a, picks=picks))
    assert (found.by_layer()[0].flips, found.by_layer()[0].ties) == (10, 10)
    assert found.verdict == "near-ties"
    picks[0, 10:20] = torch.tensor([2, 0], dtype=torch.int16)  # these do not tie
    found = diff(a, replace(a, picks=picks))
    assert (found.by_layer()[0].flips, found.by_layer()[0].ties) == (20, 10)


def test_ties_and_margins_are_those_of_first_splits():
    """What follows a split has other hidden states: its ties explain nothing, and nobody derives its scores."""
    config = v3(8, 1, 1, 2)
    logits = torch.randn(2, 6, 8).sort(-1, descending=True).values
    logits[:, :, 2] = logits[:, :, 1]
    a = traced(logits, torch.zeros(2, 8), config, sequences=torch.tensor([0, 0, 0, 1, 1, 1]))
    picks = a.picks.clone()
    for layer, token in ((0, 1), (1, 0), (1, 1), (1, 2), (1, 5)):  # 1 and 2 follow the split of layer 0
        picks[layer, token] = torch.tensor([0, 2], dtype=torch.int16)
    found = diff(a, replace(a, picks=picks))
    assert [(layer.flips, layer.ties) for layer in found.by_layer()] == [(1, 1), (4, 2)]
    assert torch.equal(found.ties, found.origins)
    assert torch.equal(found.margins.isfinite(), found.origins)
    assert "exact ties among the first splits: 3" in found.sentences()


@pytest.mark.parametrize("method", METHODS)
@given(configs(), st.integers(0, 99), st.sampled_from([0, 1, 4]))
def test_experts_that_lead_are_those_of_the_rule(method, config, seed, steps):
    """`steps` a unit of score: few make ties, of which nothing is claimed."""
    generator = torch.Generator().manual_seed(seed)
    assume("K/M" not in method or config.num_experts_per_tok % config.topk_group == 0)
    config = replace(config, **METHODS[method])
    scores = torch.randn(40, config.n_routed_experts, generator=generator)
    scores = (scores * steps).round() / steps if steps else scores
    ids = rules.select(scores, config)
    ids[:10] = rules.select(scores + 0.1 * torch.randn(scores.shape, generator=generator), config)[:10]
    ids[10], scores[11, 0] = config.n_routed_experts, torch.nan
    derived = derive(scores, None, config, ids, scores)
    one_more = torch.cat([derived["masked"], torch.full((40, 1), -torch.inf)], -1)  # where every expert is taken
    best = one_more.topk(config.num_experts_per_tok + 1, dim=-1).values.double()
    gap = best[:, -2] - best[:, -1]
    same = (ids.sort(-1).values == derived["derived_ids"].sort(-1).values).all(-1)
    lead = lead_of(scores, ids, config)
    assert same[lead > 0].all()
    assert torch.equal(lead[lead > 0], gap[lead > 0])
    assert (lead > 0)[same & (gap > 0) & ~scores.isnan().any(-1)].all()


def test_tokens_with_missing_experts_are_counted_apart_and_never_healthy():
    trace = traced(logits_of(), biases_of())
    picks = trace.picks.clone()
    picks[1, 7, 2] = 32
    dropped = replace(trace, picks=picks)
    found = diff(trace, dropped)
    assert found.by_layer()[1].incomplete == 1
    assert found.by_layer()[1].compared == 399
    assert not found.flips.any()
    assert found.verdict == "cannot tell"
    assert diff(dropped, dropped).verdict == "identical"


def test_a_decoded_text_is_compared_with_the_same_text_read_at_once():
    logits, bias = logits_of(2, 12), biases_of(2)
    ids = torch.arange(12)
    whole = traced(logits, bias, sequences=torch.tensor([0] * 6 + [1] * 6), input_ids=ids)
    order = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 4, 10, 5, 11])  # prompts of four, then token by token
    decoded = traced(logits[:, order], bias, sequences=whole.sequences[order], input_ids=ids[order])
    assert diff(whole, decoded).verdict == "identical"
    one_text = replace(whole, sequences=torch.zeros(12, dtype=torch.int64))
    assert diff(whole, one_text).verdict == "identical"


def test_tokens_are_named_as_the_first_record_has_them():
    logits, bias = logits_of(2, 12), biases_of(2)
    whole = traced(logits, bias, sequences=torch.tensor([0] * 6 + [1] * 6), input_ids=torch.arange(12))
    order = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 4, 10, 5, 11])
    other = logits.clone()
    other[1, [6, 7, 4]] *= -1
    decoded = traced(other[:, order], bias, sequences=whole.sequences[order], input_ids=torch.arange(12)[order])
    for a, b, tokens in ((whole, decoded, [4, 6, 7]), (decoded, whole, [4, 5, 8])):
        found = diff(a, b)
        assert found.flips[1].nonzero().flatten().tolist() == tokens
        assert f"first split: layers.1, token {tokens[0]}" in found.sentences()
    ids = decoded.input_ids.clone()
    ids[8] = 99
    with pytest.raises(ValueError, match="token 8 is id 99 in one and 4 in the other"):
        diff(replace(decoded, input_ids=ids), whole)
    other = logits.clone()
    other[0, 4] *= -1
    other[1, [5, 10]] *= -1  # 5 follows from 4, of the same text; 10 does not, nor 6 and 7, turned in `decoded`
    first = diff(decoded, traced(other, bias, sequences=whole.sequences)).origins
    assert [row.nonzero().flatten().tolist() for row in first] == [[8], [4, 5, 9]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda t: t.select(slice(0, 5)), "6 tokens in one and 5 in the other"),
        (lambda _: traced(logits_of(2, 6), biases_of(2)), "3 MoE layers in one and 2 in the other"),
        (lambda _: traced(logits_of(3, 6, 16), biases_of(3, 16), v3(16, 4, 2, 4)), "32 experts in one and 16"),
        (lambda _: traced(logits_of(3, 6), biases_of(), v3(32, 4, 2, 3)), "4 experts per token in one and 3"),
        (lambda t: replace(t, input_ids=t.input_ids + 1), "not of the same tokens: token 0 is id 0 in one and 1 in"),
        (lambda t: replace(t, sequences=torch.tensor([0, 1, 1, 1, 1, 1])), "of other lengths, from token 1"),
        (lambda t: replace(t, layers=("layers.1", "layers.2", "layers.3")), "layer 'model.layers.0.mlp' of one stands"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_the_reason(other, message):
    trace = traced(logits_of(3, 6), biases_of(), input_ids=torch.arange(6), sequences=torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match=message):
        diff(trace, other(trace))


def test_layers_of_another_engine_may_have_other_names():
    trace = traced(logits_of(), biases_of())
    assert diff(trace, replace(trace, layers=("layers.0", "layers.1", "layers.2"))).verdict == "identical"
    assert diff(trace, replace(trace, layers=("first", "second", "third"))).verdict == "identical"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_table_words_and_json_say_the_same(lang):
    a, b = both_precisions("deepseek_v3")
    found = diff(replace(a, model="\x1b[31m[bold]x"), b)
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(diff_table(found, lang))
    text = capture.get()
    assert "\x1b" not in text
    assert "[bold]x" in text
    assert f"{found.share:.2%}" in text
    for sentence in found.sentences(lang):
        assert sentence[:40] in text
    about = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert about["verdict"] in VERDICTS
    assert [entry["flips"] for entry in about["layers"]] == found.flips.sum(1).tolist()
    with pytest.raises(ValueError, match="lang='fr' is unknown"):
        found.sentences("fr")


def test_where_picks_were_not_read_at_the_experts_is_said_of_each():
    a = traced(logits_of(), biases_of())
    b = replace(a, origins=("router", "experts", "experts"))
    found = diff(a, b)
    note = "b: The picks of layers.0 were read at the router's output, not at the experts."
    assert note in found.sentences()
    assert "b：layers.0 的选择取自路由器的输出，不是在专家处读到的。" in found.sentences("zh")
    assert found.to_dict()["notes"]["en"][0] == note
    assert found.to_dict()["layers"][0]["origins"] == ("experts", "router")


def test_tokens_that_could_not_be_checked_are_said():
    a = traced(logits_of(), biases_of())
    ids = torch.arange(len(a))
    unchecked = "Not both records hold token ids, so whether the tokens are the same could not be checked."
    for b, checked in ((a, False), (replace(a, input_ids=ids), True)):
        found = diff(replace(b), replace(a, input_ids=ids))
        assert (found.checked, found.to_dict()["tokens_checked"]) == (checked, checked)
        assert (unchecked not in found.sentences()) == checked
    assert "无法核对 token 是否相同" in diff(a, a).sentences("zh")[-1]


def test_a_layer_that_both_have_no_experts_of_is_no_proof_of_likeness():
    a = traced(logits_of(), biases_of())
    picks = a.picks.clone()
    picks[1] = a.n_experts
    found = diff(replace(a, picks=picks), replace(a, picks=picks))
    assert found.verdict == "cannot tell"
    assert found.missing == (a.layers[1],)
    assert found.sentences()[1] == "1 layer of the model gave no data: layers.1"


def test_the_weight_of_a_slot_without_an_expert_means_nothing():
    a = traced(logits_of(), biases_of())
    picks, weights = a.picks.clone(), a.weights.clone()
    picks[0, :, -1] = a.n_experts
    weights[0, :, -1] = 7.0
    found = diff(replace(a, picks=picks), replace(a, picks=picks, weights=weights))
    assert found.verdict == "identical"
    assert float(found.weight_differences.max()) == 0.0


def test_a_diff_in_the_console_is_its_sentences_and_in_a_notebook_a_table():
    a = replace(traced(logits_of(), biases_of()), model="<script>x</script>")
    found = diff(a, a)
    assert repr(found).startswith("identical: the same experts everywhere\n")
    assert repr(found).endswith("(more: .by_layer(), .flips, .to_dict(), .sentences('zh'))")
    assert len(repr(found)) < 400
    html = diff(replace(a, layers=("<img src=x>", "y\u202e", "z")), a)._repr_html_()
    assert "identical: the same experts everywhere" in html
    assert "一致：处处选择相同的专家" in html
    assert "&lt;script&gt;" in html
    assert "&lt;img" in html
    assert not re.search(r"<script|<img|\u202e", html)


def test_whoever_waits_hears_of_every_layer():
    heard, a = [], traced(logits_of(), biases_of())
    diff(a, a, done=heard.append)
    assert heard == [1] * a.n_layers


def test_weights_of_a_rule_that_no_config_tells_are_compared_with_each_other():
    right = traced(logits_of(), biases_of())
    scaled = with_weights(right, lambda w: w[1].mul_(1.1))
    assert diff(scaled, scaled).verdict == "identical"
    found = diff(scaled, with_weights(scaled, lambda w: w[1].mul_(1.5)))
    assert found.verdict == "different rule"
    assert "weights of the same experts differ by 50 %" in found.judgement.reasons[0]["en"]
    assert diff(right, scaled).verdict == diff(scaled, right).verdict == "different rule"


def test_an_expert_that_is_never_chosen_is_no_near_tie():
    right = traced(logits_of(), biases_of())
    without = what_if(right, drop_experts=[3]).trace
    for found in (diff(without_scores(right), without), diff(without, without_scores(right))):
        assert found.verdict == "different rule", found.sentences()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_what_shuts_an_expert_out_does_not_widen_what_rounding_explains(value):
    logits, bias = torch.randn(5, 32), torch.zeros(32)
    target = torch.arange(4).expand(5, 4)
    bound = rounding_bound(derive(logits, bias, CONFIG, target), CONFIG, torch.bfloat16)
    bias[7] = -torch.inf
    shut = rounding_bound(derive(logits, bias, CONFIG, target), CONFIG, torch.bfloat16)
    assert shut.isfinite().all()
    assert torch.allclose(shut, bound, rtol=0.5)
    logits[:, 9] = value
    assert rounding_bound(derive(logits, bias, CONFIG, target), CONFIG, torch.bfloat16).isfinite().all()


def test_scores_are_derived_for_some_tokens_at_a_time_and_the_answer_is_the_same(monkeypatch):
    right = traced(logits_of(), biases_of(), sequences=torch.arange(400) // 40)
    other = traced(right.logits + 0.1 * torch.randn(right.logits.shape), right.bias, sequences=right.sequences)
    whole, rows, score = diff(right, other), [], rules.score

    def seen(logits, config):
        rows.append(len(logits))
        return score(logits, config)

    monkeypatch.setattr(rules, "score", seen)
    monkeypatch.setattr("moesaic.trace.rule.derive.SLICE", 7)
    sliced = diff(right, other)
    assert max(rows) == 7
    assert sliced.judgement == whole.judgement
    assert torch.allclose(sliced.margins, whole.margins, rtol=1e-6, equal_nan=True)
    assert torch.allclose(sliced.score_differences, whole.score_differences)
    for name in ("flips", "ties", "origins", "weight_differences"):
        assert torch.equal(getattr(sliced, name), getattr(whole, name)), name
