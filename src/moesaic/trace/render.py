"""Console tables of a recorded routing, as rich renderables. Nothing here prints."""

import math
import re
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.trace.preference import Preferences
from moesaic.trace.stats import LayerReport, Measure
from moesaic.trace.steps import Step, versus_topk

WORDS = {
    "en": {
        "columns": ("#", "step", "formula", "shape", "this token"),
        "config": "{e} experts in {g} groups of {n}, {m} groups kept, top {k}",
        "config_flat": "{e} experts, top {k}",
        "ranks": "{n} of {e} experts change rank: ", "no_ranks": "no expert changes rank", "more": " …",
        "open": "{n} of {e} experts open", "sum": "sum {s:.4g}", "min_max": "min {a:.3g}  max {b:.3g}",
        "disagrees": "recorded values differ from the derived ones", "tied": "tie: another machine may differ",
        "versus": "classic top-{k}", "same": "would take the same experts",
        "instead": "would take {a} instead of {b}: score lost {p:.2f} %, groups {x} -> {y}",
        "load": ("layer\nverdict", "max / mean\nload", "MaxVio", "CV", "dead", "groups\n/ token"),
        "chance": "chance 5–95 %", "preference": ("layer", "domain", "experts (times their overall rate)", "least p"),
        "none": "none beyond chance", "no_data": "no data",
        "test": "{p} permutations of {n} sequences; p corrected for all {t} experts (max-statistic), alpha {a:g}",
    },
    "zh": {
        "columns": ("#", "步骤", "公式", "形状", "该 token 的值"),
        "config": "{e} 个专家分为 {g} 组、每组 {n} 个，保留 {m} 组，选 {k} 个",
        "config_flat": "{e} 个专家，选 {k} 个",
        "ranks": "{e} 个专家中 {n} 个名次改变：", "no_ranks": "没有专家改变名次", "more": " …",
        "open": "{e} 个专家中 {n} 个可选", "sum": "和 {s:.4g}", "min_max": "最小 {a:.3g}  最大 {b:.3g}",
        "disagrees": "记录值与推导值不一致", "tied": "并列：换一台机器可能选得不同",
        "versus": "经典 top-{k}", "same": "会选同样的专家",
        "instead": "会选 {a} 而不是 {b}：分数损失 {p:.2f} %，组数 {x} -> {y}",
        "load": ("层\n结论", "最大 / 平均\n负载", "MaxVio", "CV", "未用\n专家", "到达\n组数"),
        "chance": "随机 5–95 %", "preference": ("层", "领域", "专家（相对其总体使用率的倍数）", "最小 p"),
        "none": "没有超出随机的偏好", "no_data": "没有数据",
        "test": "以序列为单位置换 {p} 次（{n} 个序列）；p 已对全部 {t} 个专家校正（最大统计量），显著性水平 {a:g}",
    },
}  # fmt: skip
SPARKS = "▁▂▃▄▅▆▇█"
STYLES = {
    "no_data": "dim", "too_few": "dim", "chance": "green", "balanced": "green",
    "imbalanced": "yellow", "dead": "red", "collapsed": "bold red",
}  # fmt: skip
SPARK_WIDTH = 32  # values drawn one by one; longer rows are pooled by their maximum into half as many bars


def steps_table(steps: Sequence[Step], lang: str = "en", *, versus: bool = False, title: str = "") -> RenderableType:
    """The 15 steps of one token, one row a step. With `versus`, a line says what plain top-k would have taken."""
    words, config = _words(lang), steps[0].config
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, expand=False)
    for name, justify in zip(words["columns"], ("right", "left", "left", "left", "left"), strict=True):
        table.add_column(name, justify=justify, no_wrap=justify == "right", overflow="fold")  # type: ignore[arg-type]
    by_key = {step.stage.key: step for step in steps}
    for step in steps:
        stage = step.stage
        value = _value(step, by_key, words, lang)
        shape = "[" + ", ".join(map(str, step.shape)) + "]"
        name = stage.name_zh if lang == "zh" else stage.name_en
        table.add_row(str(stage.number), name, Text(stage.formula), Text(shape), value)
    key = "config" if config.n_group > 1 else "config_flat"
    parts: list[RenderableType] = [Text(words[key].format(**_sizes(config)), style="dim"), table]
    if versus:
        parts.append(_versus_line(steps, words))
    return Group(*parts)


