"""Alerts of a watched run: never for noise, once for each change, and only for what lasts."""

import numpy as np
import pytest
import torch

from moesaic.config import MoEConfig
from moesaic.rules import select
from moesaic.trace.chance.bands import chance_bands
from moesaic.train.monitor.alerts import CALM, DRIFT, EMPTY, GRADIENTS, SUSTAINED, Judge, tokens_of
from moesaic.train.monitor.numbers import chance, load_numbers

E, K = 32, 4
PLAIN = MoEConfig(hidden_size=1, n_routed_experts=E, num_experts_per_tok=K)
GROUPED = MoEConfig(
    hidden_size=1, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
    scoring_func="sigmoid", topk_method="noaux_tc",
)  # fmt: skip
WIDE = MoEConfig(hidden_size=1, n_routed_experts=128, num_experts_per_tok=2)


def random_loads(rule: MoEConfig, steps: int, tokens: int) -> np.ndarray:
    """Loads [steps, E] of tokens with independent uniform scores, drawn by the rule itself."""
    found = []
    for _ in range(steps):
        ids = select(torch.rand(tokens, rule.n_routed_experts), rule)
        found.append(torch.bincount(ids.flatten(), minlength=rule.n_routed_experts).double().numpy())
    return np.stack(found)


def judged(steps_of_loads, rule=PLAIN, *, judge=None, layers=("layer",)):
    """Verdict lines and alerts of loads, one layer a name, one step each."""
    judge = judge or Judge(dict.fromkeys(layers))
    verdicts, alerts = [], []
    for step, loads in enumerate(steps_of_loads, 1):
        verdict, found = judge.add(step, 1, loads, [rule] * len(layers), [None] * len(layers))
        verdicts += [verdict] if verdict else []
        alerts += found
    return verdicts, alerts


@pytest.mark.parametrize(("rule", "tokens"), [(PLAIN, 96), (GROUPED, 300), (WIDE, 200)])
def test_thousands_of_steps_of_random_routing_raise_no_alert_and_keep_to_the_band(rule, tokens):
    loads = random_loads(rule, 3000, tokens)
    verdicts, alerts = judged(loads[:, None], rule)
    assert alerts == []
    assert len(verdicts) == 3000 // SUSTAINED
    uneven = sum(verdict["status"] != ["chance"] for verdict in verdicts)
    assert uneven <= 0.05 * len(verdicts) + 3 * np.sqrt(0.05 * 0.95 * len(verdicts))
    inside = []
    for load in loads:
        columns = load_numbers([load], [rule])
        low, high = columns["chance"][0]
        inside.append(low - 1e-4 <= columns["max_vio"][0] <= high + 1e-4)
    assert np.mean(inside) >= 0.88  # 0.90, and more where MaxVio takes few values,
    exact, one_count = chance_bands(rule, tokens)["max_vio"], rule.n_routed_experts / loads[0].sum()
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=one_count + 1e-4)  # but never much wider


def collapsed_load(first: int, tokens: int = 96) -> np.ndarray:
    load = np.zeros(E)
    load[first : first + K] = tokens
    return load


def test_a_collapse_is_told_once_when_it_begins_and_once_when_it_ends():
    healthy = list(random_loads(PLAIN, 3 * SUSTAINED, 96))
    loads = healthy[:SUSTAINED] + [collapsed_load(5)] * (3 * SUSTAINED) + healthy[SUSTAINED:]
    verdicts, alerts = judged([load] for load in loads)
    assert [(a.step, a.kind, a.layer, a.begins) for a in alerts] == [
        (2 * SUSTAINED, "collapsed", "layer", True),
        (5 * SUSTAINED, "collapsed", "layer", False),
    ]
    assert alerts[0].message == f"layer collapsed: 4 of 32 experts carry 99 % of the load of {SUSTAINED} steps"
    assert [v["status"] for v in verdicts] == [["chance"], *[["collapsed"]] * 3, ["chance"], ["chance"]]
    assert [(v["from"], v["step"]) for v in verdicts[:2]] == [(1, SUSTAINED), (SUSTAINED + 1, 2 * SUSTAINED)]


