"""The numbers of one line of a run log: how even the load of every layer was, beside chance, and where its bias is."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moesaic.config import MoEConfig
from moesaic.hf.bias_home import BiasHome
from moesaic.trace.chance.bands import Band, bands_between
from moesaic.train.monitor.lines import LOAD_COLUMNS, PERCENTILES

# Token counts are rounded to 1/32 of the power of 2 below: a band is then off by 0.8 % at most, and however batches
# vary, 32 bands serve all between n and 2n tokens.
GRID = 32


def load_numbers(loads: Sequence[np.ndarray], rules: Sequence[MoEConfig]) -> dict[str, list[Any]]:
    """Columns with a value a layer, for `loads` of counts [E]; None where a layer got no token."""
    columns: dict[str, list[Any]] = {name: [None] * len(loads) for name in LOAD_COLUMNS}
    for size in {len(load) for load in loads}:
        rows = [row for row, load in enumerate(loads) if len(load) == size and load.any()]
        if not rows:
            continue
        table = np.stack([loads[row] for row in rows])
        means = table.mean(1)
        ordered = np.sort(table / means[:, None], axis=1)
        found = {
            "tokens": [tokens_of(loads[row], rules[row]) for row in rows],
            "percentiles": percentiles(ordered).round(4).tolist(),
            "max_vio": (ordered[:, -1] - 1.0).round(4).tolist(),
            "dead": (table == 0).sum(1).tolist(),
            "hottest": table.argmax(1).tolist(),
            "coldest": table.argmin(1).tolist(),
        }
        bands: dict[tuple[int, float], list[float]] = {}  # most layers share one, and a rule's hash is slow
        for row, tokens, mean in zip(rows, found["tokens"], means.tolist(), strict=True):
            if (id(rules[row]), mean) not in bands:
                bands[id(rules[row]), mean] = max_vio_band(rules[row], tokens, mean)
        found["chance"] = [bands[id(rules[row]), mean] for row, mean in zip(rows, means.tolist(), strict=True)]
        for name, values in found.items():
            for row, value in zip(rows, values, strict=True):
                columns[name][row] = value
    return columns


def percentiles(ordered: np.ndarray) -> np.ndarray:
    """PERCENTILES of sorted rows, linear between values: a third of the time of numpy's own, and this is every step."""
    place = np.array(PERCENTILES) / 100 * (ordered.shape[1] - 1)
    below = place.astype(int)
    above = np.minimum(below + 1, ordered.shape[1] - 1)
    return ordered[:, below] + (ordered[:, above] - ordered[:, below]) * (place - below)


@lru_cache(maxsize=4096)
def max_vio_band(rule: MoEConfig, n_tokens: int, mean: float) -> list[float]:
    """[low, high], outwards to what a load of that mean can reach: counts are whole, so MaxVio has steps of 1/mean,
    and a band for a rounded number of tokens, between two of them, would hold too little."""
    band = chance(rule, n_tokens)["max_vio"]
    low, high = math.floor((1 + band.low) * mean + 1e-6) / mean - 1, math.ceil((1 + band.high) * mean - 1e-6) / mean - 1
    return [round(low, 4), round(high, 4)]


def tokens_of(load: np.ndarray, rule: MoEConfig) -> int:
    """How many tokens chose K experts each to give this load."""
    return round(float(load.sum()) / rule.num_experts_per_tok)


def chance(rule: MoEConfig, n_tokens: int) -> dict[str, Band]:
    """Chance bands for about that many tokens; rules and counts that were asked for before cost nothing."""
    step = max(1, 2 ** (max(n_tokens, 1).bit_length() - 1) // GRID)
    return _chance(rule, max(1, round(n_tokens / step) * step))


@lru_cache(maxsize=4096)
def _chance(rule: MoEConfig, n_tokens: int) -> dict[str, Band]:
    return dict(bands_between(rule, n_tokens))


@torch.no_grad()
def read_biases(homes: Sequence[BiasHome | None]) -> list[Any]:
    """[least, greatest, mean] of the bias of each layer, None where it has none: one transfer from the device."""
    whole = [home.whole for home in homes if home is not None]
    if not whole:
        return [None] * len(homes)
    values = torch.cat([bias.float().to(whole[0].device) for bias in whole]).cpu().numpy()
    numbers = iter(bias_numbers(values, [len(bias) for bias in whole]))
    return [None if home is None else next(numbers) for home in homes]


def bias_numbers(values: np.ndarray, sizes: Sequence[int]) -> list[list[float | None]]:
    """[least, greatest, mean] of biases that lie one after the other; None for a value that is not finite."""
    if not sizes:
        return []
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(values, starts, dtype=np.float64)
    found = np.stack([np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), sums / sizes], axis=1)
    rows = found.round(6).tolist()
    return rows if np.isfinite(found).all() else [[x if math.isfinite(x) else None for x in row] for row in rows]
