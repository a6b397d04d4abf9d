"""The 15 steps of a token as a console table. Nothing here prints."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.trace.rule.steps import Step, Steps, versus_topk
from moesaic.trace.shown import console_table, finite, short, sparkline, visible, words_of

WORDS = {
    "en": {
        "columns": ("#", "step", "formula", "shape", "this token"),
        "config": "{e} experts in {g} groups of {n}, {m} groups kept, top {k}",
        "config_flat": "{e} experts, top {k}", "unknown": "{e} experts, top {k}; the rule of this layer is not known",
        "ranks": "{n} of {e} experts change rank: ", "no_ranks": "no expert changes rank", "more": " …",
        "open": "{n} of {e} experts open", "sum": "sum {s:.4g}", "min_max": "min {a:.3g}  max {b:.3g}",
        "disagrees": "recorded values differ from the derived ones", "tied": "tie: another machine may differ",
        "versus": "classic top-{k}", "same": "would take the same experts",
        "instead": "would take {a} instead of {b}: score lost {p:.2f} %, groups {x} -> {y}",
        "no_data": "no data", "why": " ({})", "colon": ": ",
    },
    "zh": {
        "columns": ("#", "步骤", "公式", "形状", "该 token 的值"),
        "config": "{e} 个专家分为 {g} 组、每组 {n} 个，保留 {m} 组，选 {k} 个",
        "config_flat": "{e} 个专家，选 {k} 个", "unknown": "{e} 个专家，选 {k} 个；此层的路由规则未知",
        "ranks": "{e} 个专家中 {n} 个名次改变：", "no_ranks": "没有专家改变名次", "more": " …",
        "open": "{e} 个专家中 {n} 个可选", "sum": "和 {s:.4g}", "min_max": "最小 {a:.3g}  最大 {b:.3g}",
        "disagrees": "记录值与推导值不一致", "tied": "并列：换一台机器可能选得不同",
        "versus": "经典 top-{k}", "same": "会选同样的专家",
        "instead": "会选 {a} 而不是 {b}：分数损失 {p:.2f} %，组数 {x} -> {y}",
        "no_data": "没有数据", "why": "（{}）", "colon": "：",
    },
}  # fmt: skip


def steps_table(steps: Steps, lang: str = "en", *, versus: bool = False, title: str = "") -> Group:
    """The 15 steps of one token, one row a step. With `versus`, a line says what plain top-k would have taken."""
    words = words_of(WORDS, lang)
    texts = (1, 2, 3, 4)
    table = console_table(words["columns"], _rows(steps, lang), title=visible(title), left=texts, folds=texts)
    parts: list[RenderableType] = [Text(_head(steps[0].config, words), style="dim"), table]
    parts += [Text(note) for note in steps.notes(lang)]
    if versus:
        parts.append(_versus_line(steps, words, lang))
    return Group(*parts)


def _rows(steps: Steps, lang: str) -> list[list[Text]]:
    """The cells of the table: texts with styles, none of them markup."""
    words, by_key, rows = words_of(WORDS, lang), {step.stage.key: step for step in steps}, []
    for step in steps:
        stage = step.stage
        shape = "[" + ", ".join(map(str, step.shape)) + "]" if step.shape else "?"
        name = words_of({"en": stage.name_en, "zh": stage.name_zh}, lang)
        plain = (str(stage.number), name, stage.formula, shape)
        rows.append([*map(Text, plain), _value(step, by_key, words, lang)])
    return rows


def _head(config: MoEConfig, words: dict) -> str:
    key = "unknown" if not config.rule_is_known else "config" if config.n_group > 1 else "config_flat"
    return words[key].format(**_sizes(config))


def steps_as_dict(steps: Steps, *, versus: bool = False) -> dict[str, Any]:
    """The same as numbers for JSON. What is not finite is null; `why` says what there is instead of a value."""
    of_token: list[dict[str, Any]] = []
    for step in steps:
        of_token.append({
            "number": step.stage.number, "key": step.stage.key, "name_en": step.stage.name_en,
            "name_zh": step.stage.name_zh, "formula": step.stage.formula, "shape": list(step.shape),
            "value": _plain(step.value), "why": step.note, "agrees": step.agrees, "tied": step.tied,
        })  # fmt: skip
    config = steps[0].config
    notes = {lang: steps.notes(lang) for lang in ("en", "zh")}
    out: dict[str, Any] = {"config": config.digest(), "fields": config.to_dict(), "notes": notes, "steps": of_token}
    if versus:
        scored = next(step for step in steps if step.stage.key == "scores").value is not None
        found = versus_topk(steps) if scored else None
        out["versus_topk"] = None if found is None else {key: _plain(value) for key, value in found._asdict().items()}
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value


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
        pairs = zip(value[0].tolist(), value[1].tolist(), strict=True)
        return "  ".join(f"{_expert(e, step.config)}:{short(w)}" for e, w in pairs)
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
    if key in ("experts", "output"):
        return " ".join(_expert(e, step.config) for e in value.tolist())
    return "  ".join(short(w) for w in value.tolist()) + "   " + words["sum"].format(s=float(value.sum()))


def _ranks(scores: object, biased: Tensor, words: dict) -> str:
    assert isinstance(scores, Tensor)
    moved = rank_changes(scores, biased)
    if not moved:
        return words["no_ranks"]
    shown = "  ".join(f"e{e} {'▲' if up > 0 else '▼'}{abs(up)}" for e, up in moved[:4])
    return words["ranks"].format(n=len(moved), e=len(biased)) + shown + (words["more"] if len(moved) > 4 else "")


def _versus_line(steps: Steps, words: dict, lang: str) -> Text:
    config = steps[0].config
    head = words["versus"].format(k=config.num_experts_per_tok)
    scores = next(step for step in steps if step.stage.key == "scores")
    if scores.value is None:
        why = "" if config.rule_is_known or not scores.note else words["why"].format(scores.note[lang])
        return Text(f"{head}{words['colon']}{words['no_data']}{why}", style="dim")
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


def _expert(number: int, config: MoEConfig) -> str:
    return f"e{number}" if number < config.n_routed_experts else "–"


def _experts(ids: Tensor, config: MoEConfig) -> str:
    group = config.experts_per_group
    return " ".join(f"e{e} (g{e // group})" if config.n_group > 1 else f"e{e}" for e in ids.tolist())


def _sizes(config: MoEConfig) -> dict[str, int]:
    return {
        "e": config.n_routed_experts, "g": config.n_group, "n": config.experts_per_group,
        "m": config.topk_group, "k": config.num_experts_per_tok,
    }  # fmt: skip
