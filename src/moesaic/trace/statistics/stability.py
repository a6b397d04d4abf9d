"""How far two recordings of the same tokens, of two checkpoints say, route alike."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moesaic.trace.chance.bands import Band, overlap, random_picks
from moesaic.trace.chance.documents import Documents, mean_and_error
from moesaic.trace.shown import visible
from moesaic.trace.statistics.measures import NO_DATA, Measure
from moesaic.trace.store import Trace

SLICE = 65536  # tokens compared at once


@dataclass(frozen=True, eq=False)
class Stability:
    """Per layer: how alike the picks of the same tokens are. Bands are what two unrelated random routings give.

    jaccard: experts common to both over experts of either, mean over tokens. same_set: share of tokens with the very
    same experts. load_correlation: Pearson's, of the experts' loads. errors: of jaccard over documents (of tokens where
    there is one document only), [L].
    checked: whether token ids were there to prove that the tokens are the same.
    """

    layers: tuple[str, ...]
    jaccard: tuple[Measure, ...]
    same_set: tuple[Measure, ...]
    load_correlation: tuple[Measure, ...]
    errors: tuple[float, ...]
    n_tokens: int
    checked: bool

    def to_dict(self) -> dict[str, Any]:
        """All of it for strict JSON; None where there is no data."""
        rows = zip(self.layers, self.jaccard, self.same_set, self.load_correlation, self.errors, strict=True)
        named = [
            {
                "layer": layer,
                "jaccard": _plain(jaccard),
                "jaccard_error": error if math.isfinite(error) else None,
                "same_set": _plain(same),
                "load_correlation": _plain(correlation),
            }
            for layer, jaccard, same, correlation, error in rows
        ]
        return {"tokens": self.n_tokens, "tokens_checked": self.checked, "layers": named}


def stability(a: Trace, b: Trace) -> Stability:
    """Compare two recordings of the same tokens, layer by layer.

    ValueError, with the reason, where tokens, their order, documents, layers or sizes differ: nothing is aligned here
    (`moesaic.trace.compare.diff` tells why picks differ; this tells how much).
    """
    _check_same(a, b)
    documents = Documents.of(a)
    whole = documents if len(documents) > 1 else None
    rows = [_layer(a, b, layer, whole) for layer in range(a.n_layers)]
    jaccard, same, correlation, errors = zip(*rows, strict=True) if rows else ((), (), (), ())
    checked = a.input_ids is not None and b.input_ids is not None
    return Stability(tuple(a.layers), jaccard, same, correlation, errors, len(a), checked)


def set_agreement(a: np.ndarray, b: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index and equality of the sets of experts in picks [T, K] and [T, K], float64 [T] both.

    The id E is in no set; NaN where both sets are empty.
    """
    jaccard, same = np.full(len(a), np.nan), np.full(len(a), np.nan)
    for start in range(0, len(a), SLICE):
        here = slice(start, start + SLICE)
        ours, theirs = a[here].astype(np.int64), b[here].astype(np.int64)
        size_a, size_b = (ours < n_experts).sum(-1), (theirs < n_experts).sum(-1)
        both = overlap(np.where(ours < n_experts, ours, -1), np.where(theirs < n_experts, theirs, -2))
        either = size_a + size_b - both
        some = either > 0
        jaccard[here][some] = both[some] / either[some]
        same[here][some] = (both == either)[some]
    return jaccard, same


def _layer(a: Trace, b: Trace, layer: int, documents: Documents | None) -> tuple[Measure, Measure, Measure, float]:
    e, ours, theirs = a.n_experts, a.picks[layer].numpy(), b.picks[layer].numpy()
    jaccard, same = set_agreement(ours, theirs, e)
    known = int(np.isfinite(jaccard).sum())
    if not known:
        return NO_DATA, NO_DATA, NO_DATA, math.nan
    pool_a, pool_b = random_picks(a.configs[layer]), random_picks(b.configs[layer])
    chance_jaccard, chance_same = set_agreement(pool_a, np.roll(pool_b, 1, axis=0), e)  # other tokens: unrelated
    mean, error = mean_and_error(jaccard, documents)
    loads = [np.bincount(picks.ravel(), minlength=e + 1)[:e].astype(float) for picks in (ours, theirs)]
    return (
        Measure(mean, _mean_band(chance_jaccard, known)),
        Measure(float(np.nanmean(same)), _mean_band(chance_same, known)),
        _correlation(*loads),
        error,
    )


def _mean_band(values: np.ndarray, n_tokens: int) -> Band:
    mean, error = float(values.mean()), float(values.std()) * math.sqrt(1 / n_tokens + 1 / len(values))
    return Band(mean, max(mean - 1.645 * error, 0.0), min(mean + 1.645 * error, 1.0), min(mean + 3.09 * error, 1.0))


def _correlation(a: np.ndarray, b: np.ndarray) -> Measure:
    """Correlation of two loads beside that of two unrelated ones: 0 on average, 1 / sqrt(E - 1) wide."""
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return NO_DATA
    width = 1.645 / math.sqrt(len(a) - 1)
    return Measure(float(np.corrcoef(a, b)[0, 1]), Band(0.0, -width, width, min(1.88 * width, 1.0)))


def _check_same(a: Trace, b: Trace) -> None:
    """Refuse traces whose tokens, layers or sizes differ."""
    for what, ours, theirs in (
        ("tokens", len(a), len(b)),
        ("layers", a.n_layers, b.n_layers),
        ("experts", a.n_experts, b.n_experts),
    ):
        if ours != theirs:
            raise ValueError(f"the traces have {ours} and {theirs} {what}: record both with the same text and layers")
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        if ours != theirs:
            names = f"{visible(ours, 60)!r} and {visible(theirs, 60)!r}"
            raise ValueError(f"the traces have layers {names} in one place: compare checkpoints of one model")
    if a.input_ids is not None and b.input_ids is not None and not torch.equal(a.input_ids, b.input_ids):
        token = int((a.input_ids != b.input_ids).nonzero()[0])
        first = f"{int(a.input_ids[token])} and {int(b.input_ids[token])}"
        raise ValueError(f"token {token} has ids {first}: the texts differ, record both with the same")
    if not torch.equal(a.sequences, b.sequences):
        raise ValueError("the traces split their tokens into documents differently: record both in the same batches")


def _plain(measure: Measure) -> dict[str, Any] | None:
    if not measure.is_known:
        return None
    return {"value": measure.value, "chance": None if measure.band is None else [measure.low, measure.high]}
