"""A WhatIf in plain words and as a console table. Nothing here prints."""

from typing import Any

from rich.console import Group
from rich.text import Text

from moesaic.trace.reroute.what_if import WhatIf
from moesaic.trace.shown import console_table, finite, short_layers, words_of

WORDS = {
    "en": {
        "same": "unchanged settings: the recorded rule, applied to the recorded scores",
        "asked": "what if: {what}",
        "k": "k = {0}", "n_group": "n_group = {0}", "topk_group": "topk_group = {0}",
        "group_score": "group_score = {0}", "group_mask": "group_mask = {0}", "assumed": " (assumed: {0})",
        "no_bias": "no correction bias", "bias": "another correction bias", "deltas": "bias {0}",
        "drop_experts": "without {0}", "and": ", ",
        "reproduced": "the recorded rule gives the recorded experts of all {n:,} (layer, token) pairs",
        "ties": "; in {n} of them by exact ties, which may fall either way",
        "astray": "careful: the recorded rule does not give the recorded experts of {n} (layer, token) pairs, so it is "
        "not the rule of this record",
        "flips": "other experts for {share:.1%} of (layer, token) pairs, {tokens:.1%} of tokens in some layer",
        "resized": "another number of experts, so every set and its summed score differ; the smaller sets have "
        "{share:.1%} of their experts in the larger ones",
        "load": "busiest expert of a layer: {a:.2f}x its share before, {b:.2f}x after",
        "unused": "experts never chosen: {a} before, {b} after",
        "groups": "groups per token: {a:.2f} before, {b:.2f} after",
        "nodes": "nodes per token: {a:.2f} before, {b:.2f} after",
        "lost": "score lost: {lost:.2%} of the recorded choice's",
        "gained": "score won: {lost:.2%} of the recorded choice's",
        "kept": "{n} (layer, token) pairs had no experts and stay without",
        "columns": {
            "layer": "layer", "flipped": "flipped", "load": "max / mean\nload", "cv": "CV", "unused": "never\nchosen",
            "groups": "groups\n/ token", "nodes": "nodes\n/ token", "lost": "score\nlost",
        },
        "pairs": "before -> after",
    },
    "zh": {
        "same": "设置不变：用记录的规则处理记录的分数",
        "asked": "假如：{what}",
        "k": "k = {0}", "n_group": "n_group = {0}", "topk_group": "topk_group = {0}",
        "group_score": "group_score = {0}", "group_mask": "group_mask = {0}", "assumed": "（假定：{0}）",
        "no_bias": "去掉选择偏置", "bias": "换一组选择偏置", "deltas": "偏置 {0}",
        "drop_experts": "去掉 {0}", "and": "，",
        "reproduced": "按记录的规则推导，全部 {n:,} 个（层，token）的专家与记录一致",
        "ties": "；其中 {n} 个靠完全并列，取谁都可以",
        "astray": "注意：按记录的规则推不出 {n} 个（层，token）的专家，可见这不是该记录真正的规则",
        "flips": "{share:.1%} 的（层，token）会换专家；{tokens:.1%} 的 token 在某层会换",
        "resized": "专家个数不同，所以每个集合及其总分都不同；较小的集合中有 {share:.1%} 的专家也在较大的集合里",
        "load": "各层最忙的专家：原为均值的 {a:.2f} 倍，改后 {b:.2f} 倍",
        "unused": "未被选中的专家：原有 {a} 个，改后 {b} 个",
        "groups": "每个 token 到达的组数：原为 {a:.2f}，改后 {b:.2f}",
        "nodes": "每个 token 到达的节点数：原为 {a:.2f}，改后 {b:.2f}",
        "lost": "分数损失：原选择总分的 {lost:.2%}", "gained": "分数增加：原选择总分的 {lost:.2%}",
        "kept": "{n} 个（层，token）本来没有专家，照旧",
        "columns": {
            "layer": "层", "flipped": "换专家", "load": "最大 / 平均\n负载", "cv": "CV", "unused": "未被\n选中",
            "groups": "到达\n组数", "nodes": "到达\n节点数", "lost": "分数\n损失",
        },
        "pairs": "改前 -> 改后",
    },
}  # fmt: skip


