"""How far two recordings of the same tokens, of two checkpoints say, route alike."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType

from moesaic.trace.chance.bands import Band, mean_band, random_picks
from moesaic.trace.chance.documents import Documents, mean_and_error
from moesaic.trace.compare.aligned import aligned, notes_of_both, tokens_checked, without_data
from moesaic.trace.shown import Shown, counted, finite, words_of
from moesaic.trace.slots import shared
from moesaic.trace.statistics.measures import NO_DATA, Measure
from moesaic.trace.store import Trace

NAMES = {"en": ("first record", "second record"), "zh": ("第一份记录", "第二份记录")}
SLICE = 65536  # tokens compared at once


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Shown):
    """Per layer: how alike the picks of the same tokens are. Bands are what two unrelated random routings give.

    jaccard: experts common to both over experts of either, mean over tokens. same_set: share of tokens with the very
    same experts. load_correlation: Pearson's, of the experts' loads. errors: of jaccard over documents (of tokens where
    there is one document only), [L].
    checked: whether token ids were there to prove that the tokens are the same. missing: MoE layers without data in
    either. notes_en, notes_zh: sentences on that, and on picks that were not read at the experts.
    """

    layers: tuple[str, ...]
    jaccard: tuple[Measure, ...]
    same_set: tuple[Measure, ...]
    load_correlation: tuple[Measure, ...]
    errors: tuple[float, ...]
    n_tokens: int
    checked: bool
    missing: tuple[str, ...]
    notes_en: tuple[str, ...]
    notes_zh: tuple[str, ...]

    def __repr__(self) -> str:
        known = [measure.value for measure in self.same_set if measure.is_known]
        range_of = f"{min(known):.1%} to {max(known):.1%}" if known else "an unknown share"
        first = f"the same experts for {range_of} of {counted(self.n_tokens, 'token')}, by layer"
        return "\n".join([first, *self.notes_en, "(more: .same_set, .jaccard, .load_correlation, .to_dict())"])

    def notes(self, lang: str = "en") -> list[str]:
        """What has to be said of the two records whatever they show."""
        return list(words_of({"en": self.notes_en, "zh": self.notes_zh}, lang))

    def table(self, lang: str = "en") -> RenderableType:
        from moesaic.trace.statistics.tables import stability_table

        return stability_table(self, lang)

    def to_dict(self) -> dict[str, Any]:
        """All of it for strict JSON; None where there is no data."""
        rows = zip(self.layers, self.jaccard, self.same_set, self.load_correlation, self.errors, strict=True)
        named = [
            {
                "layer": layer,
                "jaccard": _plain(jaccard),
                "jaccard_error": finite(error),
                "same_set": _plain(same),
                "load_correlation": _plain(correlation),
            }
            for layer, jaccard, same, correlation, error in rows
        ]
        return {
            "tokens": self.n_tokens,
            "tokens_checked": self.checked,
            "missing": list(self.missing),
            "notes": {"en": list(self.notes_en), "zh": list(self.notes_zh)},
            "layers": named,
        }


def stability(a: Trace, b: Trace) -> Stability:
    """Compare two recordings of the same tokens, layer by layer.

    ValueError, with the reason, where tokens, documents, layers or sizes differ (`moesaic.trace.compare.diff` tells why
    picks differ; this tells how much).
    """
    a, b = aligned(a, b)
    documents = Documents.of(a)
    whole = documents if len(documents) > 1 else None
    rows = [_layer(a, b, layer, whole) for layer in range(a.n_layers)]
    jaccard, same, correlation, errors = zip(*rows, strict=True) if rows else ((), (), (), ())
    en, zh = (tuple(notes_of_both(a, b, lang, names=NAMES[lang])) for lang in ("en", "zh"))
    missing = without_data(a, b)
    return Stability(tuple(a.layers), jaccard, same, correlation, errors, len(a), tokens_checked(a, b), missing, en, zh)


def set_agreement(a: np.ndarray, b: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index and equality of the sets of experts in picks [T, K] and [T, K], float64 [T] both.

    The id E is in no set; NaN where both sets are empty.
    """
    jaccard, same = np.full(len(a), np.nan), np.full(len(a), np.nan)
    for start in range(0, len(a), SLICE):
        here = slice(start, start + SLICE)
        both = shared(a[here], b[here], n_experts)
        either = (a[here] < n_experts).sum(-1) + (b[here] < n_experts).sum(-1) - both
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
        Measure(mean, mean_band(chance_jaccard, known)),
        Measure(float(np.nanmean(same)), mean_band(chance_same, known)),
        _correlation(*loads),
        error,
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> Measure:
    """Correlation of two loads beside that of two unrelated ones: 0 on average, 1 / sqrt(E - 1) wide."""
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return NO_DATA
    width = 1.645 / math.sqrt(len(a) - 1)
    return Measure(float(np.corrcoef(a, b)[0, 1]), Band(0.0, -width, width, min(1.88 * width, 1.0)))


def _plain(measure: Measure) -> dict[str, Any] | None:
    if not measure.is_known:
        return None
    return {"value": measure.value, "chance": None if measure.band is None else [measure.low, measure.high]}
