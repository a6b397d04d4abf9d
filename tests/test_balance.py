import pytest
import torch
from cases import v3

from moesaic.layer.balance import expert_load, nudge_bias
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


# Measured beforehand by another program: E=64, K=8, 2048 tokens a step, logits N(offset, 0.577), offsets N(0, 0.5).
# MaxVio at step 0, 200, 500 and the mean of the last 100 of 1500 steps; the mean bias at the end.
TABLE = {
    ("sigmoid", 1e-3): (6.28, 1.32, 0.14, 0.155, 0.035),
    ("sigmoid", 1e-2): (6.28, 0.20, 0.23, 0.277, 0.312),
    ("sigmoid", 1e-4): (6.28, 6.09, 5.71, 3.62, 0.018),
    ("softmax", 1e-3): (6.28, 0.30, 0.34, 0.343, 0.062),
    ("softmax", 1e-4): (6.28, 3.93, 0.89, 0.155, 0.020),
}


@pytest.mark.parametrize(("scoring", "speed"), TABLE)
def test_nudging_reproduces_the_measured_table(scoring, speed):
    torch.manual_seed(0)
    config = v3(64, 1, 1, 8, scoring_func=scoring)
    offsets, bias = 0.5 * torch.randn(64), torch.zeros(64)
    violations = []
    for _ in range(1500):
        logits = offsets + 0.577 * torch.randn(2048, 64)
        load = expert_load(route(logits, bias, config).expert_ids, 64)
        violations.append(float(load.max() / load.mean() - 1))
        bias = nudge_bias(bias, load, speed=speed)
    start, at200, at500, last, mean_bias = TABLE[scoring, speed]
    assert violations[0] == pytest.approx(start, abs=0.01)
    for step, expected in ((200, at200), (500, at500)):  # one step each: the noise of a maximum over 64 counts
        assert violations[step] == pytest.approx(expected, abs=0.06)
    assert sum(violations[-100:]) / 100 == pytest.approx(last, abs=0.01)
    assert float(bias.mean()) == pytest.approx(mean_bias, abs=0.003)
