"""A Diff in plain words and as a console table. Nothing here prints."""

from rich.console import Group
from rich.text import Text

from moesaic.trace.compare.diff import Diff
from moesaic.trace.shown import console_table, counted, short_layers, visible, words_of

WORDS = {
    "en": {
        "identical": "identical: the same experts everywhere",
        "near-ties": "near-ties: rounding explains the flips",
        "different scores": "different scores: the rule is the same, the scores are not",
        "different rule": "different rule: rounding does not explain the flips",
        "other weights": "different rule: the same experts, other weights",
        "cannot tell": "cannot tell",
        "flips": "other experts: {share:.2%} of (layer, token) pairs, {tokens:.1%} of {n:,} tokens in some layer",
        "first": "first split: {layer}, token {token}",
        "margin": "margin at the splits: median {margin:.2g}",
        "ties": "exact ties among the first splits: {n}",
        "incomplete": "fewer experts in one of the two: {n}, not compared",
        "columns": (
            "layer", "flips", "share", "exact\nties", "margin\n(median)", "weights\ndiffer by", "scores\ndiffer by",
        ),
    },
    "zh": {
        "identical": "一致：处处选择相同的专家",
        "near-ties": "近似并列：舍入误差可以解释这些分歧",
        "different scores": "分数不同：规则相同，分数不同",
        "different rule": "规则不同：舍入误差解释不了这些分歧",
        "other weights": "规则不同：专家相同，权重不同",
        "cannot tell": "无法判断",
        "flips": "专家不同：占（层，token）的 {share:.2%}；{n:,} 个 token 中有 {tokens:.1%} 在某层不同",
        "first": "最先分歧：{layer}，token {token}",
        "margin": "分歧处的差距：中位数 {margin:.2g}",
        "ties": "最初分歧中有 {n} 处是完全并列",
        "incomplete": "一方专家较少的（层，token）有 {n} 个，不参与比较",
        "columns": ("层", "分歧", "比例", "完全\n并列", "差距\n（中位数）", "权重\n相差", "分数\n相差"),
    },
}  # fmt: skip


def sentences(found: Diff, lang: str = "en") -> list[str]:
    """The verdict, how much differs and where it begins, the reasons, then what is not known of the records."""
    words = words_of(WORDS, lang)
    flipped = bool(found.flips.any())
    out = [words["other weights" if found.verdict == "different rule" and not flipped else found.verdict]]
    if flipped:
        out.append(words["flips"].format(share=found.share, tokens=found.token_share, n=found.flips.shape[1]))
        layer = int(found.first_split.min())
        name = short_layers(found.layers, lang)[layer]
        out.append(words["first"].format(layer=name, token=int(found.flips[layer].nonzero()[0])))
        if (margin := found.margin) is not None:
            out.append(words["margin"].format(margin=margin))
    if count := int(found.ties.sum()):
        out.append(words["ties"].format(n=count))
    if count := int(found.incomplete.sum()):
        pairs = counted(count, "(layer, token) pair") if lang == "en" else count
        out.append(words["incomplete"].format(n=pairs))
    out += [reason[lang] for reason in found.judgement.reasons]
    return [*out, *(found.notes_zh if lang == "zh" else found.notes_en)]


def diff_table(found: Diff, lang: str = "en") -> Group:
    """One row a layer below the names of the two, and the sentences under it."""
    table = console_table(words_of(WORDS, lang)["columns"], _rows(found, lang))
    return Group(Text(_names(found), style="dim"), table, *(Text(line) for line in sentences(found, lang)))


def _names(found: Diff) -> str:
    return f"a: {visible(found.a)}   b: {visible(found.b)}"


def _rows(found: Diff, lang: str) -> list[list[str]]:
    """The cells of the table."""
    rows = []
    for name, entry in zip(short_layers(found.layers, lang), found.by_layer(), strict=True):
        share = f"{entry.flips / entry.compared:.2%}" if entry.compared else "–"
        ties = str(entry.ties) if entry.margin is not None or entry.ties else "–"
        numbers = (entry.margin, entry.weight_difference, entry.score_difference)
        rows.append([name, str(entry.flips), share, ties, *map(_small, numbers)])
    return rows


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
