"""Statistics as plain Python values, for JSON."""

import math
from typing import TYPE_CHECKING, Any

from moesaic.trace.chance.bands import HIGHER_IS_BETTER
from moesaic.trace.shown import finite, missing_notes, origin_notes
from moesaic.trace.statistics.measures import Measure, meaning

if TYPE_CHECKING:
    from moesaic.trace.statistics.stats import LayerReport, Stats


def as_dict(stats: "Stats") -> dict[str, Any]:
    """Everything in `stats`; a number that is not known is None, never NaN."""
    return {
        "model": stats.model,
        "tokens": stats.n_tokens,
        "documents": stats.n_documents,
        "alpha": stats.alpha,
        "seed": stats.seed,
        "status": stats.status,
        "healthy": stats.is_healthy,
        "verdict": {lang: stats.verdict(lang).splitlines() for lang in ("en", "zh")},
        "notes": {lang: _notes(stats, lang) for lang in ("en", "zh")},
        "missing": list(stats.missing),
        "placement": None if stats.placement is None else stats.placement.tolist(),
        "meanings": {name: {lang: meaning(name, lang) for lang in ("en", "zh")} for name in stats.values},
        "overall": overall(stats),
        "layers": [_layer(report) for report in stats.layers],
    }


def _notes(stats: "Stats", lang: str) -> list[str]:
    """What the verdict says of the record whatever its loads are."""
    layers = [report.layer for report in stats.layers]
    origins = [report.origin for report in stats.layers]
    return missing_notes(stats.missing, lang) + origin_notes(layers, origins, lang)


def overall(stats: "Stats") -> dict[str, dict[str, Any] | None]:
    """Every number over the layers: its median, and its worst value with the layer that has it; None without data.

    Loads of different layers are never pooled: their experts are different ones.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name, values in stats.values.items():
        known = [(float(value), index) for index, value in enumerate(values) if math.isfinite(value)]
        if not known:
            found[name] = None
            continue
        lowest = name in (*HIGHER_IS_BETTER, "margin", "weight_entropy")
        worst, index = min(known) if lowest else max(known, key=lambda pair: (pair[0], -pair[1]))
        middle = sorted(value for value, _ in known)
        median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
        found[name] = {"median": median, "worst": worst, "layer": stats.layers[index].layer}
    return found


def _layer(report: "LayerReport") -> dict[str, Any]:
    return {
        "layer": report.layer,
        "origin": report.origin,
        "tokens": report.n_tokens,
        "documents": report.n_documents,
        "status": report.status,
        "verdict": {lang: report.verdict(lang) for lang in ("en", "zh")},
        "holds_for": "texts like these" if report.by_documents else "these texts only",
        "p_value": finite(report.p_value),
        "design_effect": finite(report.design_effect),
        "least_seen": finite(report.least_seen),
        "hot": list(report.hot),
        "starved": list(report.starved),
        "dead": list(report.dead),
        "load": report.load.tolist(),
        "measures": {name: _measure(measure) for name, measure in report.measures.items()},
    }


def _measure(measure: Measure) -> dict[str, Any]:
    band = measure.band if measure.is_known else None
    return {
        "value": finite(measure.value),
        "band": None if band is None else {"kind": measure.kind, "low": finite(band.low), "high": finite(band.high)},
    }
