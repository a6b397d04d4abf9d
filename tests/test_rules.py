import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import GRID, check_routing, configs, v3
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from oracles import densify, pick, route_one
from packaging.version import Version
from transformers.activations import ACT2FN

from moesaic.config import MoEConfig
from moesaic.engine.plan import group_by_expert
from moesaic.families import CONVENTIONS
from moesaic.layer.balance import expert_load, nudge_bias
from moesaic.rules import (
    SCORING,
    few,
    greedy_topk,
    group_scores,
    kept_groups,
    largest,
    route,
    select,
    sum_of_best,
    weigh,
)


@st.composite
def routing_cases(draw):
    """A config, logits of up to 5 tokens on a coarse grid (so that ties happen), and a bias between -50 and 50."""
    config = draw(configs())
    shape = (draw(st.integers(0, 5)), config.n_routed_experts)
    logits = draw(arrays(np.float32, shape, elements=st.integers(-6, 6).map(lambda i: i / 2)))
    bias = draw(arrays(np.float32, shape[1:], elements=st.integers(-100, 100).map(lambda i: i / 2)))
    return config, torch.from_numpy(logits), torch.from_numpy(bias)


@given(routing_cases())
def test_route_equals_plain_python_with_ties(case):
    config, logits, bias = case
    routing = check_routing(route(logits, bias, config), config.n_routed_experts)
    scores = logits.sigmoid()
    for t in range(len(logits)):
        # float32 sums of two, as the rule computes them: ties must be judged on the same numbers
        biased = (scores[t] + bias).tolist()
        by_group = np.sort((scores[t] + bias).numpy().reshape(config.n_group, -1), axis=1)[:, ::-1]
        kept = pick((by_group[:, 0] + by_group[:, 1]).tolist(), config.topk_group) if config.n_group > 1 else [0]
        candidates = [e for e in range(config.n_routed_experts) if e // config.experts_per_group in kept]
        expected = [candidates[i] for i in pick([biased[e] for e in candidates], config.num_experts_per_tok)]
        assert routing.expert_ids[t].tolist() == expected
        total = math.fsum(scores[t, expected].tolist())
        weights = [2.5 * float(scores[t, e]) / total for e in expected]
        np.testing.assert_allclose(routing.weights[t].numpy(), weights, rtol=1e-6)


@given(routing_cases())
def test_chosen_experts_are_distinct_and_inside_the_kept_groups(case):
    config, logits, bias = case
    routing = check_routing(route(logits, bias, config), config.n_routed_experts)
    if config.n_group > 1:
        kept = kept_groups(group_scores(logits.sigmoid() + bias, config), config)
        assert kept.sum(dim=1).eq(config.topk_group).all()
        assert kept.gather(1, routing.expert_ids // config.experts_per_group).all()


@given(routing_cases())
def test_bias_steers_the_choice_and_never_a_weight(case):
    config, logits, bias = case
    routing = route(logits, bias, config)
    replayed = route(logits, None, config, replay=routing.expert_ids)
    assert torch.equal(routing.weights, replayed.weights)
    torch.testing.assert_close(routing.weights.sum(1), torch.full((len(logits),), 2.5))


@given(routing_cases(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_routing(case, random):
    config, logits, bias = case
    order = list(range(len(logits)))
    random.shuffle(order)
    order = torch.tensor(order, dtype=torch.long)
    whole, permuted = route(logits, bias, config), route(logits[order], bias, config)
    assert torch.equal(whole.expert_ids[order], permuted.expert_ids)
    assert torch.equal(whole.weights[order], permuted.weights)


@given(routing_cases())
def test_load_sums_to_the_assignments(case):
    config, logits, bias = case
    routing = route(logits, bias, config)
    load = expert_load(routing.expert_ids, config.n_routed_experts)
    assert load.sum() == routing.expert_ids.numel()
    assert load.tolist() == [(routing.expert_ids == e).sum() for e in range(config.n_routed_experts)]


def many(rows: torch.Tensor) -> torch.Tensor:
    """The rows over and over, until there are too many values for `few`."""
    copies = rows.repeat(4096 // rows.numel() + 1, 1)
    assert few(rows)
    assert not few(copies)
    return copies


@pytest.mark.parametrize("group_score", ["top2_sum", "max", "k_over_m_sum"])
@pytest.mark.parametrize("mask", ["-inf", "zero"])
@given(case=routing_cases())
def test_a_row_is_selected_for_the_same_alone_and_among_many(case, group_score, mask):
    config, logits, bias = case
    assume(len(logits))
    k_over_m = config.num_experts_per_tok // config.topk_group
    assume(group_score != "k_over_m_sum" or config.n_group == 1 or 1 <= k_over_m <= config.experts_per_group)
    config = replace(config, group_score=group_score, group_mask=mask)
    choice = logits.sigmoid() + bias  # not route: sigmoid itself may differ in the last bit with the place in memory
    assert torch.equal(select(many(choice), config)[-len(choice) :], select(choice, config))
    if config.n_group > 1:
        assert torch.equal(group_scores(many(choice), config)[-len(choice) :], group_scores(choice, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_of_a_group_are_added_once_each(dtype, count):
    """Equal ones too, infinite ones, and a NaN, which is the best."""
    special = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -0.0, 1.5, 1.5, -3.0, -torch.inf], dtype=dtype)
    values = special[torch.randint(len(special), (2000, 3, 6))]
    values[:500] = torch.randn(500, 3, 6).to(dtype)
    values[500:1000] = values[500:1000].nan_to_num(nan=0.25)
    expected = sum(values.sort(dim=-1, descending=True).values[..., :count].unbind(-1))
    torch.testing.assert_close(sum_of_best(values, count), expected, rtol=0, atol=0, equal_nan=True)


def test_experts_masked_out_by_a_bias_do_not_open_other_groups():
    """Fewer than K experts of the kept groups have a chance: the rest are still taken from those groups."""
    bias = torch.full((32,), -math.inf)
    bias[[9, 10, 17, 18]] = 0.0
    for logits in (torch.randn(7, 32), torch.randn(300, 32)):
        ids = check_routing(route(logits, bias, v3(32, 4, 2, 6)), 32).expert_ids
        assert ids[:, :4].sort().values.eq(torch.tensor([9, 10, 17, 18])).all()
        assert ids[:, 4:].eq(torch.tensor([8, 11])).all()


@pytest.mark.compile
def test_one_graph_serves_every_number_of_tokens():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    config, bias = v3(32, 4, 2, 6), torch.randn(32)
    compiled = torch.compile(lambda logits: route(logits, bias, config), fullgraph=True, dynamic=True, backend=count)
    for n_tokens in (3, 40, 500):
        logits = torch.randn(n_tokens, 32).round(decimals=1)
        expected = route(logits, bias, config)
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits), expected, strict=True))
    assert len(graphs) == 1


@pytest.mark.skipif(Version(torch.__version__) < Version("2.12"), reason="vmap has no view(dtype) before torch 2.12")
@pytest.mark.parametrize("n_tokens", [3, 300])
def test_vmap_over_layers_routes_each_as_alone(n_tokens):
    config, logits, bias = v3(32, 4, 2, 6), torch.randn(4, n_tokens, 32), torch.randn(4, 32)
    together = torch.func.vmap(lambda logits, bias: route(logits, bias, config))(logits, bias)
    for layer in range(4):
        alone = route(logits[layer], bias[layer], config)
        assert torch.equal(together.expert_ids[layer], alone.expert_ids)
        assert torch.equal(together.weights[layer], alone.weights)


@pytest.mark.parametrize(("experts", "groups", "kept", "k"), GRID)
@pytest.mark.parametrize(
    ("method", "group_score"), [("noaux_tc", None), ("noaux_tc", "max"), ("group_limited_greedy", None)]
)
def test_route_equals_plain_python_on_the_grid(experts, groups, kept, k, method, group_score):
    config = v3(experts, groups, kept, k, topk_method=method, group_score=group_score)
    logits = torch.randn(40, experts, dtype=torch.float64)
    bias = (
        torch.randn(experts, dtype=torch.float64) if method == "noaux_tc" else torch.zeros(experts, dtype=torch.float64)
    )
    routing = route(logits, bias, config)
    counted = 1 if config.group_score_rule == "max" else 2
    for t, scores in enumerate(logits.sigmoid().tolist()):
        expected = route_one(
            scores, bias.tolist(), k=k, n_group=groups, topk_group=kept, counted=counted, scale=2.5, norm=True
        )
        got = dict(zip(routing.expert_ids[t].tolist(), routing.weights[t].tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert all(abs(got[e] - expected[e]) < 1e-12 for e in got)


def test_one_group_is_plain_top_k():
    logits, bias = torch.randn(200, 32), torch.randn(32)
    limited = route(logits, bias, v3(32, 1, 1, 6))
    assert torch.equal(limited.expert_ids.sort().values, (logits.sigmoid() + bias).topk(6).indices.sort().values)


def test_every_group_kept_is_plain_top_k():
    logits, bias = torch.randn(200, 32), torch.randn(32)
    assert torch.equal(route(logits, bias, v3(32, 4, 4, 6)).expert_ids, route(logits, bias, v3(32, 1, 1, 6)).expert_ids)


def test_softmax_after_topk_is_renormalised_softmax():
    """The identity behind the classic layer, gpt-oss and Mixtral."""
    logits = torch.randn(100, 8, dtype=torch.float64)
    sizes = {
        "hidden_size": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }
    after = route(logits, None, MoEConfig(**sizes, score_after_topk=True, norm_topk_prob=False))
    before = route(logits, None, MoEConfig(**sizes, norm_topk_prob=True))
    assert torch.equal(after.expert_ids, before.expert_ids)
    torch.testing.assert_close(after.weights, before.weights, rtol=0, atol=1e-15)


def test_sqrtsoftplus_is_the_root_of_softplus():
    logits = torch.randn(20, 8, dtype=torch.float64)
    routing = route(
        logits, None, v3(8, 1, 1, 2, scoring_func="sqrtsoftplus", norm_topk_prob=False, routed_scaling_factor=1.0)
    )
    expected = torch.log1p(logits.exp()).sqrt().topk(2)
    torch.testing.assert_close(routing.weights, expected.values, rtol=1e-12, atol=0)
    assert torch.equal(routing.expert_ids, expected.indices)


def test_sqrtsoftplus_has_a_finite_gradient_where_it_vanishes():
    logits = torch.tensor([[-200.0, -90.0, 0.0, 3.0]], requires_grad=True)
    config = v3(4, 1, 1, 4, scoring_func="sqrtsoftplus")
    route(logits, None, config).weights[:, :2].sum().backward()
    assert logits.grad.isfinite().all()


def test_sqrtsoftplus_in_float16_orders_what_transformers_does():
    """Down to its smallest number: kept at its smallest normal one, the logits from -9.7 on tied."""
    logits = torch.linspace(-17.0, -8.0, 2000).half().requires_grad_()
    ours, theirs = SCORING["sqrtsoftplus"](logits), ACT2FN["sqrtsoftplus"](logits)
    assert torch.equal(ours[theirs > 0], theirs[theirs > 0])
    assert len(ours.unique()) == len(theirs[theirs > 0].unique()) > 300
    ours.sum().backward()
    assert logits.grad.isfinite().all()


def test_k_over_m_sum_counts_k_over_m_scores():
    config = v3(16, 4, 2, 6, group_score="k_over_m_sum")
    choice = torch.randn(50, 16)
    expected = choice.view(50, 4, 4).sort(-1, descending=True).values[..., :3].sum(-1)
    assert torch.equal(group_scores(choice, config), expected)


def test_zero_fill_picks_forbidden_experts_under_a_negative_bias_and_minus_infinity_does_not():
    """Why the fill is -inf: DeepSeek-V3#741, vllm#13474, transformers#45441."""
    logits, bias = torch.randn(64, 32), torch.full((32,), -2.0)
    for mask, forbidden in (("-inf", 0), ("zero", 64 * 4)):
        config = v3(32, 8, 4, 4, group_mask=mask)
        ids = route(logits, bias, config).expert_ids
        kept = kept_groups(group_scores(logits.sigmoid() + bias, config), config)
        assert (~kept.gather(1, ids // 4)).sum() == forbidden


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, float(np.float32(1e-40)), 1.5, np.inf]),
    ),
    st.data(),
)
def test_largest_breaks_ties_to_the_lower_index(values, data):
    k = data.draw(st.integers(1, values.shape[1]))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given_values = torch.from_numpy(values).to(dtype)
        expected = [pick(row, k) for row in given_values.tolist()]
        assert largest(given_values, k).tolist() == expected
        assert largest(many(given_values), k)[-len(expected) :].tolist() == expected


def test_largest_takes_any_nan_for_the_largest():
    bits = torch.tensor([[0x3F800000, 0x7F800000, -0x400000, 0x7FC00000]], dtype=torch.int64)  # 1, inf, -NaN, NaN
    values = bits.to(torch.int32).view(torch.float32)
    assert values.isnan().tolist() == [[False, False, True, True]]
    assert largest(values, 4).tolist() == [[1, 2, 3, 0]]
    assert largest(many(values), 4).eq(torch.tensor([1, 2, 3, 0])).all()


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_poisoned_token_keeps_lawful_ids_and_leaves_other_rows_alone(poison, scoring):
    config = v3(32, 4, 2, 6, scoring_func=scoring)
    logits, bias = torch.randn(9, 32), torch.randn(32)
    clean = route(logits, bias, config)
    poisoned_logits = logits.clone()
    poisoned_logits[4] = torch.tensor(poison)
    poisoned = check_routing(route(poisoned_logits, bias, config), 32)
    others = [t for t in range(9) if t != 4]
    assert torch.equal(clean.expert_ids[others], poisoned.expert_ids[others])
    assert torch.equal(clean.weights[others], poisoned.weights[others])
    assert len(set((poisoned.expert_ids[4] // 8).tolist())) <= 2
    if math.isnan(poison):
        assert poisoned.weights[4].isnan().all()


def test_a_single_poisoned_expert_does_not_push_the_token_out_of_its_groups():
    config = v3(32, 4, 2, 6)
    logits = torch.randn(5, 32)
    logits[2, 30] = torch.tensor(
        np.float32(np.frombuffer(b"\x00\x00\xc0\xff", np.float32)[0])
    )  # a NaN with its sign set
    ids = check_routing(route(logits, torch.zeros(32), config), 32).expert_ids
    assert 30 in ids[2].tolist()
    assert len(set((ids[2] // 8).tolist())) <= 2


def test_replay_keeps_the_ids_and_the_gradient():
    config = v3(16, 4, 2, 4)
    logits = torch.randn(6, 16, requires_grad=True)
    replay = torch.stack([torch.randperm(16)[:4] for _ in range(6)])
    routing = route(logits, torch.zeros(16), config, replay=replay)
    assert torch.equal(routing.expert_ids, replay)
    routing.weights.pow(2).sum().backward()
    touched = torch.zeros(6, 16, dtype=torch.bool).scatter(1, replay, True)
    assert logits.grad[touched].ne(0).all()
    assert logits.grad[~touched].eq(0).all()


@pytest.mark.parametrize("after", [False, True])
def test_the_sentinel_weighs_nothing_and_takes_no_part_in_the_sum(after):
    config = v3(
        8, 1, 1, 3, scoring_func="softmax" if after else "sigmoid", score_after_topk=after, routed_scaling_factor=1.0
    )
    logits = torch.randn(3, 8, requires_grad=True)
    replay = torch.tensor([[1, 8, 5], [8, 8, 8], [0, 1, 2]])
    routing = route(logits, None, config, replay=replay)
    assert routing.weights[0, 1] == 0
    assert routing.weights[1].eq(0).all()
    torch.testing.assert_close(routing.weights[0].sum(), torch.tensor(1.0))
    routing.weights.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].eq(0).all()


@given(routing_cases())
def test_looking_for_sentinels_changes_no_bit_where_there_are_none(case):
    config, logits, bias = case
    routing = route(logits, bias, config)
    assert torch.equal(routing.weights, weigh(logits.sigmoid(), routing.expert_ids, config))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_row_of_sentinels_weighs_zero_under_every_convention(convention, dtype):
    config = v3(16, 4, 2, 4).with_convention(convention)
    logits = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    replay = torch.tensor([[16, 16, 16, 16], [1, 16, 16, 5], [3, 2, 1, 0]])
    weights = route(logits, None, config, replay=replay).weights
    assert weights[0].eq(0).all()
    assert weights[1, 1:3].eq(0).all()
    weights.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 4), (5, 1), (5, 5), (20,)])
def test_a_replay_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"replay has shape .*, not \[T, K\] = \(5, 4\): give one row a token"):
        route(torch.randn(5, 16), None, v3(16, 4, 2, 4), replay=torch.zeros(shape, dtype=torch.long))


def test_forced_balance_deals_every_expert_the_same():
    config = v3(16, 4, 2, 4, topk_method="balanced")
    routing = check_routing(route(torch.randn(8, 16), None, config), 16)
    assert expert_load(routing.expert_ids, 16).eq(2).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.full((8,), 2.5))


def test_k_equals_one_follows_transformers_unless_told_otherwise():
    logits = torch.randn(10, 8, requires_grad=True)
    normalised = route(logits, None, v3(8, 1, 1, 1))
    assert normalised.weights.eq(2.5).all()
    raw = route(logits, None, v3(8, 1, 1, 1, norm_single_expert=False))
    torch.testing.assert_close(raw.weights[:, 0], 2.5 * logits.sigmoid().max(dim=1).values)


def test_zero_tokens_route_to_nothing():
    routing = check_routing(route(torch.randn(0, 16), torch.zeros(16), v3(16, 4, 2, 4)), 16)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 4)


def test_densify_is_independent_of_slot_order():
    ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.25, 0.75]])
    assert torch.equal(densify(ids, weights, 3), densify(ids.flip(1), weights.flip(1), 3))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: greedy_topk(torch.zeros(3), v3(8, 1, 1, 2)),
        lambda: nudge_bias(torch.zeros(3), torch.zeros(4), speed=0.1),
        lambda: group_by_expert(torch.zeros(3, dtype=torch.long), 2),
    ],
    ids=["rules", "layer", "engine"],
)
def test_make_shapes_executes_the_annotations_of_every_package_that_it_names(request, wrong):
    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("in `make shapes` alone")
    with pytest.raises(TypeCheckError):
        wrong()