def sentences(found: WhatIf, lang: str = "en") -> list[str]:
    """What was asked, whether the record can be trusted for it, what would change, and what is not known."""
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
    if found.changes:
        out += _changes(found, rows, words)
    return out + found.notes(lang)


def _changes(found: WhatIf, rows: list[dict[str, Any]], words: dict[str, Any]) -> list[str]:
    if found.before.top_k == found.trace.top_k:
        out = [words["flips"].format(share=found.share, tokens=found.token_share)]
    else:
        had, has = (sum(sum(row["load"][side]) for row in rows) for side in (0, 1))
        both = had - sum(row["assignments_lost"] for row in rows)
        out = [words["resized"].format(share=both / min(had, has))] if had else []
    peaks = [[row["max_over_mean"][side] or 0.0 for row in rows] for side in (0, 1)]
    out.append(words["load"].format(a=max(peaks[0]), b=max(peaks[1])))
    unused = [sum(row["unused"][side] for row in rows) for side in (0, 1)]
    if any(unused):
        out.append(words["unused"].format(a=unused[0], b=unused[1]))
    for name in ("groups", "nodes"):
        reached = [_mean([row[name][side] for row in rows if row[name]]) for side in (0, 1)]
        if reached[0] is not None and reached[1] is not None:
            out.append(words[name].format(a=reached[0], b=reached[1]))
    lost = finite(found.score_lost.nanmean())
    if lost is not None:
        out.append(words["lost" if lost >= 0 else "gained"].format(lost=abs(lost)))
    return out


def what_if_table(found: WhatIf, lang: str = "en") -> Group:
    """One row a layer, before and after, and the sentences under it."""
    heads, rows = _cells(found, lang)
    pairs = [index for index, cells in enumerate(zip(*rows, strict=True)) if index and "->" in "".join(cells)]
    table = console_table(heads, rows, caption=words_of(WORDS, lang)["pairs"], folds=pairs)
    return Group(table, *(Text(line) for line in sentences(found, lang)))


def _cells(found: WhatIf, lang: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table; groups and nodes only where there are some."""
    places = [name for name, there in (("groups", found.groups), ("nodes", found.placement)) if there is not None]
    columns = words_of(WORDS, lang)["columns"]
    heads = [head for name, head in columns.items() if name in places or name not in ("groups", "nodes")]
    rows = []
    for name, row in zip(short_layers(found.before.layers, lang), found.by_layer(), strict=True):
        rows.append([
            name,
            f"{row['flipped'] / row['tokens']:.1%}" if row["tokens"] else "–",
            _pair(row["max_over_mean"], ".2f"),
            _pair(row["cv"], ".3f"),
            _pair(row["unused"], "d"),
            *(_pair(row[place], ".2f") for place in places),
            "–" if row["score_lost"] is None else f"{row['score_lost']:.2%}",
        ])  # fmt: skip
    return heads, rows


def _asked(found: WhatIf, words: dict[str, Any]) -> str:
    parts, before, after = {}, found.before.configs[0], found.trace.configs[0]
    for name, value in found.changes.items():
        if name == "bias":
            deltas = isinstance(value, dict)
            shown = ", ".join(f"e{expert} {delta:+g}" for expert, delta in value.items()) if deltas else ""
            parts[name] = words["no_bias" if value is False else "deltas" if deltas else "bias"].format(shown)
        elif name == "drop_experts":
            parts[name] = words[name].format(" ".join(f"e{expert}" for expert in value))
        else:
            parts[name] = words[name].format(value)
    if "n_group" in parts and after.limits_groups and not before.limits_groups:  # no record says how groups are chosen
        rule = {"topk_group": after.topk_group, "group_score": after.group_score_rule}
        assumed = [words[name].format(value) for name, value in rule.items() if name not in found.changes]
        parts["n_group"] += words["assumed"].format(words["and"].join(assumed)) if assumed else ""
    return words["asked"].format(what=words["and"].join(parts.values())) if parts else words["same"]


def _pair(values: list[Any], form: str) -> str:
    return " -> ".join("–" if value is None else f"{value:{form}}" for value in values)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