def carried_by(count: int, tokens: int = 96) -> np.ndarray:
    """A load of which that many experts have all but 0.9 %, which the others share."""
    load = np.full(E, tokens * K * 0.009 / (E - count))
    load[:count] = tokens * K * 0.991 / count
    return load * 100


def test_a_collapse_at_its_limit_is_one_alert_and_ends_where_it_is_clearly_over():
    """Half of the experts are a collapse; a layer that wavers about that has one that goes on."""
    course = [18, 16, 17, 16, 18, 19, 20, 18]
    verdicts, alerts = judged([[carried_by(count)] for count in course for _ in range(SUSTAINED)])
    assert [v["status"] == ["collapsed"] for v in verdicts] == [count <= 16 for count in course]
    assert [(a.step // SUSTAINED, a.begins) for a in alerts] == [(2, True), (7, False)]


def test_a_layer_without_a_name_is_the_layer_in_an_alert():
    alerts = judged([[collapsed_load(5)]] * SUSTAINED, layers=("",))[1]
    assert alerts[0].message.startswith("the layer collapsed: 4 of 32")
    assert alerts[0].layer == ""


def test_experts_that_every_batch_picks_anew_are_no_collapse_and_one_strange_batch_is_none():
    moving = [[collapsed_load(K * (step % (E // K)))] for step in range(40 * SUSTAINED)]
    assert judged(moving)[1] == []
    loads = random_loads(PLAIN, 2 * SUSTAINED, 96)
    loads[7] = collapsed_load(5)
    assert judged(loads[:, None])[1] == []


@pytest.mark.parametrize(("missing", "told"), [(0, False), (1, False), (2, True), (5, True)])
def test_dead_experts_are_told_from_a_twentieth_of_a_layer_on(missing, told):
    alive = MoEConfig(hidden_size=1, n_routed_experts=E - missing, num_experts_per_tok=K)
    loads = np.pad(random_loads(alive, 3 * SUSTAINED, 96), ((0, 0), (missing, 0)))
    verdicts, alerts = judged(loads[:, None])
    assert [(a.step, a.kind) for a in alerts] == [(SUSTAINED, "dead")] * told
    assert all((verdict["status"] == ["dead"]) == (missing > 0) for verdict in verdicts)
    if told:
        assert alerts[0].message == f"layer: {missing} of 32 experts never chosen in {SUSTAINED} steps"


def test_the_alert_of_dead_experts_ends_when_all_are_back_not_when_one_is_or_a_token_strays():
    alive = MoEConfig(hidden_size=1, n_routed_experts=E - 1, num_experts_per_tok=K)
    one = np.pad(random_loads(alive, SUSTAINED, 96), ((0, 0), (1, 0)))
    two, strays = one.copy(), one.copy()
    two[:, 1] = 0
    strays[0, 0] = 2  # of 240 that are due
    loads = np.concatenate([two, one, strays, two, one, random_loads(PLAIN, SUSTAINED, 96)])
    alerts = judged(loads[:, None])[1]
    assert [(a.step, a.begins) for a in alerts] == [(SUSTAINED, True), (6 * SUSTAINED, False)]


def test_too_few_tokens_are_gathered_until_they_can_be_judged_and_a_layer_without_any_has_no_data():
    loads = random_loads(PLAIN, 100, 8)  # one assignment an expert and step: 32 steps until 32 are due
    verdicts, _ = judged(loads[:, None])
    assert [verdict["step"] for verdict in verdicts] == [32, 64, 96]
    half = [[load, np.zeros(E)] for load in random_loads(PLAIN, SUSTAINED, 96)]
    assert judged(half, layers=("a", "b"))[0][0]["status"] == ["chance", "no_data"]


def test_a_layer_with_few_tokens_is_judged_when_it_has_enough_and_keeps_no_other_waiting():
    """Half an assignment an expert and step: 64 steps until 32 are due, 80 until the verdict after them."""
    few = collapsed_load(0, tokens=4)
    verdicts, alerts = judged([[collapsed_load(5), few]] * 7 * SUSTAINED, layers=("a", "b"))
    assert [(a.step, a.kind, a.layer) for a in alerts] == [(20, "collapsed", "a"), (80, "collapsed", "b")]
    assert alerts[1].message == "b collapsed: 4 of 32 experts carry 99 % of the load of 80 steps"
    assert [(v["from"], v["step"]) for v in verdicts] == [(s + 1, s + SUSTAINED) for s in range(0, 140, SUSTAINED)]
    rare = ["too_few"] * 3
    assert [v["status"] for v in verdicts] == [["collapsed", b] for b in (*rare, "collapsed", *rare)]


def test_layers_that_are_judged_at_different_times_raise_no_alert_for_noise():
    loads = [random_loads(rule, 3000, tokens) for rule, tokens in ((PLAIN, 96), (PLAIN, 7), (PLAIN, 1))]
    verdicts, alerts = judged(zip(*loads, strict=True), layers=("a", "b", "c"))
    assert alerts == []
    assert len(verdicts) == 3000 // SUSTAINED
    columns = [
        [each for each in column if each != "too_few"] for column in zip(*(v["status"] for v in verdicts), strict=True)
    ]
    assert [len(column) for column in columns] == [150, 75, 11]
    uneven = sum(set(verdict["status"]) - {"chance", "too_few"} != set() for verdict in verdicts)
    assert uneven <= 0.05 * len(verdicts) + 3 * np.sqrt(0.05 * 0.95 * len(verdicts))


def test_steps_without_a_token_are_told_once_a_stretch_and_their_verdict_is_no_data():
    some, none = list(random_loads(PLAIN, 2 * SUSTAINED, 96)), [np.zeros(E)] * 2 * SUSTAINED
    verdicts, alerts = judged([load] for load in [*some[:SUSTAINED], *none, *some[SUSTAINED:], *none[:EMPTY]])
    assert [(a.step, a.kind, a.layer, a.begins) for a in alerts] == [
        (SUSTAINED + EMPTY, "no_tokens", None, True),
        (3 * SUSTAINED + 1, "no_tokens", None, False),
        (4 * SUSTAINED + EMPTY, "no_tokens", None, True),
    ]
    assert alerts[0].message.startswith(f"no token was counted in {EMPTY} steps: is the watched model the one that")
    assert [(v["from"], v["status"]) for v in verdicts] == [
        (1, ["chance"]), (21, ["no_data"]), (41, ["no_data"]), (61, ["chance"]),
    ]  # fmt: skip


def test_a_step_without_a_token_now_and_then_is_no_alert_and_one_line_of_many_steps_is():
    loads = random_loads(PLAIN, 4 * SUSTAINED, 96)
    loads[::EMPTY] = loads[1::EMPTY] = 0
    assert judged(loads[:, None])[1] == []
    judge = Judge({"layer": None})
    assert [a.kind for a in judge.add(10, 10, [np.zeros(E)], [PLAIN], [None])[1]] == ["no_tokens"]
    going_on = Judge({"layer": None}, [("no_tokens", None)])
    assert judged([[np.zeros(E)]] * 10, judge=going_on)[1] == []


def test_layers_of_several_sizes_keep_their_verdicts():
    small = MoEConfig(hidden_size=1, n_routed_experts=8, num_experts_per_tok=K)
    judge = Judge({"a": None, "b": None, "c": None})
    eight = random_loads(small, SUSTAINED, 96)
    wide = random_loads(PLAIN, SUSTAINED, 96)
    for step in range(SUSTAINED):
        loads = [wide[step], eight[step], collapsed_load(0)]
        verdict, alerts = judge.add(step + 1, 1, loads, [PLAIN, small, PLAIN], [None] * 3)
    assert verdict["status"] == ["chance", "chance", "collapsed"]
    assert [(a.kind, a.layer) for a in alerts] == [("collapsed", "c")]


def drifted(biases, begin=(0.0, 0.0, 0.0)):
    judge = Judge({"layer": begin})
    return [a for step, bias in enumerate(biases, 1) for a in judge.add(step, 1, [np.ones(E)], [PLAIN], [bias])[1]]


def test_a_bias_drifts_by_its_mean_or_its_range_from_where_it_began():
    up = [[0.1 * step, 0.1 * step, 0.1 * step] for step in range(1, 15)]
    apart = [[-0.06 * step, 0.06 * step, 0.0] for step in range(1, 15)]
    for course in (up, apart):
        told = drifted(course)
        assert len(told) == 1
        assert told[0].kind == "drift"
        assert told[0].begins
    assert drifted([[4.2, 6.9, 5.0]] * 50, begin=(4.0, 7.0, 5.0)) == []  # as released ones are
    assert drifted([None] * 5, begin=None) == []
    assert drifted([[None, None, None]])[0].begins  # not finite


def test_a_drift_at_its_limit_does_not_flicker():
    course = [[0, 0, DRIFT + 0.01], [0, 0, DRIFT - 0.01]] * 5
    assert [a.begins for a in drifted(course)] == [True]
    assert [a.begins for a in drifted([*course, [0, 0, CALM * DRIFT - 0.01]])] == [True, False]


def test_a_loss_that_is_not_finite_is_told_at_once_and_gradients_after_some():
    judge = Judge({"layer": None})
    losses = [2.0, float("nan"), float("inf"), 1.9]
    told = [a for step, loss in enumerate(losses) for a in judge.add_loss(step, loss)]
    assert [(a.step, a.layer, a.begins) for a in told] == [(1, None, True), (3, None, False)]
    norms = [1.0, float("inf"), 1.0, *[float("nan")] * (GRADIENTS + 1), 1.0]
    told = [a for step, norm in enumerate(norms) for a in judge.add_gradient(step, norm)]
    assert [(a.step, a.begins) for a in told] == [(2 + GRADIENTS, True), (4 + GRADIENTS, False)]


def test_alerts_that_are_on_already_are_not_told_again():
    judge = Judge({"layer": None}, [("collapsed", "layer"), ("loss", None)])
    assert judged([[collapsed_load(0)]] * SUSTAINED, judge=judge)[1] == []
    assert judge.add_loss(1, float("nan")) == []


@pytest.mark.parametrize("rule", [PLAIN, GROUPED, WIDE])
def test_the_band_of_a_rounded_count_is_within_three_percent_of_the_exact_one(rule):
    for tokens in (97, 1023, 3001, 70001):
        exact, rounded = chance_bands(rule, tokens)["max_vio"], chance(rule, tokens)["max_vio"]
        assert (rounded.low, rounded.high) == pytest.approx((exact.low, exact.high), rel=0.05, abs=0.02)
        assert rounded.mean == pytest.approx(exact.mean, rel=0.03)


def test_counts_that_vary_ask_for_few_bands(monkeypatch):
    from moesaic.train.monitor import numbers

    asked = []
    numbers._chance.cache_clear()
    monkeypatch.setattr(numbers, "bands_between", lambda _rule, n: asked.append(n) or {})
    for tokens in range(1, 4096):
        numbers.chance(PLAIN, tokens)
    numbers._chance.cache_clear()
    assert len(asked) <= 32 * 8
    assert all(min(abs(tokens - n) for n in asked) / tokens <= 1 / 64 for tokens in range(1, 4096))


def test_tokens_are_counted_from_the_load():
    assert tokens_of(random_loads(PLAIN, 1, 77)[0], PLAIN) == 77
