"""Run statistics as a piece of HTML for notebooks: no scripts, nothing loaded, every text escaped."""

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from moesaic.trace.shown import CELL, html_of, html_said, short_layers, visible, words_of
from moesaic.trace.statistics.measures import Measure, meaning

if TYPE_CHECKING:
    from moesaic.trace.statistics.stats import LayerReport, Stats

COLOURS = {
    "no_data": "#777", "too_few": "#777", "partly": "#777", "chance": "#2e7d32", "balanced": "#2e7d32",
    "imbalanced": "#b26a00", "dead": "#c62828", "collapsed": "#c62828",
}  # fmt: skip
SHOWN = ("max_over_mean", "cv", "entropy", "dead", "groups_reached", "nodes", "margin", "weight_entropy")
WORDS = {
    "en": {"layer": "layer", "verdict": "verdict", "load": "load per expert", "no_data": "no data",
           "about": "( ) chance, 5 to 95 %; [ ] uncertainty of the number, 5 to 95 %. Dashed: a fair share."},
    "zh": {"layer": "层", "verdict": "结论", "load": "各专家负载", "no_data": "没有数据",
           "about": "( ) 随机 5–95%；[ ] 该数自身的误差 5–95%。柱图中的虚线是应得份额。"},
}  # fmt: skip


def stats_html(stats: "Stats", lang: str = "en") -> str:
    """The verdict and one row a layer with its load as bars; the other language is folded below."""
    return html_of(lambda which: _part(stats, which), lang)


def _part(stats: "Stats", lang: str) -> str:
    words = words_of(WORDS, lang)
    names = [name for name in SHOWN if name in stats.values]
    said = html_said(stats.model, stats.verdict(lang).splitlines(), COLOURS[stats.status])
    layers = short_layers([*(report.layer for report in stats.layers), *stats.missing], lang)
    heads = [words["layer"], words["verdict"], words["load"]]
    head = "".join(f'<th style="{CELL}">{escape(text)}</th>' for text in heads)
    head += "".join(f'<th style="{CELL}" title="{escape(meaning(name, lang))}">{escape(name)}</th>' for name in names)
    rows = "".join(_row(report, name, names, lang) for name, report in zip(layers, stats.layers, strict=False))
    rows += "".join(
        f'<tr><td style="{CELL}">{escape(name)}</td>'
        f'<td style="{CELL};color:#777" colspan="{2 + len(names)}">{words["no_data"]}</td></tr>'
        for name in layers[len(stats.layers) :]
    )
    return (
        f'{said}<table style="border-collapse:collapse;margin-top:6px"><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table><div style="color:#777">{escape(words["about"])}</div>'
    )


def _row(report: "LayerReport", layer: str, names: list[str], lang: str) -> str:
    cells = "".join(_cell(report.measures.get(name), lang) for name in names)
    full = escape(visible(report.layer))
    return (
        f'<tr><td style="{CELL}" title="{full}">{escape(layer)}</td>'
        f'<td style="{CELL};text-align:left;color:{COLOURS[report.status]}">{escape(report.verdict(lang))}</td>'
        f'<td style="{CELL}">{_bars(report.load)}</td>{cells}</tr>'
    )


def _cell(measure: Measure | None, lang: str) -> str:
    if measure is None or not measure.is_known:
        return f'<td style="{CELL};color:#777">{words_of(WORDS, lang)["no_data"]}</td>'
    band = ""
    if measure.band is not None:
        left, right = ("(", ")") if measure.kind == "chance" else ("[", "]")
        band = f'<br><span style="color:#777">{left}{measure.low:.3g}–{measure.high:.3g}{right}</span>'
    bold = measure.kind == "chance" and measure.band is not None and not measure.is_chance
    value = f"{measure.value:.4g}"
    return f'<td style="{CELL}">{f"<b>{value}</b>" if bold else value}{band}</td>'


def _bars(load: np.ndarray, width: int = 160, height: int = 28) -> str:
    """Loads as a picture in text form: bars, and a dashed line at the mean. Many share a bar by their maximum."""
    if not load.sum():
        return ""
    step = math.ceil(len(load) / width)
    tops = np.array([load[i : i + step].max() for i in range(0, len(load), step)], dtype=float)
    most = float(tops.max())
    bar = width / len(tops)
    boxes = "".join(
        f'<rect x="{i * bar:.2f}" y="{height * (1 - top / most):.1f}" width="{max(bar * 0.9, 0.5):.2f}" '
        f'height="{height * top / most:.1f}" fill="#4c78a8"/>'
        for i, top in enumerate(tops)
    )
    y = height * (1 - float(load.mean()) / most)
    line = f'<line x1="0" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c62828" stroke-dasharray="3 2"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="load">{boxes}{line}</svg>'
