"""A WhatIf in plain words and as a console table. Nothing here prints."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moesaic.trace.reroute.what_if import WhatIf
from moesaic.trace.shown import short_layer, visible, words_of

WORDS = {
    "en": {
        "same": "unchanged settings: the recorded rule, applied to the recorded scores",
        "asked": "what if: {what}",
        "k": "k = {0}", "n_group": "n_group = {0}", "topk_group": "topk_group = {0}",
        "group_score": "group_score = {0}", "group_mask": "group_mask = {0}",
        "no_bias": "no correction bias", "bias": "another correction bias", "deltas": "bias {0}",
        "drop_experts": "without {0}", "and": ", ",
        "reproduced": "the recorded rule gives the recorded experts of all {n:,} (layer, token) pairs",
        "ties": "; in {n} of them by exact ties, which may fall either way",
        "astray": "careful: the recorded rule does not give the recorded experts of {n} (layer, token) pairs, so it is "
        "not the rule of this record",
        "flips": "other experts for {share:.1%} of (layer, token) pairs, {tokens:.1%} of tokens in some layer",
        "load": "busiest expert of a layer: {a:.2f}x its share before, {b:.2f}x after",
        "unused": "experts never used: {a} before, {b} after",
        "nodes": "groups or nodes per token: {a:.2f} before, {b:.2f} after",
        "lost": "score lost: {lost:.2%} of the recorded choice's",
        "gained": "score won: {lost:.2%} of the recorded choice's",
        "kept": "{n} (layer, token) pairs had no experts and stay without",
        "columns": ("layer", "flipped", "max / mean\nload", "CV", "unused", "nodes\n/ token", "score\nlost"),
        "pairs": "before -> after",
    },
    "zh": {
        "same": "设置不变：用记录的规则处理记录的分数",
        "asked": "假如：{what}",
        "k": "k = {0}", "n_group": "n_group = {0}", "topk_group": "topk_group = {0}",
        "group_score": "group_score = {0}", "group_mask": "group_mask = {0}",
        "no_bias": "去掉修正偏置", "bias": "换一组修正偏置", "deltas": "偏置 {0}",
        "drop_experts": "去掉 {0}", "and": "，",
        "reproduced": "按记录的规则推导，全部 {n:,} 个（层，token）的专家与记录一致",
        "ties": "；其中 {n} 个靠完全并列，取谁都可以",
        "astray": "注意：按记录的规则推不出 {n} 个（层，token）的专家，可见这不是该记录真正的规则",
        "flips": "{share:.1%} 的（层，token）会换专家；{tokens:.1%} 的 token 在某层会换",
        "load": "各层最忙的专家：原为均值的 {a:.2f} 倍，改后 {b:.2f} 倍",
        "unused": "从未用到的专家：原有 {a} 个，改后 {b} 个",
        "nodes": "每个 token 到达的组或节点：原为 {a:.2f}，改后 {b:.2f}",
        "lost": "分数损失：原选择总分的 {lost:.2%}", "gained": "分数增加：原选择总分的 {lost:.2%}",
        "kept": "{n} 个（层，token）本来没有专家，照旧",
        "columns": ("层", "换专家", "最大 / 平均\n负载", "CV", "未用\n专家", "到达\n节点", "分数\n损失"),
        "pairs": "改前 -> 改后",
    },
}  # fmt: skip


def sentences(found: WhatIf, lang: str = "en") -> list[str]:
    """What was asked, whether the record can be trusted for it, and what would change."""
    words, rows = words_of(WORDS, lang), found.by_layer()
    astray = sum(row["astray"] for row in rows)
    if astray:
        trust = words["astray"].format(n=astray)
    else:
        ties = sum(row["ties"] for row in rows)
        pairs = sum(row["tokens"] for row in rows) - found.kept
        trust = words["reproduced"].format(n=pairs) + (words["ties"].format(n=ties) if ties else "")
    out = [_asked(found, words), trust]
    if found.kept:
        out.append(words["kept"].format(n=found.kept))
    if not found.changes:
        return out
    out.append(words["flips"].format(share=found.share, tokens=found.token_share))
    peaks = [[row["max_over_mean"][side] or 0.0 for row in rows] for side in (0, 1)]
    out.append(words["load"].format(a=max(peaks[0]), b=max(peaks[1])))
    unused = [sum(row["unused"][side] for row in rows) for side in (0, 1)]
    if any(unused):
        out.append(words["unused"].format(a=unused[0], b=unused[1]))
    nodes = [_mean([row["nodes"][side] for row in rows if row["nodes"]]) for side in (0, 1)]
    if nodes[0] is not None and nodes[1] is not None:
        out.append(words["nodes"].format(a=nodes[0], b=nodes[1]))
    lost = found.to_dict()["score_lost"]
    if lost is not None:
        out.append(words["lost" if lost >= 0 else "gained"].format(lost=abs(lost)))
    return out


def what_if_table(found: WhatIf, lang: str = "en") -> Group:
    """One row a layer, before and after, and the sentences under it."""
    words, rows = words_of(WORDS, lang), found.by_layer()
    with_nodes = found.nodes is not None
    heads = [head for i, head in enumerate(words["columns"]) if with_nodes or i != 5]
    table = Table(box=box.SIMPLE_HEAD, caption=words["pairs"], caption_justify="left", pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for index, row in enumerate(rows):
        cells = [
            f"{row['flipped'] / row['tokens']:.1%}" if row["tokens"] else "–",
            _pair(row["max_over_mean"], ".2f"),
            _pair(row["cv"], ".3f"),
            _pair(row["unused"], "d"),
            *([_pair(row["nodes"], ".2f")] if with_nodes else []),
            "–" if row["score_lost"] is None else f"{row['score_lost']:.2%}",
        ]
        table.add_row(Text(f"{index}  {visible(short_layer(row['layer']))}"), *cells)
    return Group(table, *(Text(line) for line in sentences(found, lang)))


def _asked(found: WhatIf, words: dict[str, Any]) -> str:
    parts = []
    for name, value in found.changes.items():
        if name == "bias":
            deltas = isinstance(value, dict)
            shown = ", ".join(f"e{expert} {delta:+g}" for expert, delta in value.items()) if deltas else ""
            parts.append(words["no_bias" if value is False else "deltas" if deltas else "bias"].format(shown))
        elif name == "drop_experts":
            parts.append(words[name].format(" ".join(f"e{expert}" for expert in value)))
        else:
            parts.append(words[name].format(value))
    return words["asked"].format(what=words["and"].join(parts)) if parts else words["same"]


def _pair(values: list[Any], form: str) -> str:
    return " -> ".join("–" if value is None else f"{value:{form}}" for value in values)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
