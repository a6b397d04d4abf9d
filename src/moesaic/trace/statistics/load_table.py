"""Console tables of a recorded routing, as rich renderables. Nothing here prints."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from moesaic.trace.shown import console_table, fits, short, short_layers, visible, words_of
from moesaic.trace.statistics.measures import Measure
from moesaic.trace.statistics.preference import Preferences
from moesaic.trace.statistics.stats import LayerReport

WORDS = {
    "en": {
        "load": ("layer\nverdict", "max / mean\nload", "MaxVio", "CV", "dead", "groups\n/ token"),
        "chance": "chance 5–95 %", "preference": ("layer", "domain", "experts (times their overall rate)", "least p"),
        "none": "none beyond chance", "no_data": "no data",
        "test": "{p} permutations of {n} documents, by their first {tokens} tokens; p corrected for all {t} experts "
        "(max-statistic), alpha {a:g}",
        "without": "; no expert found for {domains}", "few": "{domain} ({n} of {all} documents)",
        "comma": ", ", "more": "{n} more",
    },
    "zh": {
        "load": ("层\n结论", "最大 / 平均\n负载", "MaxVio", "CV", "死专家", "到达\n组数"),
        "chance": "随机 5–95%", "preference": ("层", "领域", "专家（相对其总体使用率的倍数）", "最小 p"),
        "none": "没有超出随机的偏好", "no_data": "没有数据",
        "test": "以文档为单位置换 {p} 次（{n} 个文档，各看前 {tokens} 个 token）；"
        "p 已对全部 {t} 个专家校正（最大统计量），显著性水平 {a:g}",
        "without": "；未发现偏好以下领域的专家：{domains}", "few": "{domain}（{all} 个文档中的 {n} 个）",
        "comma": "、", "more": "另外 {n} 个",
    },
}  # fmt: skip
STYLES = {
    "no_data": "dim", "too_few": "dim", "chance": "green", "balanced": "green",
    "imbalanced": "yellow", "dead": "red", "collapsed": "bold red",
}  # fmt: skip


def load_table(reports: Sequence[LayerReport], lang: str = "en") -> Table:
    """One row a layer: its index in the trace, name and verdict, and balance numbers, each above its chance band."""
    words = words_of(WORDS, lang)
    grouped = any("groups_reached" in report.measures for report in reports)
    names = ["max_vio", "cv", "dead", *(["groups_reached"] if grouped else [])]
    rows = []
    for index, (layer, report) in enumerate(zip(short_layers([r.layer for r in reports], lang), reports, strict=True)):
        name = Text(f"{index}  {layer}\n")
        name.append(report.verdict(lang), style=STYLES[report.status])
        cells = [_measure(report.measures.get(measure), measure, words) for measure in names]
        rows.append([name, f"{report.load.max()} / {report.load.mean():.4g}", *cells])
    return console_table(words["load"][: 2 + len(names)], rows, caption=f"( ) {words['chance']}", folds=(0,))


def preference_table(preferences: Preferences, lang: str = "en", *, alpha: float = 0.05, most: int = 6) -> Table:
    """Per layer and domain, the experts that prefer it beyond chance, strongest first, at most `most` of them."""
    words, found = words_of(WORDS, lang), preferences.found(alpha)
    n_layers, n_experts = found.shape
    shown_layers = short_layers(preferences.layers, lang)
    caption = words["test"].format(
        p=preferences.permutations,
        n=sum(preferences.documents),
        tokens=preferences.tokens,
        t=n_layers * n_experts,
        a=alpha,
    )
    caption += _without(preferences, found, words, most)
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left", pad_edge=False)
    columns = (shown_layers, [visible(domain, 60) for domain in preferences.domains], None, ())
    for head, names in zip(words["preference"], columns, strict=True):
        table.add_column(head, no_wrap=names is not None and fits(names), overflow="fold")
    for layer in range(n_layers):
        name = Text(shown_layers[layer])
        if not found[layer].any():
            table.add_row(name, Text("–", style="dim"), Text(words["none"], style="dim"), "", end_section=True)
            continue
        for index, domain in enumerate(preferences.domains):
            experts = (found[layer] & (preferences.domain[layer] == index)).nonzero()[0]
            if not len(experts):
                continue
            experts = experts[(-preferences.lift[layer, experts]).argsort(kind="stable")]
            shown = "  ".join(f"e{e}:{preferences.lift[layer, e]:.1f}x" for e in experts[:most])
            rest = f"  +{len(experts) - most}" if len(experts) > most else ""
            table.add_row(
                name, Text(visible(domain, 60)), shown + rest, f"{preferences.p_value[layer, experts].min():.2g}"
            )
            name = Text()
        table.add_section()
    return table


def _without(preferences: Preferences, found: np.ndarray, words: dict, most: int) -> str:
    """The domains of which no expert was found where others were, and how few documents they may have."""
    less = sorted(set(range(len(preferences.domains))) - set(preferences.domain[found].tolist()))
    if not found.any() or not less:
        return ""
    n, all_of_them = preferences.documents, sum(preferences.documents)
    named = [words["few"].format(domain=visible(preferences.domains[i], 60), n=n[i], all=all_of_them) for i in less]
    more = [words["more"].format(n=len(less) - most)] if len(less) > most else []
    return words["without"].format(domains=words["comma"].join(named[:most] + more))


def _measure(measure: Measure | None, name: str, words: dict) -> Text:
    if measure is None or measure.band is None:
        return Text(words["no_data"] if measure is not None else "–", style="dim")
    digits = {
        "dead": 0,
        "max_vio": 2,
        "groups_reached": 2,
    }.get(name, 3)
    value, low, high = (short(number, digits) for number in (measure.value, measure.band.low, measure.band.high))
    text = Text(value, style="" if measure.is_chance else "bold")
    return text.append(f"\n({low}–{high})", style="dim not bold")
