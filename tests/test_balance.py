import pytest
import torch
from cases import v3

from moesaic.layer.balance import RULES, expert_load, nudge_bias, nudge_centred, nudge_proportionally
from moesaic.rules import route


def test_load_counts_and_leaves_out_the_sentinel():
    ids = torch.tensor([[0, 2], [2, 4], [4, 4]])
    assert expert_load(ids, 4).tolist() == [1, 0, 2, 0]
    assert expert_load(ids, 4).dtype == torch.float32
    assert expert_load(torch.zeros(0, 3, dtype=torch.long), 4).tolist() == [0, 0, 0, 0]


@pytest.mark.compile
def test_load_stays_in_a_compiled_graph():
    compiled = torch.compile(expert_load, fullgraph=True, backend="eager")
    ids = torch.randint(0, 8, (5, 2))
    assert torch.equal(compiled(ids, 8), expert_load(ids, 8))


def test_nudge_raises_the_idle_lowers_the_busy_and_leaves_the_mean():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    nudged = nudge_bias(bias, torch.tensor([0.0, 4.0, 2.0, 2.0]), speed=1e-3)
    torch.testing.assert_close(nudged, torch.tensor([0.501, 0.499, 0.5, 0.5]))
    assert bias.eq(0.5).all(), "a rule returns a new bias"
    assert torch.equal(nudge_bias(bias, torch.tensor([0, 4, 2, 2]), speed=1e-3), nudged), "integer counts will do"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_leaves_what_is_balanced_and_what_saw_nothing(rule):
    bias = torch.tensor([0.1, -0.2, 0.3])
    for load in (torch.full((3,), 7.0), torch.zeros(3)):
        assert torch.equal(RULES[rule](bias, load, speed=0.5), bias)


def test_experts_exactly_at_the_mean_stay_also_where_float32_could_not_tell():
    load = torch.tensor([2**25 + 1, 2**25 - 1, 2**25], dtype=torch.int64)
    assert nudge_bias(torch.zeros(3), load, speed=1.0).tolist() == [-1, 1, 0]


def test_the_centred_rule_keeps_the_mean_and_the_differences_of_the_sign_rule():
    bias, load = torch.zeros(4), torch.tensor([9.0, 1.0, 1.0, 1.0])
    signs, centred = (rule(bias, load, speed=0.5) for rule in (nudge_bias, nudge_centred))
    assert signs.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert centred.tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_the_proportional_rule_moves_by_the_share_that_is_missing():
    moved = nudge_proportionally(torch.zeros(4), torch.tensor([0, 4, 2, 2]), speed=0.1)
    torch.testing.assert_close(moved, torch.tensor([0.1, -0.1, 0.0, 0.0]))


@pytest.mark.parametrize("rule", RULES)
def test_rules_keep_the_dtype_and_return_a_new_bias(rule):
    bias, load = torch.zeros(4, dtype=torch.float64), torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert RULES[rule](bias, load, speed=0.1).dtype == torch.float64
    assert not bias.any()


# Measured beforehand by another program: E=64, K=8, 2048 tokens a step, logits N(offset, 0.577), offsets N(0, 0.5).
# MaxVio at step 0, 200, 500 and the mean of the last 100 of 1500 steps; the mean bias at the end.
TABLE = {
    ("sign", "sigmoid", 0.0): (6.28, 6.25, 6.25, 6.29, 0.0),
    ("sign", "sigmoid", 1e-3): (6.28, 1.32, 0.14, 0.155, 0.035),
    ("centred", "sigmoid", 1e-3): (6.28, 1.32, 0.14, 0.154, 0.0),
    ("proportional", "sigmoid", 1e-3): (6.28, 0.22, 0.12, 0.144, 0.0),
    ("sign", "sigmoid", 1e-2): (6.28, 0.20, 0.23, 0.277, 0.312),
    ("sign", "sigmoid", 1e-4): (6.28, 6.09, 5.71, 3.62, 0.018),
    ("sign", "softmax", 1e-3): (6.28, 0.30, 0.34, 0.343, 0.062),
    ("sign", "softmax", 1e-4): (6.28, 3.93, 0.89, 0.155, 0.020),
}


@pytest.mark.parametrize(("rule", "scoring", "speed"), TABLE)
def test_each_rule_reproduces_the_measured_table(rule, scoring, speed):
    torch.manual_seed(0)
    config = v3(64, 1, 1, 8, scoring_func=scoring)
    offsets, bias = 0.5 * torch.randn(64), torch.zeros(64)
    violations = []
    for _ in range(1500):
        logits = offsets + 0.577 * torch.randn(2048, 64)
        load = expert_load(route(logits, bias, config).expert_ids, 64)
        violations.append(float(load.max() / load.mean() - 1))
        bias = RULES[rule](bias, load, speed=speed)
    start, at200, at500, last, mean_bias = TABLE[rule, scoring, speed]
    assert violations[0] == pytest.approx(start, abs=0.01)
    for step, expected in ((200, at200), (500, at500)):  # one step each: the noise of a maximum over 64 counts
        assert violations[step] == pytest.approx(expected, abs=0.06)
    assert sum(violations[-100:]) / 100 == pytest.approx(last, abs=0.01)
    assert float(bias.mean()) == pytest.approx(mean_bias, abs=0.003)
