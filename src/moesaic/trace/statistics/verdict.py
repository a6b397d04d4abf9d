"""When a load is called bad: significant after correction, and by an effect that has a name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesaic.trace.chance.documents import LoadCounts
from moesaic.trace.chance.tails import at_least, at_most

if TYPE_CHECKING:
    from moesaic.trace.statistics.stats import LayerReport

HOT = 1.2  # times its fair share: with one expert a device, a step that waits for it takes up to 20 % longer
STARVED = 0.1  # of its fair share: it gets a tenth of the gradient of the others and falls further behind
SPREAD = 0.3  # standard deviation of the true shares over their mean: a third of the experts 30 % off
COLLAPSED = 0.5  # of what chance gives: fewer experts than that carrying 99 % of the work is a collapse
HIGH_SHARE = 0.9  # of alpha: a hot expert shows late, a starved one at once (no load where 30 are due: 1e-13)
ENOUGH = 8  # assignments per expert on average: with fewer, a sentence would look like a collapse

STATUSES = {
    "no_data": {"en": "no data", "zh": "没有数据"},
    "too_few": {"en": "too few tokens to judge", "zh": "token 太少，无法判断"},
    "chance": {"en": "within chance", "zh": "在随机范围内"},
    "balanced": {"en": "balanced: beyond chance but small", "zh": "均衡：超出随机，但幅度很小"},
    "imbalanced": {"en": "imbalanced", "zh": "不均衡"},
    "dead": {"en": "dead experts", "zh": "有死专家"},
    "collapsed": {"en": "collapsed", "zh": "坍缩"},
}
HEALTHY = ("chance", "balanced")
SICK = ("collapsed", "dead", "imbalanced")  # worst first
UNJUDGED = ("no_data", "too_few")


@dataclass(frozen=True, eq=False)
class LoadTest:
    """Which experts of a layer get more or less than their share, beyond chance.

    p_high, p_low: per expert, corrected for all experts, all layers and both sides, [E]. effective: tokens, less
    what their likeness within documents takes away. tests: experts of all layers.
    """

    p_high: np.ndarray
    p_low: np.ndarray
    effective: float
    tests: int

    @property
    def p_value(self) -> float:
        """Of the layer: chance that any of its experts, or of the other layers', looks so far off."""
        return float(min(self.p_high.min(), self.p_low.min()))


def judge_loads(counts: Sequence[LoadCounts], n_layers: int, by_documents: Sequence[bool]) -> list[LoadTest]:
    """Test every expert's load against an equal share; the marginal of an expert is binomial under every fair rule.

    by_documents, per layer: loads move in clumps. The binomial then counts clumps, with the variance over documents and
    their third moment matched from above, and the lower side the effective tokens. Bonferroni over experts, layers
    (`n_layers`, which may be more than are tested here) and the two sides, of which the high one gets HIGH_SHARE.
    """
    if not counts:
        return []
    rows = zip(counts, by_documents, strict=True)
    arguments = [np.stack(each) for each in zip(*(_tail_arguments(c, whole) for c, whole in rows), strict=True)]
    above, clumps, below, effective, p = arguments
    tests = above.shape[1] * n_layers
    high = np.minimum(at_least(above, clumps, p) * tests / HIGH_SHARE, 1.0)
    low = np.minimum(at_most(below, effective, p) * tests / (1 - HIGH_SHARE), 1.0)
    fair = (p > 0) & (p < 1)  # else nothing was routed, or everybody takes part in everything
    high, low = np.where(fair, high, 1.0), np.where(fair, low, 1.0)
    return [LoadTest(high[i], low[i], float(effective[i, 0]), tests) for i in range(len(counts))]


def _tail_arguments(counts: LoadCounts, by_documents: bool) -> tuple[np.ndarray, ...]:
    """(count, n) of the upper tail, (count, n) of the lower one, and p, each [E]."""
    p, n, load = counts.rate, float(counts.n_tokens), counts.load.astype(np.float64)
    same = np.ones(len(load))
    if not by_documents or not 0 < p < 1:
        return load, n * same, load, n * same, p * same
    variance, effect = counts.fair_variance(True), counts.design_effect
    share = load / counts.n_tokens
    by_itself = np.maximum(counts.n_tokens * share * (1 - share) - counts.token_variance, 0.0)  # a larger load's own
    own = np.maximum((counts.own_variance - by_itself) / variance, 1.0)  # an expert for one domain varies more
    clumps = variance / (counts.clump**2 * p * (1 - p)) / own
    above = clumps * p + (load - load.mean()) / (counts.clump * own)
    return above, clumps, load / effect, n / effect * same, p * same


def documents_needed(rate: float, n_experts: int, n_layers: int, alpha: float) -> int:
    """Fewest documents that can show anything about others: with fewer, even the same expert in every token of every
    document would be no surprise, if the tokens of a document all choose alike."""
    if not 0 < rate < 1:
        return 2
    return max(2, math.ceil(math.log(HIGH_SHARE * alpha / (n_experts * n_layers)) / math.log(min(rate, 1 - rate))))


