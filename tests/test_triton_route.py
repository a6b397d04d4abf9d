"""The routing kernels against `rules.route`: on a GPU where there is one, else through Triton's interpreter."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import GRID, METHODS, RULES, check_routing, configs, v3
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

pytest.importorskip("triton")

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.engine.route_op import RouteSpec
from moesaic.engine.triton.route import backward, route
from moesaic.types import Routing

TINY, HUGE = torch.tensor([1e-40, 3e38]).tolist()  # as float32 holds them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter meets inf and NaN


def draw(config: MoEConfig, n_tokens: int = 3) -> tuple[Tensor, Tensor]:
    n_experts = config.n_routed_experts
    return 2 * torch.randn(n_tokens, n_experts, device=DEVICE), torch.randn(n_experts, device=DEVICE)


def draw_replay(config: MoEConfig, n_tokens: int = 3) -> Tensor:
    """Distinct experts; one row has a sentinel first and one last, one has nothing else."""
    n_experts, k = config.n_routed_experts, config.num_experts_per_tok
    ids = torch.stack([torch.randperm(n_experts)[:k] for _ in range(n_tokens)])
    ids[0, 0] = ids[1, -1] = n_experts
    ids[2] = n_experts
    return ids.to(DEVICE)


def assert_same(ours: Routing, expected: Routing) -> None:
    assert (ours.weights.dtype, ours.expert_ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(ours.expert_ids, expected.expert_ids)
    torch.testing.assert_close(ours.weights, expected.weights.float(), rtol=3e-6, atol=0, equal_nan=True)


def expected_gradient(grad: Tensor, logits: Tensor, ids: Tensor, config: MoEConfig) -> Tensor:
    """autograd's, of the rules in float64, for the experts that were chosen."""
    exact = logits.detach().double().requires_grad_()
    rules.route(exact, None, config, replay=ids).weights.backward(grad.double())
    return exact.grad


def assert_gradient(config: MoEConfig, logits: Tensor, ids: Tensor) -> None:
    grad = torch.randn(ids.shape, device=DEVICE)
    ours, expected = (
        backward(grad, logits, ids, RouteSpec.of(config)),
        expected_gradient(grad, logits, ids, config),
    )
    assert ours.dtype == logits.dtype
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    if config.scoring_func != "softmax" or config.score_after_topk:
        chosen = torch.zeros(len(ids), logits.shape[1] + 1, dtype=torch.bool, device=DEVICE).scatter(1, ids, True)
        assert ours[~chosen[:, :-1]].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", GRID, ids=str)
def test_the_grid_routes_as_by_the_rules(sizes, method):
    experts, _groups, kept, k = sizes
    if METHODS[method].get("group_score") == "k_over_m_sum":
        k = max(k, kept)  # or nothing would be summed
    config = v3(*sizes[:3], k, **METHODS[method])
    logits, bias = draw(config)
    given_bias = bias if config.has_correction_bias else None
    routing = check_routing(route(logits, given_bias, config), experts)
    assert routing.logits is logits
    assert_same(routing, rules.route(logits, given_bias, config))


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        *product([(33, 3, 2, 5), (12, 4, 3, 1)], RULES),  # more experts a token than a power of two; one
        *product([(16, 4, 2, 4), (8, 1, 1, 2)], ["V3"]),  # groups say who is chosen, not how they are weighed
    ],
    ids=str,
)
def test_every_rule_weighs_and_differentiates_as_the_rules_do(sizes, rule):
    config = v3(*sizes, **RULES[rule])
    logits, bias = draw(config)
    routing = route(logits, bias, config)
    assert_same(routing, rules.route(logits, bias, config))
    assert_gradient(config, logits, routing.expert_ids)
    replay = draw_replay(config)
    replayed = route(logits, bias, config, replay=replay)
    assert_same(replayed, rules.route(logits, bias, config, replay=replay))
    assert replayed.weights[2].eq(0).all()
    assert_gradient(config, logits, replay)


