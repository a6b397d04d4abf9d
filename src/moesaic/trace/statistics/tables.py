"""Console tables of run statistics, as rich renderables. Nothing here prints."""

import math
from collections.abc import Sequence

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.trace.shown import console_table, fits, short_layers, sparkline, words_of
from moesaic.trace.statistics.coselection import Coselection
from moesaic.trace.statistics.load_table import STYLES
from moesaic.trace.statistics.measures import Measure, meaning
from moesaic.trace.statistics.stability import Stability
from moesaic.trace.statistics.stats import Stats

WORDS = {
    "en": {
        "numbers": ("number", "median\nlayer", "worst\nlayer", "band there", "what it says"),
        "chance": "chance 5–95 %", "sample": "uncertain 5–95 %", "no_data": "no data",
        "facts": "bands: ( ) {chance}, [ ] {sample}",
        "layers": ("layer", "verdict", "p", "alike x", "seen from", "hot", "starved"),
        "columns": "p: corrected for all experts and layers; alike x: so many alike tokens count as one (design "
                   "effect); seen from: the smallest measured load, over a fair one, that would have been found",
        "missing": "no data", "loads": ("layer", "load of every expert, from 0 to the busiest"),
        "pairs": ("layer", "pair", "together", "by chance", "lift", "p"),
        "no_pairs": "no pair is chosen together beyond chance",
        "pairs_note": "lift: times what the rule and the load of both give; p corrected for all {n:,} pairs",
        "stable": ("layer", "same\nexperts", "Jaccard", "load\ncorrelation"),
    },
    "zh": {
        "numbers": ("指标", "中位层", "最差层", "该层的区间", "含义"),
        "chance": "随机 5–95%", "sample": "估计误差 5–95%", "no_data": "没有数据",
        "facts": "区间：( ) {chance}，[ ] {sample}",
        "layers": ("层", "结论", "p", "设计效应", "可发现", "过热", "饥饿"),
        "columns": "p：已对全部专家和层校正；设计效应：这么多个相似的 token 只相当于一个独立的；"
                   "可发现：能被发现的最小实测负载（相对应得份额）",
        "missing": "没有数据", "loads": ("层", "各专家的负载，从 0 到最忙的"),
        "pairs": ("层", "专家对", "同时选中", "随机期望", "倍数", "p"),
        "no_pairs": "没有专家对同时被选中得超出随机",
        "pairs_note": "倍数：相对规则和两者负载所给出的期望；p 已对全部 {n:,} 对校正",
        "stable": ("层", "专家集合\n相同", "Jaccard", "负载\n相关"),
    },
}  # fmt: skip
MOST_EXPERTS = 4  # ids in a cell


def stats_tables(stats: Stats, lang: str = "en") -> Group:
    """Every number over the layers, beside its band; then every layer with its verdict, those without data too."""
    return Group(numbers_table(stats, lang), layers_table(stats, lang))


def numbers_table(stats: Stats, lang: str = "en") -> Table:
    """One row a number: its median over layers, its worst value with the layer and band, and what it says."""
    from moesaic.trace.statistics.stats_dict import overall

    words = words_of(WORDS, lang)
    found, every = overall(stats), [report.layer for report in stats.layers]
    names = dict(zip(every, short_layers(every, lang), strict=True))
    caption = words["facts"].format(chance=words["chance"], sample=words["sample"])
    rows = []
    for name in stats.values:
        about, says = found[name], Text(meaning(name, lang), style="dim")
        if about is None:
            rows.append([name, Text(words["no_data"], style="dim"), "", "", says])
            continue
        report = next(report for report in stats.layers if report.layer == about["layer"])
        worst = f"{brief(about['worst'])}\n({names[about['layer']]})"
        rows.append([name, brief(about["median"]), worst, band_text(report.measures[name]), says])
    folds = (4,) if fits(list(names.values())) else (2, 4)
    return console_table(words["numbers"], rows, caption=caption, left=(0, 3, 4), folds=folds)


