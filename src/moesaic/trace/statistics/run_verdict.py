"""The verdict on a whole run in sentences, worst first, and what its layers were judged by."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.trace.shown import NAMED, listed, short_layers, words_of
from moesaic.trace.statistics.verdict import ENOUGH, SICK, UNJUDGED, few_assignments

if TYPE_CHECKING:
    from moesaic.trace.statistics.stats import LayerReport

WORDS = {
    "en": {
        "none": "Nothing can be said: no layer has data.",
        "sick": {"collapsed": "collapsed", "dead": "with dead experts", "imbalanced": "imbalanced"},
        "layers": ("{n} of {all} layers {what}: ", "All {all} layers {what}: ", "The one layer is {what}: "),
        "one": {"dead": "The one layer has dead experts: "},
        "each": "{layer} {verdict}{experts}", "only": "{verdict}{experts}", "and": "; ", "more": "; and {n} more",
        "end": ".", "colon": ": ",
        "sits": " (all load sits on {e})", "carry": " (99 % of the load sits on {e})", "are": " ({e})",
        "chance": ("{n} of {all} layers within chance", "All {all} layers are within chance",
                   "The one layer is within chance",
                   ": no expert has more or less than its share beyond chance."),
        "balanced": ("{n} of {all} layers balanced", "All {all} layers are balanced", "The one layer is balanced",
                     ": beyond chance but small."),
        "seen": ("A measured load of {x:.2f}x an expert's share would have been found in each of these.",
                 "A measured load of {x:.2f}x an expert's share would have been found."),
        "too_few": ("{n} of {all} layers with too few tokens to judge", "All {all} layers have too few tokens to judge",
                    "The one layer has too few tokens to judge",
                    " (it takes {k} assignments per expert): {e}."),
        "alike": ("{n} of {all} layers with too few documents to judge",
                  "All {all} layers have too few documents to judge", "The one layer has too few documents to judge",
                  " (their tokens are alike and count as fewer; read more documents): {e}."),
        "no_data": ("{n} of {all} layers without data, so nothing is said of them", "All {all} layers are without data",
                    "The one layer has no data",
                    ": {e}."),
        "documents": "Judged over {n:,} documents ({t:,} tokens), so it holds for texts like these.",
        "texts": "Judged over the {t:,} tokens of {n} documents only: it is about these texts and says nothing of "
                 "others (more documents are needed for that).",
        "text": "Judged over the {t:,} tokens of one document only: it is about this text and says nothing of others.",
    },
    "zh": {
        "none": "无法下结论：没有任何一层有数据。",
        "sick": {"collapsed": "坍缩", "dead": "有死专家", "imbalanced": "不均衡"},
        "layers": ("{all} 层中有 {n} 层{what}：", "全部 {all} 层都{what}：", "仅有的一层{what}："),
        "one": {},
        "each": "{layer}：{verdict}{experts}", "only": "{verdict}{experts}",
        "and": "；", "more": "；另有 {n} 层", "end": "。", "colon": "：",
        "sits": "（全部负载落在 {e} 上）", "carry": "（99% 的负载落在 {e} 上）", "are": "（{e}）",
        "chance": ("{all} 层中有 {n} 层在随机范围内", "全部 {all} 层都在随机范围内", "仅有的一层在随机范围内",
                   "：没有哪个专家的份额偏离到随机波动之外。"),
        "balanced": ("{all} 层中有 {n} 层均衡", "全部 {all} 层都均衡", "仅有的一层均衡", "：超出随机，但幅度很小。"),
        "seen": ("在这些层里，测得的负载若达到应得份额的 {x:.2f} 倍，就会被发现。",
                 "测得的负载若达到应得份额的 {x:.2f} 倍，就会被发现。"),
        "too_few": ("{all} 层中有 {n} 层 token 太少，无法判断", "全部 {all} 层 token 都太少，无法判断",
                    "仅有的一层 token 太少，无法判断",
                    "（平均每个专家需要 {k} 次分配）：{e}。"),
        "alike": ("{all} 层中有 {n} 层文档太少，无法判断", "全部 {all} 层文档都太少，无法判断",
                  "仅有的一层文档太少，无法判断",
                  "（同一文档的 token 彼此相像，只能算作更少的 token；请读更多文档）：{e}。"),
        "no_data": ("{all} 层中有 {n} 层没有数据，对其不作判断", "全部 {all} 层都没有数据", "仅有的一层没有数据",
                    "：{e}。"),
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
    words, count = words_of(WORDS, lang), len(reports) + len(missing)
    by_status: dict[str, list[LayerReport]] = {}
    for report in reports:
        by_status.setdefault(report.status, []).append(report)
    every = [*(report.layer for report in reports), *missing]
    names = dict(zip(every, short_layers(every, lang), strict=True))

    def say(key: str, n: int, **values: Any) -> str:
        some, every, one, rest = words[key]
        return ((one if count == 1 else every if n == count else some) + rest).format(n=n, all=count, **values)

    said = [_sick(by_status[status], status, count, names, lang) for status in SICK if status in by_status]
    for status in ("balanced", "chance"):
        if status in by_status:
            said.append(say(status, len(by_status[status])))
    judged = [report for report in reports if report.status not in UNJUDGED]
    least = [report.least_seen for report in by_status.get("chance", [])]
    if least and all(map(math.isfinite, least)):
        said.append(words["seen"][count == 1].format(x=max(least)))
    few = by_status.get("too_few", [])
    for key, short in (("too_few", True), ("alike", False)):
        if found := [report.layer for report in few if few_assignments(report.load) == short]:
            said.append(say(key, len(found), k=ENOUGH, e=listed(found, lang)))
    if without := [*(report.layer for report in by_status.get("no_data", [])), *missing]:
        said.append(say("no_data", len(without), e=listed(without, lang)))
    if judged:
        key = "documents" if all(r.by_documents for r in judged) else "text" if n_documents == 1 else "texts"
        said.append(words[key].format(n=n_documents, t=n_tokens))
    elif not few:
        said.insert(0, words["none"])
    return tuple(said)


def _sick(reports: Sequence["LayerReport"], status: str, count: int, names: dict[str, str], lang: str) -> str:
    words, worst = words_of(WORDS, lang), sorted(reports, key=_badness, reverse=True)
    some, every, one = words["layers"]
    head = words["one"].get(status, one) if count == 1 else every if len(reports) == count else some
    head = head.format(n=len(reports), all=count, what=words["sick"][status])
    each = [
        words["each" if r.layer or count > 1 else "only"].format(
            layer=names[r.layer], verdict=_detail(r, lang), experts=_experts(r, words)
        )
        for r in worst[:NAMED]
    ]
    more = words["more"].format(n=len(worst) - NAMED) if len(worst) > NAMED else ""
    return head + words["and"].join(each) + more + words["end"]


def _detail(report: "LayerReport", lang: str) -> str:
    """The layer's verdict, less a status that the sentence has named already."""
    said = report.verdict(lang)
    return said.partition(words_of(WORDS, lang)["colon"])[2] or said


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