@pytest.mark.parametrize(
    "sizes",
    [(6, 6, 4, 3), (7, 1, 1, 7), (12, 3, 3, 12), (5, 5, 2, 2), (1, 1, 1, 1), (640, 5, 2, 9), (700, 1, 1, 20)],
    ids=str,
)
def test_extreme_sizes(sizes):
    """One expert a group, every expert chosen, a single expert, more experts than one warp serves."""
    config = v3(*sizes, group_score="max")
    logits, bias = draw(config, 3)
    routing = check_routing(route(logits, bias, config), sizes[0])
    assert_same(routing, rules.route(logits, bias, config))
    assert_gradient(config, logits, routing.expert_ids)


def test_one_expert_per_token_weighs_one_or_its_score():
    logits, _ = draw(v3(8, 1, 1, 1))
    normalised = route(logits, None, v3(8, 1, 1, 1))
    assert normalised.weights.eq(2.5).all()
    raw = v3(8, 1, 1, 1, norm_single_expert=False)
    assert_same(route(logits, None, raw), rules.route(logits, None, raw))
    assert_gradient(raw, logits, normalised.expert_ids)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("after", [False, True])
def test_scores_hold_over_the_range_of_logits(scoring, after):
    config = v3(4, 1, 1, 4, scoring_func=scoring, score_after_topk=after, norm_topk_prob=False)
    logits = torch.tensor([[-80.0, -30.0, -17.0, -5.0], [-1e-3, 0.0, 1e-6, 0.5], [5.0, 19.9, 20.1, 80.0]])
    logits = logits.to(DEVICE)
    ids = torch.arange(4, device=DEVICE).repeat(3, 1)
    ours = route(logits, None, config, replay=ids).weights.double()
    expected = rules.route(logits.double(), None, config, replay=ids).weights
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-37)
    assert_gradient(config, logits, ids)


def test_sqrtsoftplus_has_a_finite_gradient_where_it_vanishes():
    config = v3(4, 1, 1, 4, scoring_func="sqrtsoftplus", norm_topk_prob=False)
    logits = torch.tensor([[-200.0, -104.0, -math.inf, 3.0]], device=DEVICE)
    grad = backward(torch.ones(1, 4, device=DEVICE), logits, torch.arange(4, device=DEVICE)[None], RouteSpec.of(config))
    assert grad[0, :3].eq(0).all()
    assert grad[0, 3] > 0


@st.composite
def exact_cases(draw, values):
    """Rules that rank the logits themselves, so that equal ids are due to the last bit; and up to 4 tokens."""
    config = draw(configs(score_after_topk=True, scoring_func=draw(st.sampled_from(["sigmoid", "softmax"]))))
    score, mask = draw(st.sampled_from(["top2_sum", "max", "k_over_m_sum"])), draw(st.sampled_from(["-inf", "zero"]))
    count = config.num_experts_per_tok // config.topk_group
    assume(score != "k_over_m_sum" or config.n_group == 1 or 1 <= count <= config.experts_per_group)
    config = replace(config, group_score=score, group_mask=mask)
    shape = (draw(st.integers(1, 4)), config.n_routed_experts)
    logits = torch.from_numpy(draw(arrays("float32", shape, elements=values)))
    bias = torch.from_numpy(draw(arrays("float32", shape[1:], elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5]))))
    return config, logits.to(DEVICE), draw(st.sampled_from([None, bias.to(DEVICE)]))


@settings(max_examples=40)
@given(exact_cases(st.sampled_from([-1.5, -TINY, -0.0, 0.0, TINY, 1.5])))
def test_ties_go_to_the_lower_index(case):
    config, logits, bias = case
    assert torch.equal(route(logits, bias, config).expert_ids, rules.route(logits, bias, config).expert_ids)


