import pytest
import torch

from moesaic.layer.balance import RULES, expert_load, nudge_bias, nudge_centred, nudge_proportionally


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
