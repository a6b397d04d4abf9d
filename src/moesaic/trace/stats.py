"""How balanced the routing of a layer is, beside what chance gives, and what that means."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.chance import Band, balance_numbers, chance_bands, groups_reached, overlap
from moesaic.trace.preference import Preferences, domain_preference
from moesaic.trace.store import Trace

__all__ = [
    "HEALTHY", "STATUSES", "LayerReport", "Measure", "Preferences", "domain_preference", "expert_loads",
    "layer_report", "layer_reports",
]  # fmt: skip

MATTERS = 0.3  # an imbalance matters where an expert carries 30 % more than chance explains, or spreads that much
COLLAPSED = 0.5  # of what chance gives: fewer experts than that carrying 99 % of the work is a collapse
ENOUGH = 8  # assignments per expert on average: with fewer, a sentence would look like a collapse

STATUSES = {
    "no_data": {"en": "no data", "zh": "没有数据"},
    "too_few": {"en": "too few tokens to judge", "zh": "token 太少，无法判断"},
    "chance": {"en": "within chance", "zh": "在随机范围内"},
    "balanced": {"en": "balanced: beyond chance but small", "zh": "均衡：超出随机，但幅度很小"},
    "imbalanced": {"en": "imbalanced", "zh": "不均衡"},
    "dead": {"en": "dead experts", "zh": "有专家从未被选中"},
    "collapsed": {"en": "collapsed", "zh": "坍缩"},
}
HEALTHY = ("chance", "balanced")


@dataclass(frozen=True)
class Measure:
    """One number of a layer and its chance band (None where there is no data)."""

    value: float
    band: Band | None

    @property
    def is_chance(self) -> bool:
        """Inside what 90 of 100 runs of random routing give."""
        return self.band is not None and self.value in self.band


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Balance of one layer over a whole run.

    load: assignments per expert, [E]. measures: by name (see `balance_numbers`), with "groups_reached" where experts
    are grouped and "overlap" (experts shared with plain top-k) where scores were recorded. status: a key of STATUSES.
    """

    layer: str
    n_tokens: int
    config: MoEConfig
    load: np.ndarray
    measures: Mapping[str, Measure]
    status: str
    verdict_en: str
    verdict_zh: str

    def verdict(self, lang: str = "en") -> str:
        return self.verdict_zh if lang == "zh" else self.verdict_en

    @property
    def is_healthy(self) -> bool:
        """False also where there is no data, or too little: nothing seen is not health."""
        return self.status in HEALTHY

    @property
    def load_band(self) -> Band | None:
        """5th to 95th percentile of one expert's load under random routing: binomial(T, K/E), as a normal."""
        if not self.n_tokens:
            return None
        p = self.config.num_experts_per_tok / self.config.n_routed_experts
        mean, spread = self.n_tokens * p, float(np.sqrt(self.n_tokens * p * (1 - p)))
        return Band(mean, max(mean - 1.645 * spread, 0.0), mean + 1.645 * spread, mean + 3.09 * spread)


def expert_loads(trace: Trace) -> np.ndarray:
    """Assignments per expert and layer, int64 [L, E]; the id E is counted nowhere."""
    return np.stack([_load(picks, trace.n_experts) for picks in trace.picks.numpy()])


def layer_report(trace: Trace, layer: int = 0) -> LayerReport:
    """Load of one recorded layer, its balance numbers beside chance, and a verdict.

    A verdict other than "within chance" needs numbers that 999 of 1000 random runs of as many tokens do not reach,
    and one other than "balanced" an effect that matters as well.
    """
    routing, config = trace.layer(layer), trace.configs[layer]
    load = _load(routing.expert_ids.numpy(), config.n_routed_experts)
    n_tokens = len(trace) if load.sum() else 0
    bands = chance_bands(config, n_tokens) if n_tokens else {}
    values = {name: float(value) for name, value in balance_numbers(load).items()}
    picks = routing.expert_ids.numpy()
    if config.n_group > 1:
        values["groups_reached"] = float(groups_reached(picks, config).mean()) if n_tokens else float("nan")
    if routing.logits is not None:
        plain = rules.largest(rules.score(routing.logits, config), config.num_experts_per_tok).numpy()
        values["overlap"] = float(overlap(picks, plain).mean()) if n_tokens else float("nan")
    measures = {name: Measure(value, bands.get(name)) for name, value in values.items()}
    status = _status(measures, config, n_tokens)
    en, zh = _verdict(status, measures, load)
    return LayerReport(trace.layers[layer], n_tokens, config, load, measures, status, en, zh)


def layer_reports(trace: Trace) -> list[LayerReport]:
    """`layer_report` of every layer, in forward order."""
    return [layer_report(trace, layer) for layer in range(trace.n_layers)]


def _load(picks: np.ndarray, n_experts: int) -> np.ndarray:
    return np.bincount(picks.ravel().astype(np.int64), minlength=n_experts + 1)[:n_experts]


def _status(measures: Mapping[str, Measure], config: MoEConfig, n_tokens: int) -> str:
    if not n_tokens:
        return "no_data"
    if n_tokens * config.num_experts_per_tok < ENOUGH * config.n_routed_experts:
        return "too_few"
    top, cv, dead, carriers = (measures[name] for name in ("max_over_mean", "cv", "dead", "carriers"))
    assert top.band is not None
    assert cv.band is not None
    assert dead.band is not None
    assert carriers.band is not None
    if carriers.value < carriers.band.limit and carriers.value <= COLLAPSED * carriers.band.mean:
        return "collapsed"
    if dead.value > dead.band.limit:
        return "dead"
    if top.value <= top.band.limit and cv.value <= cv.band.limit:
        return "chance"
    spread = np.sqrt(max(cv.value**2 - cv.band.mean**2, 0.0))  # of the true shares: chance adds its variance
    matters = top.value > (1 + MATTERS) * top.band.mean or spread > MATTERS
    return "imbalanced" if matters else "balanced"


def _verdict(status: str, measures: Mapping[str, Measure], load: np.ndarray) -> tuple[str, str]:
    en, zh = STATUSES[status]["en"], STATUSES[status]["zh"]
    n_experts = len(load)
    if status == "collapsed":
        n = int(measures["carriers"].value)
        return f"{en} onto {n} of {n_experts} experts", f"{zh}：{n_experts} 个专家中只有 {n} 个在工作"
    if status == "dead":
        n = int(measures["dead"].value)
        noun = "expert" if n == 1 else "experts"
        return f"{n} dead {noun} of {n_experts}", f"{n_experts} 个专家中有 {n} 个从未被选中"
    if status == "imbalanced":
        busiest, times = int(load.argmax()), measures["max_over_mean"].value
        return (
            f"{en}: e{busiest} at {times:.2f}x its share",
            f"{zh}：e{busiest} 为均值的 {times:.2f} 倍",
        )
    return en, zh
