"""Chance bands: what routing by random scores, under the same rule, gives for the same number of tokens.

Random routing is "every token scores every expert independently and the rule decides", so K, E and the group rule are
in it. A pool of such tokens is made once by the rule itself; runs are drawn from the pool.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np
import torch

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.chance.placement import distinct_places

POOL = 8192  # tokens routed by random scores; enough to know co-occurrence within 1 %
RUNS = 2000  # random runs behind a band: the 5 % quantile then lies at 5 ± 0.5 %
CELLS = 2_000_000  # scores, or loads of runs, held at once: 16 MB of float64; up to 1000 experts all runs at once
EXACT_DRAWS = 5_000_000  # assignments drawn one by one, about 0.2 s; beyond, counts come from a Gaussian copula


@dataclass(frozen=True)
class Band:
    """What chance gives for one number: mean, 5th and 95th percentile, and `limit`, which 999 of 1000 runs stay
    within on the side that is worse (high for all but entropy and Jain)."""

    mean: float
    low: float
    high: float
    limit: float

    def __contains__(self, value: float) -> bool:
        slack = 1e-9 * max(1.0, abs(value))
        return self.low - slack <= value <= self.high + slack


HIGHER_IS_BETTER = ("entropy", "jain", "carriers")


def balance_numbers(load: np.ndarray) -> dict[str, np.ndarray]:
    """Balance of loads [..., E] (assignments per expert), each number [...]; NaN where nothing was routed.

    max_over_mean: busiest expert over its fair share. max_vio: that minus 1 (arXiv 2408.15664). cv: standard deviation
    over mean. entropy: of the load shares, over log E. jain: 1 / (1 + cv²), Jain's fairness index. dead: experts never
    used. carriers: the fewest experts that carry 99 % of all assignments.
    """
    load = np.asarray(load, dtype=np.float64)
    n_experts, total = load.shape[-1], load.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = load / total
        cv = load.std(-1) / load.mean(-1)
        entropy = np.where(share > 0, share * np.log(1 / share), 0.0).sum(-1) / max(np.log(n_experts), 1e-12)
        carried = np.cumsum(-np.sort(-share, axis=-1), axis=-1)
    numbers = {
        "max_over_mean": share.max(-1) * n_experts,
        "max_vio": share.max(-1) * n_experts - 1.0,
        "cv": cv,
        "entropy": entropy if n_experts > 1 else np.ones_like(cv),
        "jain": 1.0 / (1.0 + cv**2),
        "dead": (load == 0).sum(-1).astype(float),
        "carriers": (carried < 0.99 - 1e-12).sum(-1) + 1.0,
    }
    empty = total[..., 0] == 0
    return {name: np.where(empty, np.nan, value) for name, value in numbers.items()}


def chance_bands(
    config: MoEConfig, n_tokens: int, seed: int = 0, capacities: tuple[float, ...] = ()
) -> Mapping[str, Band]:
    """Bands of every balance number, and of `groups_reached` and `overlap` (means over tokens), for random routing of
    `n_tokens` tokens. Same config and count, same bands: the seed is fixed and the result kept.

    capacities: most assignments an expert takes, over the mean; "dropped_at_C" is the share of all that goes beyond.
    """
    return _bands(_rule_only(config), n_tokens, seed, capacities)


def bands_between(
    config: MoEConfig, n_tokens: float, seed: int = 0, capacities: tuple[float, ...] = ()
) -> Mapping[str, Band]:
    """`chance_bands` for a number of effective tokens, which need not be whole: between the two nearest powers of 2,
    along 1/sqrt(tokens), so that layers share their simulations; within 3 % of a band's distance from balance.
    `dead`, which falls too fast for that, is binomial: each of E experts, missed with probability (1 - K/E)^tokens."""
    n_tokens = max(n_tokens, 1.0)
    ends = [2 ** math.floor(math.log2(n_tokens)), 2 ** (math.floor(math.log2(n_tokens)) + 1)]
    low, high = (chance_bands(config, end, seed, capacities) for end in ends)
    part = (ends[0] ** -0.5 - n_tokens**-0.5) / (ends[0] ** -0.5 - ends[1] ** -0.5)
    between = {
        name: Band(*((1 - part) * a + part * b for a, b in zip(astuple(band), astuple(high[name]), strict=True)))
        for name, band in low.items()
    }
    e, missed = config.n_routed_experts, (1 - config.num_experts_per_tok / config.n_routed_experts) ** n_tokens
    if 0 < missed < 1:
        between["dead"] = Band(e * missed, *map(float, _binomial_quantiles(e, missed, np.array([0.05, 0.95, 0.999]))))
    return between


def dropped(load: np.ndarray, capacity: float) -> np.ndarray:
    """Share of assignments beyond `capacity` times the mean load, for loads [..., E]; NaN where nothing was routed."""
    load = np.asarray(load, np.float64)
    total = load.sum(-1)
    beyond = np.maximum(load - capacity * load.mean(-1, keepdims=True), 0.0).sum(-1)
    return np.divide(beyond, total, out=np.full(total.shape, np.nan), where=total > 0)


def mean_band(random_values: np.ndarray, n_tokens: float, error: float = 0.0) -> Band:
    """Band of the mean over tokens of a number, given that number for tokens of the random pool.

    error: standard error of the measured mean over documents, where it exceeds that of independent tokens.
    """
    spread = float(random_values.std())
    spread = math.hypot(max(spread / math.sqrt(n_tokens), error), spread / math.sqrt(len(random_values)))
    mean, least, most = (float(values) for values in (random_values.mean(), random_values.min(), random_values.max()))
    ends = (mean + width * spread for width in (-1.645, 1.645, 3.09))
    return Band(mean, *(min(max(end, least), most) for end in ends))  # a mean stays within what tokens can reach


def random_loads(config: MoEConfig, n_tokens: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Loads [runs, E] of random routing, drawn token by token or, where that is too much, from the copula."""
    pool = random_picks(config)
    draw = drawn_loads if n_tokens * runs * config.num_experts_per_tok <= EXACT_DRAWS else copula_loads
    return draw(pool, config, n_tokens, runs, rng)


