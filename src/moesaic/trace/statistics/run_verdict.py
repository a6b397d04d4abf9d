"""The verdict on a whole run in sentences, worst first, and what its layers were judged by."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.trace.shown import short_layer
from moesaic.trace.statistics.verdict import ENOUGH, SICK, UNJUDGED

if TYPE_CHECKING:
    from moesaic.trace.statistics.stats import LayerReport

NAMED = 3  # layers that a sentence names
WORDS = {
    "en": {
        "none": "Nothing can be said: no layer has data.",
        "sick": {"collapsed": "collapsed", "dead": "with dead experts", "imbalanced": "imbalanced"},
        "layers": ("{n} of {all} layers {what}: ", "The one layer is {what}: "),
        "one": {"dead": "The one layer has dead experts: "},
        "each": "{layer} {verdict}{experts}", "more": "; and {n} more", "end": ".",
        "sits": " (all load sits on {e})", "carry": " (99 % of the load sits on {e})", "are": " ({e})",
        "chance": "{n} of {all} layers within chance: no expert has more or less than its share beyond chance.",
        "balanced": "{n} of {all} layers balanced: beyond chance but small.",
        "seen": "An expert at {x:.2f}x its share would have been found in each of these.",
        "too_few": "{n} of {all} layers with too few tokens to judge (it takes {k} assignments per expert): {e}.",
        "no_data": "{n} of {all} layers without data, so nothing is said of them: {e}.",
        "documents": "Judged over {n:,} documents ({t:,} tokens), so it holds for texts like these.",
        "texts": "Judged over the {t:,} tokens of {n} documents only: it is about these texts and says nothing of "
                 "others (more documents are needed for that).",
        "text": "Judged over the {t:,} tokens of one document only: it is about this text and says nothing of others.",
    },
    "zh": {
        "none": "无法下结论：没有任何一层有数据。",
        "sick": {"collapsed": "坍缩", "dead": "有从未被选中的专家", "imbalanced": "不均衡"},
        "layers": ("{all} 层中有 {n} 层{what}：", "仅有的一层{what}："),
        "one": {},
        "each": "{layer} {verdict}{experts}", "more": "；另有 {n} 层", "end": "。",
        "sits": "（全部负载落在 {e} 上）", "carry": "（99% 的负载落在 {e} 上）", "are": "（{e}）",
        "chance": "{all} 层中有 {n} 层在随机范围内：没有专家的份额偏离得超出随机。",
        "balanced": "{all} 层中有 {n} 层均衡：超出随机，但幅度很小。",
        "seen": "在这些层里，若有专家达到应得份额的 {x:.2f} 倍，都会被发现。",
        "too_few": "{all} 层中有 {n} 层 token 太少，无法判断（平均每个专家需要 {k} 次分配）：{e}。",
        "no_data": "{all} 层中有 {n} 层没有数据，对它们不作判断：{e}。",
        "documents": "依据 {n:,} 个文档（{t:,} 个 token），结论适用于同类文本。",
        "texts": "只依据 {n} 个文档的 {t:,} 个 token：结论仅限于这些文本，不能推及其他文本（那需要更多文档）。",
        "text": "只依据一个文档的 {t:,} 个 token：结论仅限于这段文本，不能推及其他文本。",
    },
}  # fmt: skip


def run_status(reports: Sequence["LayerReport"], missing: Sequence[str]) -> str:
    """The worst status of any layer; "partly" where what was judged is healthy and some layers were not judged."""
    statuses = [report.status for report in reports]
    for sick in SICK:
        if sick in statuses:
            return sick
    unjudged = [status for status in statuses if status in UNJUDGED]
    if len(unjudged) == len(statuses):
        return "too_few" if "too_few" in statuses else "no_data"
    if unjudged or missing:
        return "partly"
    return "balanced" if "balanced" in statuses else "chance"


def run_verdict(
    reports: Sequence["LayerReport"], missing: Sequence[str], n_tokens: int, n_documents: int, lang: str
) -> tuple[str, ...]:
    """Sentences: what is sick and where, what is not, what could not be judged, and how far it reaches."""
    words, count = WORDS[lang], len(reports) + len(missing)
    by_status: dict[str, list[LayerReport]] = {}
    for report in reports:
        by_status.setdefault(report.status, []).append(report)
    said = [_sick(by_status[status], status, count, words, lang) for status in SICK if status in by_status]
    for status in ("balanced", "chance"):
        if status in by_status:
            said.append(words[status].format(n=len(by_status[status]), all=count))
    judged = [report for report in reports if report.status not in UNJUDGED]
    least = [report.least_seen for report in by_status.get("chance", [])]
    if least and all(map(math.isfinite, least)):
        said.append(words["seen"].format(x=max(least)))
    if few := by_status.get("too_few"):
        said.append(words["too_few"].format(n=len(few), all=count, k=ENOUGH, e=_names([r.layer for r in few], words)))
    if without := [*(report.layer for report in by_status.get("no_data", [])), *missing]:
        said.append(words["no_data"].format(n=len(without), all=count, e=_names(without, words)))
    if judged:
        key = "documents" if all(r.by_documents for r in judged) else "text" if n_documents == 1 else "texts"
        said.append(words[key].format(n=n_documents, t=n_tokens))
    elif not few:
        said.insert(0, words["none"])
    return tuple(said)


def _sick(reports: Sequence["LayerReport"], status: str, count: int, words: dict, lang: str) -> str:
    worst = sorted(reports, key=_badness, reverse=True)
    head = words["one"].get(status, words["layers"][1]) if count == 1 else words["layers"][0]
    head = head.format(n=len(reports), all=count, what=words["sick"][status])
    each = [
        words["each"].format(layer=short_layer(r.layer), verdict=_detail(r, lang), experts=_experts(r, words))
        for r in worst[:NAMED]
    ]
    more = words["more"].format(n=len(worst) - NAMED) if len(worst) > NAMED else ""
    return head + ("; " if lang == "en" else "；").join(each) + more + words["end"]


def _detail(report: "LayerReport", lang: str) -> str:
    """The layer's verdict, less a status that the sentence has named already."""
    words = report.verdict(lang)
    return words.split(": " if lang == "en" else "：", 1)[-1] if report.status == "imbalanced" else words


def _experts(report: "LayerReport", words: dict, most: int = 8) -> str:
    """Which experts a verdict is about."""
    if report.status == "collapsed":
        n = int(report.measures["carriers"].value)
        ids = sorted((-report.load).argsort(kind="stable")[:n].tolist())
        key = "sits" if report.load[ids].sum() == report.load.sum() else "carry"
    else:
        ids, key = list(report.dead), "are"
    if not ids:
        return ""
    shown = " ".join(f"e{e}" for e in ids[:most]) + (" …" if len(ids) > most else "")
    return words[key].format(e=shown)


def _badness(report: "LayerReport") -> float:
    """Sorts layers of one status, the worst last."""
    if report.status == "dead":
        return float(len(report.dead))
    return float(report.load.max() / max(report.load.mean(), 1e-9))


def _names(layers: Sequence[str], words: dict) -> str:
    shown = ", ".join(short_layer(layer) for layer in layers[:NAMED])
    return shown + (words["more"].format(n=len(layers) - NAMED) if len(layers) > NAMED else "")