def least_seen(
    counts: Sequence[LoadCounts], tests: Sequence[LoadTest], by_documents: Sequence[bool], alpha: float
) -> np.ndarray:
    """For every layer, the smallest load over a fair one that its tokens would show to be too much; NaN where even all
    tokens in one expert would not."""
    clumps = np.array([c.clump if whole else 1.0 for c, whole in zip(counts, by_documents, strict=True)])[:, None]
    p = np.array([c.rate for c in counts])[:, None]
    inside = (p > 0) & (p < 1)
    p = np.where(inside, p, 0.5)
    variance = np.array([c.fair_variance(whole) for c, whole in zip(counts, by_documents, strict=True)])[:, None]
    n = np.maximum(variance, 1e-9) / (clumps**2 * p * (1 - p))
    mean = np.array([c.load.mean() for c in counts])[:, None]
    many = np.array([test.tests for test in tests])[:, None]
    low, high = np.ones_like(p), 1.0 / p
    for _ in range(3):  # three times 32 steps: to 1 in 30000 of the range
        ratios = low + (high - low) * np.linspace(0.0, 1.0, 33)
        seen = at_least(n * p + (ratios - 1) * mean / clumps, n, p) * many <= HIGH_SHARE * alpha
        first = np.maximum(seen.argmax(-1), 1)[:, None]
        none = ~seen.any(-1, keepdims=True)
        low, high = np.take_along_axis(ratios, first - 1, -1), np.take_along_axis(ratios, first, -1)
        inside &= ~none
    return np.where(inside, high, np.nan)[:, 0]


def status_of(
    counts: LoadCounts, test: LoadTest, numbers: Mapping[str, float], chance: Mapping[str, float], alpha: float
) -> str:
    """The status of a layer. numbers, chance: balance numbers of its load, and their means under random routing."""
    load = counts.load
    if not load.sum():
        return "no_data"
    if few_assignments(load):
        return "too_few"
    if test.p_value > alpha:
        return "too_few" if test.effective * counts.rate < ENOUGH else "chance"
    if numbers["carriers"] <= COLLAPSED * chance["carriers"]:
        return "collapsed"
    if len(dead(counts, test, alpha)):
        return "dead"
    spread = math.sqrt(max(numbers["cv"] ** 2 - chance["cv"] ** 2, 0.0))  # of the true shares: chance adds its variance
    if len(hot(counts, test, alpha)) or len(starved(counts, test, alpha)) or spread > SPREAD:
        return "imbalanced"
    return "balanced"


def few_assignments(load: np.ndarray) -> bool:
    """Fewer than ENOUGH assignments an expert."""
    return bool(load.sum() < ENOUGH * len(load))


def hot(counts: LoadCounts, test: LoadTest, alpha: float) -> np.ndarray:
    """Experts significantly above their share by HOT or more, busiest first."""
    found = np.flatnonzero((test.p_high <= alpha) & (counts.load >= HOT * counts.load.mean()))
    return found[np.argsort(-counts.load[found], kind="stable")]


def starved(counts: LoadCounts, test: LoadTest, alpha: float) -> np.ndarray:
    """Experts significantly below their share, with STARVED of it or less; dead ones included."""
    return np.flatnonzero((test.p_low <= alpha) & (counts.load <= STARVED * counts.load.mean()))


def dead(counts: LoadCounts, test: LoadTest, alpha: float) -> np.ndarray:
    """Experts never chosen where chance would have chosen them."""
    return np.flatnonzero((test.p_low <= alpha) & (counts.load == 0))


def words_of_layer(report: "LayerReport") -> dict[str, str]:
    """The verdict on a layer in plain words, {"en": ..., "zh": ...}."""
    status, load, n_experts = report.status, report.load, len(report.load)
    en, zh = STATUSES[status]["en"], STATUSES[status]["zh"]
    if status == "too_few" and not few_assignments(load):
        n = f"{report.n_tokens / report.design_effect:.0f}"
        return {
            "en": f"too few documents to judge: their tokens count as {n}",
            "zh": f"文档太少，无法判断：这些 token 只相当于 {n} 个独立的 token",
        }
    if status == "collapsed":
        n = int(report.measures["carriers"].value)
        return {"en": f"{en} onto {n} of {n_experts} experts", "zh": f"{zh}：{n_experts} 个专家中只有 {n} 个在工作"}
    if status == "dead":
        n = len(report.dead)
        noun = "expert" if n == 1 else "experts"
        return {"en": f"{n} dead {noun} of {n_experts}", "zh": f"{n_experts} 个专家中有 {n} 个是死专家"}
    if status == "imbalanced":
        only_low = report.starved and not report.hot
        worst = min(report.starved, key=load.__getitem__) if only_low else int(load.argmax())
        times = f"{load[worst] / load.mean():.2f}"
        return {"en": f"{en}: e{worst} at {times}x its share", "zh": f"{zh}：e{worst} 为均值的 {times} 倍"}
    return {"en": en, "zh": zh}