@settings(max_examples=40)
@given(exact_cases(st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, -0.0, 1.0, HUGE, -HUGE])))
def test_what_is_not_finite_ranks_as_by_the_rules_and_stays_in_its_row(case):
    config, logits, bias = case
    ours = check_routing(route(logits, bias, config), config.n_routed_experts)
    expected = rules.route(logits, bias, config)
    assert torch.equal(ours.expert_ids, expected.expert_ids)
    # a softmax over -inf alone, or with inf, is NaN in one and in the other
    torch.testing.assert_close(ours.weights, expected.weights, rtol=3e-6, atol=1e-38, equal_nan=True)
    poisoned = torch.cat([logits, torch.ones_like(logits[:1])])
    clean = route(torch.ones_like(logits[:1]), bias, config)
    assert torch.equal(route(poisoned, bias, config).weights[-1:], clean.weights)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_a_poisoned_token_keeps_lawful_ids_and_its_poison_to_itself(scoring):
    config = v3(32, 4, 2, 6, scoring_func=scoring)
    logits, bias = draw(config, 4)
    clean = route(logits, bias, config)
    logits[1] = math.nan
    logits[2, 5] = -math.nan
    ours = check_routing(route(logits, bias, config), 32)
    assert_same(ours, rules.route(logits, bias, config))
    assert ours.weights[1:3].isnan().all()
    assert torch.equal(ours.weights[[0, 3]], clean.weights[[0, 3]])
    grads = backward(torch.ones_like(ours.weights), logits, ours.expert_ids, RouteSpec.of(config))
    assert grads[[0, 3]].isfinite().all()
    assert grads[1].isnan().any()


def test_experts_masked_out_by_a_bias_do_not_open_other_groups():
    bias = torch.full((32,), -math.inf, device=DEVICE)
    bias[[9, 10, 17, 18]] = 0.0
    logits, _ = draw(v3(32, 4, 2, 6))
    ids = check_routing(route(logits, bias, v3(32, 4, 2, 6)), 32).expert_ids.cpu()
    assert ids[:, :4].sort().values.eq(torch.tensor([9, 10, 17, 18])).all()
    assert ids[:, 4:].eq(torch.tensor([8, 11])).all()


