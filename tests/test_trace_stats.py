import dataclasses
import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from cases import configs, v3
from hypothesis import given
from hypothesis import strategies as st

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.layer.balance import expert_load
from moesaic.rules import route
from moesaic.trace.chance import bands as chance
from moesaic.trace.chance.bands import balance_numbers, chance_bands, copula_loads, drawn_loads, groups_reached, overlap
from moesaic.trace.statistics.stats import layer_report, layer_reports
from moesaic.trace.statistics.verdict import STATUSES
from moesaic.trace.store import Trace
from moesaic.types import Routing

ARTICLE = MoEConfig.preset("deepseek-v3", hidden_size=64, routed_scaling_factor=1.0)


def trace_of(ids: torch.Tensor, config: MoEConfig) -> Trace:
    return Trace.from_routings({"moe": Routing(None, torch.ones(ids.shape), ids)}, config)


def random_picks(config: MoEConfig, n_tokens: int) -> torch.Tensor:
    """Routing by random scores, straight from the rule: the brute force that the bands are judged by."""
    return rules.select(torch.rand(n_tokens, config.n_routed_experts), config)


def brute_loads(config: MoEConfig, n_tokens: int, runs: int) -> np.ndarray:
    picks = random_picks(config, n_tokens * runs).view(runs, -1)
    return np.stack([expert_load(row, config.n_routed_experts).numpy() for row in picks])


def test_balance_numbers_of_loads_that_can_be_done_by_hand():
    even, half, one = [4, 4, 4, 4], [8, 8, 0, 0], [16, 0, 0, 0]
    numbers = balance_numbers(np.array([even, half, one]))
    assert numbers["max_over_mean"].tolist() == [1, 2, 4]
    assert numbers["max_vio"].tolist() == [0, 1, 3]
    assert numbers["cv"] == pytest.approx([0, 1, np.sqrt(3)])
    assert numbers["entropy"] == pytest.approx([1, 0.5, 0])
    assert numbers["jain"] == pytest.approx([1, 0.5, 0.25])
    assert numbers["dead"].tolist() == [0, 2, 3]
    assert numbers["carriers"].tolist() == [4, 2, 1]


def test_nothing_routed_has_no_numbers():
    assert all(np.isnan(value).all() for value in balance_numbers(np.zeros((2, 8))).values())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.randoms())
def test_balance_numbers_keep_their_laws(load, random):
    load = np.array(load)
    numbers = {name: float(value) for name, value in balance_numbers(load).items()}
    assert numbers["max_vio"] == pytest.approx(numbers["max_over_mean"] - 1)
    assert -1e-12 <= numbers["max_vio"] <= len(load) - 1 + 1e-9
    assert -1e-9 <= numbers["entropy"] <= 1 + 1e-9
    assert 1 / len(load) - 1e-9 <= numbers["jain"] <= 1 + 1e-9
    assert 1 <= numbers["carriers"] <= len(load) - numbers["dead"]
    shuffled = load.copy()
    random.shuffle(shuffled)
    for name, value in balance_numbers(shuffled * 3).items():
        assert float(value) == pytest.approx(numbers[name]), name


@given(configs(), st.integers(1, 30))
def test_loads_of_a_trace_sum_to_all_assignments(config, n_tokens):
    ids = random_picks(config, n_tokens)
    load = layer_report(trace_of(ids, config)).load
    assert load.sum() == n_tokens * config.num_experts_per_tok
    assert load.tolist() == expert_load(ids, config.n_routed_experts).tolist()


def test_the_id_for_no_expert_is_no_load_and_no_group():
    config = v3(8, 4, 2, 3)
    ids = torch.tensor([[0, 1, 8], [0, 7, 8], [8, 8, 8]])
    assert layer_report(trace_of(ids, config)).load.tolist() == [2, 1, 0, 0, 0, 0, 0, 1]
    assert groups_reached(ids.numpy(), config).tolist() == [1, 2, 0]
    assert overlap(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]])).tolist() == [2, 1]


