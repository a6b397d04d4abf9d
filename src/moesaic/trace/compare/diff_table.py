"""A Diff in plain words and as a console table. Nothing here prints."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moesaic.trace.compare.diff import Diff
from moesaic.trace.shown import short_layer, visible, words_of

WORDS = {
    "en": {
        "identical": "identical: the same experts everywhere",
        "near-ties": "near-ties: rounding explains the flips",
        "different scores": "different scores: the rule is the same, the scores are not",
        "different rule": "different rule: rounding does not explain the flips",
        "cannot tell": "cannot tell",
        "flips": "other experts: {share:.2%} of (layer, token) pairs, {tokens:.1%} of {n:,} tokens in some layer",
        "first": "first split: layer {layer}, token {token}",
        "margin": "margin at the splits: median {margin:.2g}",
        "ties": "exact ties among the flips: {n}",
        "incomplete": "fewer experts in one of the two: {n} (layer, token) pairs, not compared",
        "columns": (
            "layer", "flips", "share", "exact\nties", "margin\n(median)", "weights\ndiffer by", "scores\ndiffer by",
        ),
    },
    "zh": {
        "identical": "一致：处处选择相同的专家",
        "near-ties": "近似并列：舍入误差可以解释这些分歧",
        "different scores": "分数不同：规则相同，分数不同",
        "different rule": "规则不同：舍入误差解释不了这些分歧",
        "cannot tell": "无法判断",
        "flips": "专家不同：占（层，token）的 {share:.2%}；{n:,} 个 token 中有 {tokens:.1%} 在某层不同",
        "first": "最先分歧：第 {layer} 层，token {token}",
        "margin": "分歧处的差距：中位数 {margin:.2g}",
        "ties": "其中完全并列的分歧：{n}",
        "incomplete": "一方专家较少的（层，token）：{n}，不参与比较",
        "columns": ("层", "分歧", "比例", "完全\n并列", "差距\n（中位数）", "权重\n相差", "分数\n相差"),
    },
}  # fmt: skip


def sentences(found: Diff, lang: str = "en") -> list[str]:
    """The verdict, how much differs and where it begins, then the reasons."""
    words = words_of(WORDS, lang)
    out = [words[found.verdict]]
    if found.flips.any():
        out.append(words["flips"].format(share=found.share, tokens=found.token_share, n=found.flips.shape[1]))
        layer = int(found.first_split.min())
        out.append(words["first"].format(layer=layer, token=int(found.flips[layer].nonzero()[0])))
        margin = found.to_dict()["margin"]
        if margin is not None:
            out.append(words["margin"].format(margin=margin))
    if count := int(found.ties.sum()):
        out.append(words["ties"].format(n=count))
    if count := int(found.incomplete.sum()):
        out.append(words["incomplete"].format(n=count))
    return out + [reason[lang] for reason in found.judgement.reasons]


def diff_table(found: Diff, lang: str = "en") -> Group:
    """One row a layer below the names of the two, and the sentences under it."""
    words = words_of(WORDS, lang)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(words["columns"]):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for index, entry in enumerate(found.by_layer()):
        share = f"{entry.flips / entry.compared:.2%}" if entry.compared else "–"
        table.add_row(
            Text(f"{index}  {visible(short_layer(entry.layer))}"),
            str(entry.flips),
            share,
            str(entry.ties) if entry.margin is not None or entry.ties else "–",
            *(_small(value) for value in (entry.margin, entry.weight_difference, entry.score_difference)),
        )
    names = Text(f"a: {visible(found.a)}   b: {visible(found.b)}", style="dim")
    return Group(names, table, *(Text(line) for line in sentences(found, lang)))


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
