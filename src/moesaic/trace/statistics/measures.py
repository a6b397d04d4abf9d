"""The numbers of a layer: each a value, a band and what it means."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import (
    Band,
    balance_numbers,
    bands_between,
    chance_bands,
    dropped,
    groups_reached,
    mean_band,
    random_picks,
)
from moesaic.trace.chance.bands import per_token as random_tokens
from moesaic.trace.chance.documents import Documents, LoadCounts, mean_and_error
from moesaic.trace.chance.placement import distinct_places
from moesaic.trace.shown import words_of
from moesaic.trace.statistics import per_token
from moesaic.trace.store import Trace

MEANINGS = {
    "max_over_mean": {
        "en": "load of the busiest expert over the mean: the slowest device waits for it",
        "zh": "最忙专家的负载除以平均负载：最慢的设备取决于它",
    },
    "max_vio": {"en": "the same less 1 (MaxVio); 0 is perfect balance", "zh": "上一项减 1（MaxVio）；0 为完全均衡"},
    "cv": {
        "en": "standard deviation of the loads over their mean; sees all experts",
        "zh": "负载的标准差除以平均值（变异系数），反映所有专家",
    },
    "entropy": {
        "en": "entropy of the load shares over log E; 1 is perfect balance",
        "zh": "负载份额的熵除以 log E；1 为完全均衡",
    },
    "jain": {"en": "Jain's fairness index, 1 / (1 + cv²)", "zh": "Jain 公平指数，1 / (1 + cv²)"},
    "dead": {"en": "dead experts: never chosen", "zh": "死专家数：从未被选中"},
    "carriers": {"en": "fewest experts that carry 99 % of the load", "zh": "承担 99% 负载的最少专家数"},
    "no_expert": {"en": "share of slots without an expert (the id E)", "zh": "没有专家的槽位比例（编号 E）"},
    "groups_kept": {"en": "groups that the rule keeps for a token", "zh": "规则为每个 token 保留的组数"},
    "groups_reached": {
        "en": "groups that a token's experts lie in, on average",
        "zh": "每个 token 的专家平均落在几个组里",
    },
    "over_limit": {
        "en": "share of tokens that reach more groups than the rule keeps",
        "zh": "到达组数超过规则上限的 token 比例",
    },
    "nodes": {
        "en": "nodes that a token's experts lie on, on average: copies of it to send",
        "zh": "每个 token 的专家平均分布在几个节点上：需要发送的份数",
    },
    "overlap": {
        "en": "experts of a token that plain top-k of the unbiased scores would take too",
        "zh": "与不看偏置和组的经典 top-k 相同的专家数",
    },
    "margin": {
        "en": "median lead of the last expert chosen over the best one left, in masked biased scores",
        "zh": "最后一个入选专家领先第一个落选专家的分差中位数（屏蔽且加偏置后的分数）",
    },
    "weight_entropy": {
        "en": "entropy of a token's combine weights over log K; 1 where all experts count alike",
        "zh": "单个 token 组合权重的熵除以 log K；1 表示各专家同等重要",
    },
    "dropped": {
        "en": "share of assignments beyond a capacity of ceil({c}·T·K/E) per expert, the trace being one batch",
        "zh": "每个专家容量为 ceil({c}·T·K/E) 时超出的分配比例，把整条记录当作一个批次",
    },
}


@dataclass(frozen=True)
class Measure:
    """One number of a layer. band: what random routing gives (kind "chance"), or how far the number itself is uncertain
    (kind "sample", 5th to 95th percentile); None for a plain fact, and where there is no data (value NaN)."""

    value: float
    band: Band | None
    kind: str = "chance"

    @property
    def is_chance(self) -> bool:
        """Inside what 90 of 100 runs of random routing give."""
        return self.kind == "chance" and self.band is not None and self.value in self.band

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.value)

    @property
    def low(self) -> float:
        return math.nan if self.band is None else self.band.low

    @property
    def high(self) -> float:
        return math.nan if self.band is None else self.band.high


NO_DATA = Measure(math.nan, None)


def meaning(name: str, lang: str = "en") -> str:
    """What a measure says, in a line; "dropped_at_1.25" is that of `dropped` with the factor put in."""
    key, _, factor = name.partition("_at_")
    return words_of(MEANINGS[key], lang).format(c=factor)


def layer_measures(
    trace: Trace,
    layer: int,
    counts: LoadCounts,
    documents: Documents | None,
    placement: np.ndarray | None,
    capacity: tuple[float, ...],
    seed: int,
) -> dict[str, Measure]:
    """Every number of a layer by name. documents: those to resample; None where tokens are all there is."""
    config, load, picks = trace.configs[layer], counts.load, trace.picks[layer].numpy()
    slots = len(trace) * trace.top_k
    measures = _of_load(config, counts, documents is not None, capacity, seed)
    measures["no_expert"] = Measure(1.0 - float(load.sum()) / slots, None, "fact") if slots else NO_DATA
    routed = None if counts.n_tokens == len(trace) else per_token.routed(trace, layer)

    def mean(values: np.ndarray, random_values: Callable[[], np.ndarray]) -> Measure:
        if not load.sum():
            return NO_DATA
        values = values if routed is None else np.where(routed, values, np.nan)
        value, error = mean_and_error(values, documents)
        effective = counts.n_tokens / (1.0 if documents is None else counts.design_effect)
        return Measure(value, mean_band(random_values(), max(effective, 1.0), 0.0 if documents is None else error))

    if config.n_group > 1:
        groups = groups_reached(picks, config)
        limited = config.limits_groups
        measures["groups_kept"] = Measure(float(config.topk_group), None, "fact") if limited else NO_DATA
        measures["groups_reached"] = mean(groups, lambda: random_tokens(config)["groups_reached"])
        if limited:
            over = (groups if routed is None else groups[routed]) > config.topk_group
            measures["over_limit"] = Measure(float(over.mean()), None, "fact") if load.sum() else NO_DATA
    if placement is not None:
        nodes = distinct_places(picks, placement)
        measures["nodes"] = mean(nodes, lambda: distinct_places(random_picks(config), placement))
    if trace.logits is not None and config.rule_is_known:
        measures["overlap"] = mean(per_token.overlap_of(trace, layer), lambda: random_tokens(config)["overlap"])
    enough = bool(load.sum())
    measures["margin"] = _median(per_token.margins_of(trace, layer) if enough else None, routed, documents)
    measures["weight_entropy"] = _sample_mean(
        per_token.weight_entropy_of(trace, layer) if enough else None, routed, documents
    )
    return measures


def _of_load(
    config: MoEConfig, counts: LoadCounts, by_documents: bool, capacity: tuple[float, ...], seed: int
) -> dict[str, Measure]:
    """The numbers of a load beside random routing of as many effective tokens."""
    load, n_experts = counts.load, len(counts.load)
    numbers = {name: float(value) for name, value in balance_numbers(load).items()}
    total = float(load.sum())
    if not total:
        return dict.fromkeys([*numbers, *(f"dropped_at_{c:g}" for c in capacity)], NO_DATA)
    # an expert takes a whole number of assignments: the capacity as what it really is, over the mean load
    top_k = config.num_experts_per_tok
    most = [math.ceil(min(c, n_experts) * counts.n_tokens * top_k / n_experts) for c in capacity]
    relative = tuple(limit * n_experts / total for limit in most)
    effective = total / config.num_experts_per_tok / (counts.design_effect if by_documents else 1.0)
    exact = not by_documents or counts.design_effect == 1.0
    bands = (
        chance_bands(config, max(round(effective), 1), seed, relative)
        if exact
        else bands_between(config, effective, seed, relative)
    )
    measures = {name: Measure(value, bands[name]) for name, value in numbers.items()}
    for factor, share in zip(capacity, relative, strict=True):
        measures[f"dropped_at_{factor:g}"] = Measure(float(dropped(load, share)), bands[f"dropped_at_{share:g}"])
    return measures


def _sample_mean(values: np.ndarray | None, routed: np.ndarray | None, documents: Documents | None) -> Measure:
    if values is None:
        return NO_DATA
    value, error = mean_and_error(values if routed is None else np.where(routed, values, np.nan), documents)
    if math.isnan(value):
        return NO_DATA
    return Measure(value, Band(value, value - 1.645 * error, value + 1.645 * error, value + 3.09 * error), "sample")


def _median(values: np.ndarray | None, routed: np.ndarray | None, documents: Documents | None) -> Measure:
    """Median, and the quantiles that lie as far from it as the error of the share below it (Woodruff's interval)."""
    if values is None:
        return NO_DATA
    values = values if routed is None else np.where(routed, values, np.nan)
    if not np.isfinite(values).any():
        return NO_DATA
    median = float(np.nanmedian(values))
    below = np.where(np.isnan(values), np.nan, (values <= median).astype(float))
    _, error = mean_and_error(below, documents)
    ends = np.clip([0.5 - 1.645 * error, 0.5 + 1.645 * error], 0.0, 1.0)
    low, high = (float(end) for end in np.nanquantile(values, ends))
    return Measure(median, Band(median, low, high, high), "sample")