CASES = [(ARTICLE, 256), (v3(32, 4, 2, 4), 300), (v3(8, 1, 1, 2), 200), (v3(64, 8, 3, 6), 40), (v3(64, 1, 1, 1), 300)]


@pytest.mark.parametrize(("config", "n_tokens"), CASES)
def test_fast_random_loads_are_like_brute_force(config, n_tokens):
    """Mean and both ends of the band within what 600 runs resolve, for every balance number."""
    runs, one = 600, config.n_routed_experts / (n_tokens * config.num_experts_per_tok)
    brute = balance_numbers(brute_loads(config, n_tokens, runs))
    pool = chance.random_picks(config)
    for draw in (drawn_loads, copula_loads):
        fast = balance_numbers(draw(pool, config, n_tokens, runs, np.random.default_rng(1)))
        for name in ("max_vio", "cv", "entropy", "jain", "dead"):
            mine, true, spread = fast[name], brute[name], brute[name].std() + 1e-9
            slack = {"dead": 1.0, "max_vio": one}.get(name, 0.0)  # these are counts: a band may end one step off
            assert abs(mine.mean() - true.mean()) < 0.25 * spread, (draw, name)
            for share in (0.05, 0.95):
                ends = np.quantile(mine, share), np.quantile(true, share)
                assert abs(ends[0] - ends[1]) < 0.45 * spread + slack, (draw, name)


def test_drawn_loads_favour_no_expert():
    config = v3(32, 4, 2, 4)
    pool = chance.random_picks(config)[:3]  # three tokens only: turning them must still be fair
    loads = drawn_loads(pool, config, 50, 2000, np.random.default_rng(0))
    assert loads.sum(-1).tolist() == [200] * 2000
    error = loads.std(0) / np.sqrt(2000)
    assert (np.abs(loads.mean(0) - 200 / 32) < 5 * error).all()


def test_the_band_of_a_mean_stays_within_what_a_token_can_reach():
    values = np.array([1.0] * 6 + [3.0] * 4)
    assert dataclasses.astuple(chance.mean_band(values, 1)) == pytest.approx((1.8, 1.0, 3.0, 3.0))
    wide = chance.mean_band(values, 400)
    assert 1.0 < wide.low < 1.8 < wide.high < wide.limit


def test_the_articles_demo_has_the_measured_band():
    bands = chance_bands(ARTICLE, 256)
    measured = {"max_vio": (1.09, 0.17), "cv": (0.349, 0.015), "entropy": (0.9887, 0.001), "jain": (0.891, 0.008)}
    for name, (mean, spread) in measured.items():
        assert bands[name].mean == pytest.approx(mean, abs=spread / 3), name
        assert (bands[name].high - bands[name].low) / (2 * 1.645) == pytest.approx(spread, rel=0.2), name
    assert bands["groups_reached"].mean == pytest.approx(3.97, abs=0.03)
    assert bands["overlap"].mean == pytest.approx(6.57, abs=0.06)


@pytest.mark.parametrize("config", [v3(32, 4, 2, 4), v3(64, 8, 4, 6)], ids=["32", "64"])
def test_random_routing_leaves_the_band_one_time_in_ten(config):
    runs, n_tokens = 400, 128
    bands = chance_bands(config, n_tokens)
    numbers = balance_numbers(brute_loads(config, n_tokens, runs))
    for name in ("max_vio", "cv", "entropy", "jain"):
        outside = np.mean([value not in bands[name] for value in numbers[name]])
        assert 0.05 <= outside <= 0.15, (name, outside)
    picks = random_picks(config, n_tokens * runs).numpy()
    reached = groups_reached(picks, config).reshape(runs, n_tokens).mean(-1)
    assert 0.03 <= np.mean([value not in bands["groups_reached"] for value in reached]) <= 0.17


def test_a_band_for_many_tokens_or_experts_takes_no_time():
    for config, n_tokens in ((ARTICLE, 256), (v3(32, 4, 2, 4), 10_000), (ARTICLE, 1_000_000), (v3(8, 1, 1, 2), 2**29)):
        chance._bands.cache_clear()
        chance._routed_pool.cache_clear()
        start = time.perf_counter()
        chance_bands(config, n_tokens)
        assert time.perf_counter() - start < 2.0  # 0.25 s measured on a free core; room for a busy machine