LAYOUTS = {
    "column-major": lambda rows: rows.T.contiguous().T,
    "every second column": lambda rows: rows.repeat_interleave(2, dim=1)[:, ::2],
    "from the middle": lambda rows: torch.cat([rows, rows, rows], dim=1)[:, rows.shape[1] : 2 * rows.shape[1]],
    "one row for all": lambda rows: rows[:1].expand(len(rows), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    config = v3(12, 3, 2, 4, scoring_func="softmax")
    logits, bias = draw(config)
    strided = LAYOUTS[layout](logits)
    strided_bias = LAYOUTS["every second column"](bias[None])[0]
    ours = route(strided, strided_bias, config)
    assert_same(ours, rules.route(strided.contiguous(), bias, config))
    replay = LAYOUTS["column-major"](draw_replay(config))
    assert_same(route(strided, None, config, replay=replay), rules.route(strided, None, config, replay=replay))
    grad = LAYOUTS[layout](torch.randn(3, 4, device=DEVICE))
    ours = backward(grad, strided, replay, RouteSpec.of(config))
    torch.testing.assert_close(ours.double(), expected_gradient(grad, strided, replay, config), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=str)
def test_offsets_beyond_32_bits(strides, tmp_path):
    """Three rows, or columns, that lie 2 GiB apart; on a CPU in a file that has no blocks for what lies between."""
    size = 2 * 2**30 + 3
    if DEVICE == "cuda":
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    logits = memory.as_strided((3, 3), strides)
    logits.copy_(torch.randn(3, 3))
    config = v3(3, 1, 1, 2, scoring_func="softmax")
    routing = route(logits, None, config)
    assert_same(routing, rules.route(logits.clone(), None, config))
    grad = torch.randn(3, 2, device=DEVICE)
    expected = expected_gradient(grad, logits.clone(), routing.expert_ids, config)
    ours = backward(grad, logits, routing.expert_ids, RouteSpec.of(config))
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["V3", "softmax", "softmax after"])
def test_logits_of_16_bits_are_scored_in_float32(dtype, rule):
    config = v3(16, 4, 2, 4, **RULES[rule])
    logits, bias = draw(config)
    logits = logits.to(dtype)
    routing = route(logits, bias, config)
    assert_same(routing, rules.route(logits, bias, config))
    grad = torch.randn(routing.weights.shape, device=DEVICE)
    ours = backward(grad, logits, routing.expert_ids, RouteSpec.of(config))
    assert ours.dtype == dtype
    expected = expected_gradient(grad, logits, routing.expert_ids, config)
    # the interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place, not half of one
    torch.testing.assert_close(ours.double(), expected, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.fixture
def fresh_memory(monkeypatch):
    """New tensors are full of NaN, or of ids that nobody has; each is returned here with what lies behind it."""
    empty, behind = torch.empty, []

    def poisoned(*sizes, **options):
        count = math.prod(sizes)
        memory = empty(count + 64, **options)
        memory.fill_(math.nan if memory.is_floating_point() else -77)
        behind.append(memory[count:])
        return memory[:count].view(sizes)

    monkeypatch.setattr(torch, "empty", poisoned)
    return behind


@pytest.mark.parametrize("rule", ["V3", "softmax", "softmax after"])
def test_every_element_of_an_output_is_written_and_none_beyond(rule, fresh_memory):
    config = v3(33, 3, 2, 5, **RULES[rule])
    logits, bias = draw(config)
    for replay in (None, draw_replay(config)):
        fresh_memory.clear()
        routing = check_routing(route(logits, bias, config, replay=replay), 33)
        assert routing.weights.isfinite().all()
        assert backward(routing.weights, logits, routing.expert_ids, RouteSpec.of(config)).isfinite().all()
        assert len(fresh_memory) == 3
        assert all(tail.isnan().all() if tail.is_floating_point() else tail.eq(-77).all() for tail in fresh_memory)


def test_zero_tokens_route_to_nothing():
    config = v3(16, 4, 2, 4)
    logits, bias = draw(config, 0)
    routing = check_routing(route(logits, bias, config), 16)
    assert routing.weights.shape == (0, 4)
    assert backward(routing.weights, logits, routing.expert_ids, RouteSpec.of(config)).shape == (0, 16)


@pytest.mark.parametrize("rule", ["V3", "softmax", "softmax after"])
def test_an_id_to_replay_beyond_32_bits_is_nobody_s(rule):
    """In 32 bits it would be the expert 1, 0 or 3."""
    config = v3(8, 1, 1, 4, **RULES[rule])
    logits, _ = draw(config, 2)
    replay = torch.tensor([[3, 2**32 + 1, 5, 0], [-(2**32), 2, 2**35 + 3, 7]], device=DEVICE)
    there = torch.where((replay >= 0) & (replay < 8), replay, 8)
    routing, expected = route(logits, None, config, replay=replay), rules.route(logits, None, config, replay=there)
    assert torch.equal(routing.expert_ids, replay)
    assert_same(routing._replace(expert_ids=there), expected)
    grad = torch.randn(2, 4, device=DEVICE)
    ours = backward(grad, logits, replay, RouteSpec.of(config))
    torch.testing.assert_close(ours.double(), expected_gradient(grad, logits, there, config), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["V3", "softmax", "softmax after"])
def test_a_replay_may_be_of_32_bits_and_name_an_expert_twice(rule):
    config = v3(16, 4, 2, 4, **RULES[rule])
    logits, _ = draw(config, 2)
    replay = torch.tensor([[3, 3, 16, 1], [7, 0, 7, 7]], dtype=torch.int32, device=DEVICE)
    assert_same(route(logits, None, config, replay=replay), rules.route(logits, None, config, replay=replay))
    assert_gradient(config, logits, replay.long())


def test_a_gradient_for_nobody_is_ignored():
    """What the experts say about the weight of a sentinel, be it NaN."""
    config = v3(8, 1, 1, 3)
    logits, _ = draw(config, 1)
    replay = torch.tensor([[1, 8, 5]], device=DEVICE)
    grad = torch.tensor([[1.0, math.nan, 2.0]], device=DEVICE)
    ours = backward(grad, logits, replay, RouteSpec.of(config))
    expected = expected_gradient(grad.nan_to_num(), logits, replay, config)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


@settings(max_examples=15)
@given(exact_cases(st.sampled_from([-1.0, 0.25, 2.0])), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_routing(case, random):
    config, logits, bias = case
    order = list(range(len(logits)))
    random.shuffle(order)
    whole, permuted = route(logits, bias, config), route(logits[order], bias, config)
    assert torch.equal(whole.expert_ids[order], permuted.expert_ids)
    assert torch.equal(whole.weights[order], permuted.weights)