def drawn_loads(pool: np.ndarray, config: MoEConfig, n_tokens: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Loads [runs, E]: each token takes a random row of the pool, turned by a random group and a random place in the
    group. Turning makes every expert exactly equally likely, however the pool fell out."""
    e, n = config.n_routed_experts, block_size(config)
    rows = pool[rng.integers(len(pool), size=(runs, n_tokens))]  # [runs, T, K]
    turn_group = rng.integers(e // n, size=(runs, n_tokens, 1), dtype=np.int32)
    turn_place = rng.integers(n, size=(runs, n_tokens, 1), dtype=np.int32)
    turned = (rows // n + turn_group) % (e // n) * n + (rows % n + turn_place) % n
    turned += np.arange(runs, dtype=np.int32)[:, None, None] * e
    return np.bincount(turned.ravel(), minlength=runs * e).reshape(runs, e)


def copula_loads(pool: np.ndarray, config: MoEConfig, n_tokens: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Loads [runs, E] with binomial(T, K/E) margins and the pool's correlations, within a group and between groups.

    A token's choice is an indicator vector; its covariance has one value within groups and one between, so two
    eigenvalues: noise inside groups, noise of whole groups. Their Gaussian goes through the binomial quantiles.
    """
    e, n = config.n_routed_experts, block_size(config)
    k, g = config.num_experts_per_tok, e // n
    p = k / e
    if k == e:
        return np.full((runs, e), n_tokens)
    same, other = pair_chances(pool, config)
    inside = p - same
    groups = p + (n - 1) * same - n * other if g > 1 else 0.0
    noise = rng.standard_normal((runs, g, n))
    place = noise - noise.mean(-1, keepdims=True)
    whole = rng.standard_normal((runs, g, 1))
    whole -= whole.mean(1, keepdims=True)
    z = place * np.sqrt(inside) + whole * np.sqrt(max(groups, 0.0) / n)
    z /= np.sqrt(p * (1 - p))
    chance = torch.special.ndtr(torch.from_numpy(z.reshape(runs, e))).numpy()
    return _binomial_quantiles(n_tokens, p, chance)


def pair_chances(pool: np.ndarray, config: MoEConfig) -> tuple[float, float]:
    """P(a token chooses both of two given experts), of one block (see `block_size`) and of two, from its pool."""
    e, k, n = config.n_routed_experts, config.num_experts_per_tok, block_size(config)
    cell = np.arange(len(pool))[:, None] * (e // n) + pool // n
    _, in_block = np.unique(cell, return_counts=True)  # picks of a token in each block that it reaches
    pairs = float((in_block * (in_block - 1)).sum()) / len(pool)  # ordered pairs of one token in one block
    same = pairs / (e * (n - 1)) if n > 1 else 0.0
    return same, (k * (k - 1) - pairs) / (e * (e - n)) if n < e else 0.0


@lru_cache(maxsize=256)
def _bands(config: MoEConfig, n_tokens: int, seed: int, capacities: tuple[float, ...]) -> Mapping[str, Band]:
    rng = np.random.default_rng(seed)
    step = max(CELLS // config.n_routed_experts, 1)
    parts = []
    for start in range(0, RUNS, step):
        loads = random_loads(config, n_tokens, min(step, RUNS - start), rng)
        parts.append(balance_numbers(loads) | {f"dropped_at_{c:g}": dropped(loads, c) for c in capacities})
    bands = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        low, high = np.quantile(values, (0.05, 0.95))
        limit = np.quantile(values, 0.001 if name in HIGHER_IS_BETTER else 0.999)
        bands[name] = Band(float(values.mean()), float(low), float(high), float(limit))
    return bands | {name: mean_band(values, n_tokens) for name, values in per_token(config).items()}


@lru_cache(maxsize=64)
def _routed_pool(config: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Ids [POOL, K] by the rule itself and, of the same scores, ids of plain top-k."""
    generator, e, k = torch.Generator().manual_seed(0), config.n_routed_experts, config.num_experts_per_tok
    ruled, plain = (np.empty((POOL, k), np.int32) for _ in range(2))
    step = max(CELLS // e, 1)
    for start in range(0, POOL, step):
        rows = slice(start, min(start + step, POOL))
        scores = torch.rand(rows.stop - start, e, generator=generator, dtype=torch.float32, device="cpu")
        ruled[rows], plain[rows] = rules.select(scores, config).numpy(), rules.largest(scores, k).numpy()
    return ruled, plain


def random_picks(config: MoEConfig) -> np.ndarray:
    """Ids [POOL, K] of tokens with random scores, chosen by the rule; where it is not known, K of E without groups."""
    return _routed_pool(_rule_only(config))[0]


def per_token(config: MoEConfig) -> dict[str, np.ndarray]:
    """`groups_reached` and `overlap` (experts shared with plain top-k) of every token of the random pool."""
    return _per_token(_rule_only(config))


@lru_cache(maxsize=64)
def _per_token(config: MoEConfig) -> dict[str, np.ndarray]:
    ruled, plain = _routed_pool(config)
    return {"groups_reached": groups_reached(ruled, config), "overlap": overlap(ruled, plain)}


def groups_reached(picks: np.ndarray, config: MoEConfig) -> np.ndarray:
    """Distinct groups that the experts of each token lie in, [T], for picks [T, K]; the id E reaches none."""
    return distinct_places(picks, np.arange(config.n_routed_experts) // config.experts_per_group)


def overlap(picks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of each token's experts are also among `others`, [T], both [T, K]."""
    found = np.zeros(len(picks))
    for slot in range(picks.shape[1]):
        found += (picks[:, slot, None] == others).any(-1)
    return found


def _rule_only(config: MoEConfig) -> MoEConfig:
    """The config less all that does not decide who is chosen, so that equal rules share one entry of the cache."""
    rule = ("n_routed_experts", "num_experts_per_tok", "topk_method", "n_group", "topk_group", "group_score")
    kept = {name: getattr(config, name) for name in rule}
    if config.topk_method in ("balanced", "unknown") or config.n_group == 1:
        kept |= {"topk_method": "greedy", "group_score": None}
    return MoEConfig(hidden_size=1, **kept)


def block_size(config: MoEConfig) -> int:
    """Experts that are exchangeable as a block: a group where groups are chosen, else all of them."""
    return config.experts_per_group if config.limits_groups else config.n_routed_experts


def _binomial_quantiles(n: int, p: float, chance: np.ndarray) -> np.ndarray:
    """The least x with P(X <= x) >= chance, for X ~ binomial(n, p) and chances between 1e-15 and 1 - 1e-15.

    Only x within 12 standard deviations of the mean are looked at: what lies outside has a chance below 1e-30.
    """
    reach = 12 * math.sqrt(n * p) + 40
    least = max(int(n * p - reach), 0)
    x = torch.arange(least, min(int(n * p + reach), n) + 1, dtype=torch.float64, device="cpu")
    ways = math.lgamma(n + 1.0) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    log_mass = ways + x * np.log(p) + (n - x) * np.log1p(-p)
    cdf = log_mass.exp().cumsum(0).numpy()
    return np.minimum(least + np.searchsorted(cdf / cdf[-1], chance), n)  # of large n, lgamma has an error of its own