def peak_of(call) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_band_for_half_a_billion_tokens_is_that_of_fewer_made_narrow():
    many = v3(8, 1, 1, 2)
    band, fewer = chance_bands(many, 2**29)["cv"], chance_bands(many, 2**15)["cv"]
    assert band.mean * 2**7 == pytest.approx(fewer.mean, rel=0.05)
    assert band.high * 2**7 == pytest.approx(fewer.high, rel=0.05)


@pytest.mark.parametrize(("n", "p"), [(5, 0.3), (300, 0.01), (40_000, 0.125), (40_000, 0.99)])
def test_quantiles_of_the_binomial_are_those_of_a_sum(n, p):
    x = np.arange(n, dtype=np.longdouble)
    log_mass = np.append(0, np.cumsum(np.log((n - x) / (x + 1) * p / (1 - p))))  # from one to the next, by their ratio
    cdf = np.cumsum(np.exp(log_mass - log_mass.max()))
    cdf /= cdf[-1]
    asked = np.array([1e-12, 1e-3, 0.05, 0.5, 0.95, 1 - 1e-9])
    assert chance._binomial_quantiles(n, p, asked).tolist() == np.searchsorted(cdf, asked).tolist()


@pytest.mark.parametrize("power", [24, 29, 31, 33, 36])
def test_quantiles_of_many_trials_are_those_of_the_normal(power):
    n, p, asked = 2**power, 0.125, np.array([1e-7, 1e-3, 0.5, 0.999, 1 - 1e-5, 1 - 1e-9])
    deviations = (chance._binomial_quantiles(n, p, asked) - n * p) / math.sqrt(n * p * (1 - p))
    expected = torch.special.ndtri(torch.tensor(asked)).numpy()
    assert np.abs(deviations - expected).max() < 0.02


def test_memory_does_not_grow_with_experts_times_runs(monkeypatch):
    wide = v3(4096, 512, 16, 16)
    monkeypatch.setattr(chance, "POOL", 512)
    monkeypatch.setattr(chance, "RUNS", 400)
    found, pools = [], []
    for cells in (10_000_000, 100_000):  # all runs at once: 13 MB for each of half a dozen arrays
        monkeypatch.setattr(chance, "CELLS", cells)
        chance._bands.cache_clear()
        chance._routed_pool.cache_clear()
        peak = peak_of(lambda: found.append(chance_bands(wide, 30_000)))
        pools.append(chance.random_picks(wide))
    chance._bands.cache_clear()
    chance._routed_pool.cache_clear()
    assert peak < 30e6
    assert np.array_equal(*pools)
    for name in ("cv", "max_vio", "entropy", "groups_reached"):
        assert found[1][name].mean == pytest.approx(found[0][name].mean, rel=0.02)


def test_bands_are_the_same_every_time():
    first = chance_bands(ARTICLE, 64)
    chance._bands.cache_clear()
    assert chance_bands(ARTICLE, 64) == first
    assert chance_bands(dataclasses.replace(ARTICLE, hidden_size=9, routed_scaling_factor=7.0), 64) is not None
    assert chance._rule_only(ARTICLE) == chance._rule_only(dataclasses.replace(ARTICLE, hidden_size=9))


def status(ids: torch.Tensor, config: MoEConfig) -> str:
    return layer_report(trace_of(ids, config)).status


def skewed(config: MoEConfig, n_tokens: int, tilt: float) -> torch.Tensor:
    """Random routing in which expert 3 is preferred."""
    scores = torch.rand(n_tokens, config.n_routed_experts)
    scores[:, 3] += tilt
    return rules.select(scores, config)