def layers_table(stats: Stats, lang: str = "en") -> Table:
    """One row a layer: verdict, corrected p, and which experts it is about."""
    words = words_of(WORDS, lang)
    names, rows = short_layers([*(report.layer for report in stats.layers), *stats.missing], lang), []
    for name, report in zip(names, stats.layers, strict=False):
        judged = math.isfinite(report.p_value)
        rows.append([
            name, Text(report.verdict(lang), style=STYLES[report.status]),
            f"{report.p_value:.2g}" if judged else "–",
            f"{report.design_effect:.3g}" if report.n_tokens else "–",
            f"{report.least_seen:.2f}x" if judged and math.isfinite(report.least_seen) else "–",
            experts_text(report.hot), experts_text(report.starved),
        ])  # fmt: skip
    rows += [[name, Text(words["missing"], style="dim"), *["–"] * 5] for name in names[len(stats.layers) :]]
    texts = (1, 5, 6)
    return console_table(words["layers"], rows, caption=words["columns"], left=(0, *texts), folds=texts)


def loads_table(stats: Stats, lang: str = "en") -> Table:
    """One row a layer: the load of each expert as a bar, many sharing one by their maximum."""
    names = short_layers([report.layer for report in stats.layers], lang)
    bars = [sparkline(torch.from_numpy(report.load), low=0.0) for report in stats.layers]
    return console_table(words_of(WORDS, lang)["loads"], zip(names, bars, strict=True), left=(0, 1))


def coselection_table(found: Coselection, lang: str = "en", most: int = 10) -> RenderableType:
    """The pairs chosen together beyond chance, strongest first, at most `most` a layer."""
    words = words_of(WORDS, lang)
    note, rows = words["pairs_note"].format(n=found.tests), []
    for index, name in enumerate(short_layers(found.layers, lang)):
        pairs = [pair for pair in found.pairs if pair.layer == index]
        for pair in pairs[:most]:
            numbers = (f"{pair.together:,}", f"{pair.expected:,.1f}", f"{pair.lift:.2f}x", f"{pair.p_value:.2g}")
            rows.append([name, f"e{pair.first} e{pair.second}", *numbers])
        if len(pairs) > most:
            rows.append(["", f"+{len(pairs) - most}", "", "", "", ""])
    if not rows:
        return Group(Text(words["no_pairs"]), Text(note, style="dim"))
    return console_table(words["pairs"], rows, caption=note, left=(0, 1))


def stability_table(found: Stability, lang: str = "en") -> RenderableType:
    """One row a layer: how far two recordings of the same tokens agree, each number above what chance gives; and what
    is not known of them."""
    words, rows = words_of(WORDS, lang), []
    caption = words["facts"].format(chance=words["chance"], sample=words["sample"])
    for index, name in enumerate(short_layers(found.layers, lang)):
        measures = (found.same_set[index], found.jaccard[index], found.load_correlation[index])
        cells = [f"{brief(m.value)}\n{band_text(m)}".rstrip() if m.is_known else words["no_data"] for m in measures]
        rows.append([name, *cells])
    return Group(console_table(words["stable"], rows, caption=caption), *(Text(note) for note in found.notes(lang)))


def band_text(measure: Measure) -> str:
    """ "(.05–.13)" for a band of chance, "[.05–.13]" for the uncertainty of the number itself."""
    if measure.band is None or not measure.is_known:
        return ""
    left, right = ("(", ")") if measure.kind == "chance" else ("[", "]")
    return f"{left}{brief(measure.low)}–{brief(measure.high)}{right}"


def experts_text(ids: Sequence[int]) -> str:
    shown = " ".join(f"e{e}" for e in ids[:MOST_EXPERTS])
    return shown + (f" +{len(ids) - MOST_EXPERTS}" if len(ids) > MOST_EXPERTS else "")


def brief(value: float) -> str:
    """Four digits, without an exponent where it can be done."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"
