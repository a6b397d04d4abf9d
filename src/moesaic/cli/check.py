"""`moesaic check`: the gate conformance suite on one gate."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.output import JSON_HELP, Lang, print_json, progress, provenance, say_command, table

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.conformance import Report

TEXTS: dict[str, dict[str, Any]] = {
    "en": {
        "columns": ("probe", "level", "result", "what is asked; on failure: what was seen, what it does, what to do"),
        "wrong": "wrong", "fragile": "fragile", "pass": "pass", "fail": "FAIL", "not applicable": "-",
        "title": "{gate}: {experts} experts, top {k}{groups}, {scoring}", "groups": ", {kept} of {n} groups",
        "story": "in production: {story}",
        "do": "→ {advice}",
        "sum": "{passed} passed, {wrong} wrong, {fragile} fragile, {absent} not applicable.",
        "good": "No result differs from the definition.",
        "bad": "Results differ from the definition on lawful input: do not train or serve with this gate.",
        "open": "No probe could tell whether it follows its definition.",
        "fragile_note": "Fragile: right until something usual happens. Each line says what.",
        "unknown": "The rule of this family is not known here: only probes that need no rule were run.",
    },
    "zh": {
        "columns": ("探针", "级别", "结果", "检查什么；失败时：看到了什么、有何后果、该怎么做"),
        "wrong": "错误", "fragile": "脆弱", "pass": "通过", "fail": "失败", "not applicable": "-",
        "title": "{gate}：{experts} 个专家，取前 {k}{groups}，{scoring}", "groups": "，{n} 组保留 {kept} 组",
        "story": "后果：{story}",
        "do": "→ {advice}",
        "sum": "通过 {passed}，错误 {wrong}，脆弱 {fragile}，不适用 {absent}。",
        "good": "没有任何结果与定义不同。",
        "bad": "在合法输入上结果与定义不同：不要用这个门控训练或部署。",
        "open": "没有探针能判断它是否符合定义。",
        "fragile_note": "脆弱：现在正确，遇到常见情况就会出错。每一行说明是什么情况。",
        "unknown": "这里不知道该模型系列的规则：只运行了不需要规则的探针。",
    },
}  # fmt: skip


def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A model folder (its real gates), a config.json (a gate of these sizes, random weights), a preset "
            "such as deepseek-v3 (our gate), or module:Class or module:function, which is imported from the current "
            "folder: that runs its code."
        ),
    ],
    level: Annotated[str, typer.Option(help="wrong: only those probes; fragile: all of them.")] = "fragile",
    layer: Annotated[
        int | None, typer.Option(help="Which MoE layer of a model, from 0 in forward order; the first unless given.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="The rule for module:Class: a preset or a config.json; deepseek-v3 unless given.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on fragile findings too.")] = False,
    lang: Lang = "en",
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Judge a gate by known traps. Exit code 0: as the definition; 1: not; 2: nothing to judge, or an unknown rule."""
    from moesaic.conformance import LEVELS, PROBES
    from moesaic.conformance import check as judge
    from moesaic.conformance.targets import find
    from moesaic.trace.store import versions_here

    if level not in LEVELS:
        raise ValueError(f"--level {level!r} is unknown: use wrong or fragile")
    # what a gate prints, while it is imported or asked, is none of the result
    with contextlib.redirect_stdout(sys.stderr), progress("", len(PROBES)) as done:
        # it names the probe that is asked: a gate that hangs is seen to
        gate = find(target, layer=layer, config=config)
        report = judge(gate, level=level, before=lambda probe: done(1, probe.id))
    if as_json:
        print_json(as_document(report, lang))
    else:
        from rich.console import Console

        console = Console()
        console.print(table_of(report, lang))
        for line in summary_of(report, lang):
            console.print(line, markup=False, highlight=False)
        say_command(versions_here(), None, report.gate.config.digest(), lang)
    if report.failed(None if strict else "wrong"):
        raise typer.Exit(1)
    if report.conforms is None:
        raise typer.Exit(2)


def table_of(report: "Report", lang: str) -> "Table":
    """All probes in order; the numbers and the advice where one failed, the reason where one has nothing to judge."""
    from rich.text import Text

    from moesaic.trace.shown import visible

    texts, config = TEXTS[lang], report.gate.config
    groups = texts["groups"].format(kept=config.topk_group, n=config.n_group) if config.limits_groups else ""
    scoring = config.scoring_func if config.rule_is_known else "?"
    title = texts["title"].format(
        gate=visible(report.gate.name),
        experts=config.n_routed_experts,
        k=config.num_experts_per_tok,
        groups=groups,
        scoring=scoring,
    )
    drawn = table(title, texts["columns"])
    styles = {"pass": "green", "fail": "bold red", "not applicable": "dim"}
    for result in report.results:
        probe = result.probe
        about = Text(getattr(probe.name, lang), style="" if result.outcome == "pass" else "bold")
        if result.says.en:
            about.append("\n" + visible(getattr(result.says, lang)), style="not bold")
        if result.outcome == "fail":
            about.append("\n" + texts["story"].format(story=getattr(probe.story, lang)), style="not bold dim")
            about.append("\n" + texts["do"].format(advice=getattr(probe.advice, lang)), style="not bold italic")
        about.stylize("dim" if result.outcome == "not applicable" else "")
        style = "yellow" if result.outcome == "fail" and probe.level == "fragile" else styles[result.outcome]
        drawn.add_row(probe.id, texts[probe.level], Text(texts[result.outcome], style=style), about)
    return drawn


def summary_of(report: "Report", lang: str) -> list[str]:
    texts = TEXTS[lang]
    counts = {
        "passed": sum(r.outcome == "pass" for r in report.results),
        "absent": sum(r.outcome == "not applicable" for r in report.results),
        "wrong": len(report.failed("wrong")),
        "fragile": len(report.failed("fragile")),
    }
    verdict = {True: "good", False: "bad", None: "open"}[report.conforms]
    lines = [texts["sum"].format(**counts), texts[verdict]]
    if counts["fragile"]:
        lines.append(texts["fragile_note"])
    if not report.gate.config.rule_is_known:
        lines.append(texts["unknown"])
    return lines


def as_document(report: "Report", lang: str) -> dict[str, Any]:
    """The report for a program; texts in the language that was asked for."""
    from moesaic.trace.store import versions_here

    return provenance() | {
        "gate": report.gate.name,
        "config": report.gate.config.to_dict(),
        "digest": report.gate.config.digest(),
        "versions": versions_here(),
        "conforms": report.conforms,
        "results": [
            {
                "probe": r.probe.id,
                "level": r.probe.level,
                "name": getattr(r.probe.name, lang),
                "outcome": r.outcome,
                "says": getattr(r.says, lang),
                "numbers": r.numbers,
                "story": getattr(r.probe.story, lang),
                "advice": getattr(r.probe.advice, lang),
                "references": list(r.probe.references),
            }
            for r in report.results
        ],
    }