def test_verdicts_of_clear_cases():
    config = v3(16, 4, 4, 4)
    assert status(torch.zeros(0, 4, dtype=torch.int64), config) == "no_data"
    assert status(torch.full((5, 4), 16), config) == "no_data"
    assert status(torch.arange(4).repeat(500, 1), config) == "collapsed"
    assert status(random_picks(config, 2000), config) == "chance"
    assert status(skewed(config, 2000, 0.5), config) == "imbalanced"
    assert status(skewed(config, 20_000, 0.04), config) == "balanced"
    no_fifteen = torch.rand(2000, 15).topk(4).indices
    assert status(no_fifteen, config) == "dead"


def test_total_collapse_is_called_collapsed():
    config = v3(16, 4, 2, 4)
    report = layer_report(trace_of(torch.arange(4).repeat(32, 1), config))
    assert report.status == "collapsed"
    assert report.verdict("en") == "collapsed onto 4 of 16 experts"
    assert report.verdict("zh") == "坍缩：16 个专家中只有 4 个在工作"
    assert not report.is_healthy


@pytest.mark.parametrize("tokens", [1, 2, 5, 30, 63])
def test_a_sentence_is_no_ground_for_a_verdict(tokens):
    """32 experts and a word said again and again: alike tokens choose alike, which says nothing of the layer."""
    report = layer_report(trace_of(torch.arange(4).repeat(tokens, 1), v3(32, 4, 2, 4)))
    assert report.status == "too_few"
    assert not report.is_healthy
    assert report.verdict("zh") == "token 太少，无法判断"


def test_no_data_is_never_healthy():
    report = layer_report(trace_of(torch.zeros(0, 4, dtype=torch.int64), v3(16, 4, 2, 4)))
    assert not report.is_healthy
    assert report.load_band is None
    assert all(
        np.isnan(m.value) and m.band is None and not m.is_chance
        for name, m in report.measures.items()
        if name != "groups_kept"  # a fact of the rule
    )
    assert (report.verdict("en"), report.verdict("zh")) == ("no data", "没有数据")


def test_random_routing_is_seldom_accused():
    config = v3(32, 4, 2, 4)
    statuses = [status(random_picks(config, 200), config) for _ in range(150)]
    assert statuses.count("chance") >= 148  # each is accused with probability 1/1000 on each of two numbers


def test_every_status_has_words_in_both_languages():
    assert set(STATUSES) == {"no_data", "too_few", "chance", "balanced", "imbalanced", "dead", "collapsed"}
    assert all(set(words) == {"en", "zh"} for words in STATUSES.values())
    report = layer_report(trace_of(skewed(v3(16, 4, 4, 4), 2000, 0.9), v3(16, 4, 4, 4)))
    assert report.verdict("en").startswith("imbalanced: e3 at ")
    assert "e3" in report.verdict("zh")


def test_a_report_has_groups_where_there_are_some_and_overlap_where_scores_are():
    config = v3(32, 4, 2, 4)
    logits = torch.randn(300, 32)
    bias = torch.randn(32) * 0.01
    routing = route(logits, bias, config)
    trace = Trace.from_routings({"a": routing, "b": routing}, config, {"a": bias, "b": bias})
    reports = layer_reports(trace)
    assert [report.layer for report in reports] == ["a", "b"]
    plain = logits.sigmoid().topk(4).indices
    shared = np.mean([len(set(a.tolist()) & set(b.tolist())) for a, b in zip(routing.expert_ids, plain, strict=True)])
    assert reports[0].measures["overlap"].value == pytest.approx(shared)
    reached = np.mean([len({e // 8 for e in row.tolist()}) for row in routing.expert_ids])
    assert reports[0].measures["groups_reached"].value == pytest.approx(reached)
    flat = layer_report(trace_of(random_picks(v3(8, 1, 1, 2), 10), v3(8, 1, 1, 2)))
    assert not {"groups_reached", "overlap"} & set(flat.measures)


def test_one_expert_is_always_balanced():
    config = v3(1, 1, 1, 1, topk_method="greedy")
    report = layer_report(trace_of(torch.zeros(50, 1, dtype=torch.int64), config))
    assert report.status == "chance"
    assert report.measures["entropy"].value == 1.0