def load_table(reports: Sequence[LayerReport], lang: str = "en") -> Table:
    """One row a layer: its index in the trace, name and verdict, and balance numbers, each above its chance band."""
    words = _words(lang)
    table = Table(box=box.SIMPLE_HEAD, caption=f"( ) {words['chance']}", caption_justify="left", pad_edge=False)
    grouped = any("groups_reached" in report.measures for report in reports)
    names = ["max_vio", "cv", "dead", *(["groups_reached"] if grouped else [])]
    table.add_column(words["load"][0], overflow="fold")
    for head in words["load"][1 : 2 + len(names)]:
        table.add_column(head, justify="right", no_wrap=True)
    for index, report in enumerate(reports):
        name = Text(f"{index}  {short_layer(report.layer)}\n")
        name.append(report.verdict(lang), style=STYLES[report.status])
        cells = [_measure(report.measures.get(measure), measure, words) for measure in names]
        table.add_row(name, f"{report.load.max()} / {report.load.mean():.4g}", *cells)
    return table


def preference_table(
    preferences: Preferences, layers: Sequence[str] = (), lang: str = "en", *, alpha: float = 0.05, most: int = 6
) -> Table:
    """Per layer and domain, the experts that prefer it beyond chance, strongest first, at most `most` of them."""
    words, found = _words(lang), preferences.found(alpha)
    n_layers, n_experts = found.shape
    caption = words["test"].format(
        p=preferences.permutations, n=preferences.n_sequences, t=n_layers * n_experts, a=alpha
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    for head in words["preference"]:
        table.add_column(head, overflow="fold")
    for layer in range(n_layers):
        name = Text(f"{layer}  {short_layer(layers[layer])}" if layers else str(layer))
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
            table.add_row(name, Text(domain), shown + rest, f"{preferences.p_value[layer, experts].min():.2g}")
            name = Text()
        table.add_section()
    return table


def sparkline(values: Tensor, width: int = SPARK_WIDTH) -> str:
    """Values as bars of eight heights between their least and greatest; longer rows are pooled by their maximum."""
    numbers = values.flatten().tolist()
    if len(numbers) > width:
        step = math.ceil(2 * len(numbers) / width)
        numbers = [max(numbers[i : i + step]) for i in range(0, len(numbers), step)]
    finite = [v for v in numbers if math.isfinite(v)]
    if not finite:
        return " " * len(numbers)
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(SPARKS[int((v - low) / span * 7.999)] if math.isfinite(v) else " " for v in numbers)


def short_layer(name: str) -> str:
    """ "layers.3" for "model.layers.3.mlp"; a name without a number stays."""
    found = re.search(r"[^.]+\.\d+", name)
    return found.group() if found else name


def rank_changes(scores: Tensor, biased: Tensor) -> list[tuple[int, int]]:
    """(expert, places won) of every expert whose rank the bias changes, the greatest change first."""
    before = scores.argsort(descending=True, stable=True).argsort()
    after = biased.argsort(descending=True, stable=True).argsort()
    moved = (before - after).tolist()
    return sorted(((e, up) for e, up in enumerate(moved) if up), key=lambda pair: (-abs(pair[1]), pair[0]))


def _value(step: Step, by_key: dict[str, Step], words: dict, lang: str) -> Text:
    """This token's part of one stage, compactly."""
    if step.value is None:
        return Text(step.note[lang] if step.note else "", style="dim")
    text = Text(_shown(step, by_key, words))
    if step.note:
        text.append(f"  {step.note[lang]}", style="dim")
    if step.agrees is False:
        text.append(f"  ✗ {words['disagrees']}", style="bold red")
    elif step.tied:
        text.append(f"  {words['tied']}", style="yellow")
    return text


def _shown(step: Step, by_key: dict[str, Step], words: dict) -> str:
    key, value = step.stage.key, step.value
    if isinstance(value, tuple):
        return "  ".join(f"e{e}:{_short(w)}" for e, w in zip(value[0].tolist(), value[1].tolist(), strict=True))
    assert value is not None
    if key in ("input", "tokens", "logits", "scores", "masked"):
        finite = value[value.isfinite()]
        limits = words["min_max"].format(a=float(finite.min()), b=float(finite.max())) if len(finite) else ""
        return f"{sparkline(value)}  {limits}"
    if key == "biased":
        return _ranks(by_key["scores"].value, value, words)
    if key == "grouped":
        return " ".join(sparkline(group, 8) for group in value)
    if key == "group_scores":
        kept = by_key["group_mask"].value
        stars = kept.tolist() if isinstance(kept, Tensor) else [False] * len(value)
        return "  ".join(
            f"g{g} {s:.3f}{'*' if k else ''}" for g, (s, k) in enumerate(zip(value.tolist(), stars, strict=True))
        )
    if key == "groups":
        return " ".join(f"g{g}" for g in value.tolist())
    if key == "group_mask":
        return " ".join("1" if kept else "0" for kept in value.tolist())
    if key == "expert_mask":
        return words["open"].format(n=int(value.sum()), e=len(value))
    if key == "experts":
        return " ".join(f"e{e}" for e in value.tolist())
    return "  ".join(_short(w) for w in value.tolist()) + "   " + words["sum"].format(s=float(value.sum()))


def _ranks(scores: object, biased: Tensor, words: dict) -> str:
    assert isinstance(scores, Tensor)
    moved = rank_changes(scores, biased)
    if not moved:
        return words["no_ranks"]
    shown = "  ".join(f"e{e} {'▲' if up > 0 else '▼'}{abs(up)}" for e, up in moved[:4])
    return words["ranks"].format(n=len(moved), e=len(biased)) + shown + (words["more"] if len(moved) > 4 else "")


def _versus_line(steps: Sequence[Step], words: dict) -> Text:
    config = steps[0].config
    head = words["versus"].format(k=config.num_experts_per_tok)
    if next(step for step in steps if step.stage.key == "scores").value is None:
        return Text(f"{head}: {words['no_data']}", style="dim")
    versus = versus_topk(steps)
    if not len(versus.only_topk):
        return Text(f"{head} {words['same']}")
    instead = words["instead"].format(
        a=_experts(versus.only_topk, config),
        b=_experts(versus.only_here, config),
        p=100 * versus.score_lost,
        x=len(versus.groups_topk),
        y=len(versus.groups_here),
    )
    return Text(f"{head} {instead}")


def _experts(ids: Tensor, config: MoEConfig) -> str:
    group = config.experts_per_group
    return " ".join(f"e{e} (g{e // group})" if config.n_group > 1 else f"e{e}" for e in ids.tolist())


def _measure(measure: Measure | None, name: str, words: dict) -> Text:
    if measure is None or measure.band is None:
        return Text(words["no_data"] if measure is not None else "–", style="dim")
    digits = {
        "dead": 0,
        "max_vio": 2,
        "groups_reached": 2,
    }.get(name, 3)
    value, low, high = (_short(number, digits) for number in (measure.value, measure.band.low, measure.band.high))
    text = Text(value, style="" if measure.is_chance else "bold")
    return text.append(f"\n({low}–{high})", style="dim not bold")


def _sizes(config: MoEConfig) -> dict[str, int]:
    return {
        "e": config.n_routed_experts, "g": config.n_group, "n": config.experts_per_group,
        "m": config.topk_group, "k": config.num_experts_per_tok,
    }  # fmt: skip


def _short(value: float, digits: int = 3) -> str:
    """Fixed digits, without the zero before the point: .125, 1.250."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-").startswith("0.") else text


def _words(lang: str) -> dict:
    if lang not in WORDS:
        raise ValueError(f"lang={lang!r} is unknown: use 'zh' or 'en'")
    return WORDS[lang]
