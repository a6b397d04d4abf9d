"""`moesaic models`: what is known about families of models, by name: presets, rules, spellings, conventions."""

from typing import Annotated, Any

import typer

from moesaic.cli.output import JSON_HELP, Lang, print_json, table
from moesaic.config import MoEConfig
from moesaic.families import (
    ALIASES,
    BY_THEMSELVES,
    CONVENTIONS,
    ENGINE,
    EXPERTS,
    FAMILIES,
    FAMILY_OF,
    FIXED,
    PRESETS,
    ROUTING,
    SPELLINGS,
    rule_of,
)

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "presets": "Presets: MoEConfig.preset(NAME), --config NAME", "families": "Families whose routing is known",
        "preset_columns": ("name", "experts", "top k", "groups", "score", "bias", "family"),
        "family_columns": ("family", "preset", "rule, where config.json does not say it"),
        "kept": "{kept} of {all}", "yes": "yes", "no": "",
        "engine": "Experts that our engines compute (experts_implementation=\"moesaic\"), by activation",
        "engine_columns": ("experts", "families"),
        "themselves": "Families that compute their experts themselves: {names}",
        "spellings": "Fields of config.json that are read by several names",
        "spelling_columns": ("ours", "also read as"),
        "conventions": "Conventions: config.with_convention(NAME) routes as that code does; changes in {name}",
        "convention_columns": ("name", "changes"), "nothing": "nothing",
        "details": "All fields of one of them: moesaic models NAME",
        "fields": "{name}, config {digest}", "field_columns": ("field", "value", "in config.json of {family}"),
        "rule": "the family's rule",
        "served": "its experts are computed: {verdict}", "is_refused": "its experts are {verdict}",
        "verdicts": {},  # in words of this language
        "by_itself": "its experts are computed by the family itself, not through transformers' interface",
        "unknown_gate": "How this family routes is not known here: picks are recorded and judged, steps not derived.",
    },
    "zh": {
        "presets": "预设：MoEConfig.preset(名称)，--config 名称", "families": "路由规则已知的模型系列",
        "preset_columns": ("名称", "专家数", "top k", "组", "打分", "偏置", "系列"),
        "family_columns": ("系列", "预设", "config.json 未写明的规则"),
        "kept": "{all} 取 {kept}", "yes": "有", "no": "",
        "engine": "由本项目引擎计算的专家（experts_implementation=\"moesaic\"），按激活函数",
        "engine_columns": ("专家", "系列"),
        "themselves": "自行计算专家的系列：{names}",
        "spellings": "config.json 中可用多种名称读取的字段",
        "spelling_columns": ("本项目", "也读作"),
        "conventions": "约定：config.with_convention(名称) 按该代码路由；此处为 {name} 的变化",
        "convention_columns": ("名称", "变化"), "nothing": "无",
        "details": "某一项的全部字段：moesaic models 名称",
        "fields": "{name}，配置 {digest}", "field_columns": ("字段", "值", "在 {family} 的 config.json 中"),
        "rule": "系列的规则",
        "served": "其专家由本项目引擎计算：{verdict}", "is_refused": "其专家不由本项目引擎计算（{verdict}）",
        "verdicts": {"refused: normalises the output of every expert before it is weighted":
                     "拒绝：每个专家的输出在加权之前先做归一化"},
        "by_itself": "其专家由该系列自行计算，不经过 transformers 的接口",
        "unknown_gate": "这里不知道该系列的路由规则：可以记录并判断其选择，不能推导各步骤。",
    },
}  # fmt: skip


def models(
    name: Annotated[
        str | None, typer.Argument(help="A preset, a family of transformers, or a convention: all about it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    lang: Lang = "en",
) -> int:
    """Say which models are known: presets, families, names of fields and their spellings, conventions."""
    if name is None:
        print_json(everything()) if as_json else _show_all(lang)
        return 0
    found = about(name)
    print_json(found) if as_json else _show_one(name, found, lang)
    return 0


def everything() -> dict[str, Any]:
    """All that is known, as JSON."""
    return {
        "presets": {name: MoEConfig.preset(name).to_dict() for name in PRESETS},
        "families": {name: about(name) for name in (*FAMILIES, *ROUTING)},
        "experts": ENGINE | dict.fromkeys(BY_THEMSELVES, "by the family itself"),
        "aliases": {name: list(spelled) for name, spelled in ALIASES.items()},
        "conventions": {name: changes_of(name) for name in CONVENTIONS},
    }


def about(name: str) -> dict[str, Any]:
    """All that is known about a preset, a family or a convention. ValueError for any other name."""
    if name in PRESETS:
        config = MoEConfig.preset(name)
        family = FAMILY_OF.get(name)
        return {
            "kind": "preset", "family": family, "config": config.digest(), "fields": config.to_dict(),
            "spellings": {} if family is None else spelled_by(family),
            "experts": None if family is None else ENGINE.get(family),
        }  # fmt: skip
    if rule_of(name) is not None or name in ENGINE or name in BY_THEMSELVES:
        return {
            "kind": "family", "preset": next((p for p, family in FAMILY_OF.items() if family == name), None),
            "rule": rule_of(name), "fixed": list(FIXED.get(name, ())),
            "spellings": spelled_by(name) if name in SPELLINGS else None,
            "experts": ENGINE.get(name, "by the family itself" if name in BY_THEMSELVES else None),
        }  # fmt: skip
    if name in CONVENTIONS:
        return {"kind": "convention", "changes": {preset: changes_of(name, preset) for preset in PRESETS}}
    raise ValueError(
        f"NAME {name!r} is unknown: use a preset ({', '.join(PRESETS)}), a convention ({', '.join(CONVENTIONS)}) or a "
        "family of transformers, such as deepseek_v3; moesaic models lists them"
    )


def spelled_by(family: str) -> dict[str, str]:
    """Our field -> its name in the config.json of this family, for the fields that stand there."""
    return {field: own or field for field, own in SPELLINGS[family].items()}


def changes_of(convention: str, preset: str = "deepseek-v3") -> dict[str, Any]:
    """What a convention changes in a preset: field -> new value."""
    before = MoEConfig.preset(preset)
    try:
        after = before.with_convention(convention).to_dict()
    except ValueError:  # a rule that does not fit these sizes
        return {}
    return {name: value for name, value in after.items() if value != getattr(before, name)}


def _show_all(lang: str) -> None:
    from rich.console import Console

    say, console = WORDS[lang], Console()
    drawn = table(say["presets"], say["preset_columns"])
    for name in PRESETS:
        c = MoEConfig.preset(name)
        groups = say["kept"].format(kept=c.topk_group, all=c.n_group) if c.n_group > 1 else ""
        bias = say["yes" if c.has_correction_bias else "no"]
        sizes = (str(c.n_routed_experts), str(c.num_experts_per_tok))
        drawn.add_row(name, *sizes, groups, c.scoring_func, bias, FAMILY_OF.get(name, ""))
    console.print(drawn)
    drawn = table(say["families"], say["family_columns"])
    for family in (*FAMILIES, *ROUTING):
        preset = next((p for p, f in FAMILY_OF.items() if f == family), "")
        drawn.add_row(family, preset, _in_words(rule_of(family) or {}))
    console.print(drawn)
    drawn = table(say["engine"], say["engine_columns"], whole=False)
    for verdict, names in EXPERTS.items():
        drawn.add_row(say["verdicts"].get(verdict, verdict), ", ".join(names.split()))
    console.print(drawn)
    console.print(say["themselves"].format(names=", ".join(BY_THEMSELVES)) + "\n", markup=False, highlight=False)
    drawn = table(say["spellings"], say["spelling_columns"])
    for name, spelled in ALIASES.items():
        drawn.add_row(name, ", ".join(other for other in spelled if other != name))
    console.print(drawn)
    drawn = table(say["conventions"].format(name="deepseek-v3"), say["convention_columns"])
    for name in CONVENTIONS:
        drawn.add_row(name, _in_words(changes_of(name)) or say["nothing"])
    console.print(drawn)
    console.print(say["details"], markup=False, highlight=False)


def _show_one(name: str, found: dict[str, Any], lang: str) -> None:
    from rich.console import Console

    say, console = WORDS[lang], Console()
    if found["kind"] == "convention":
        drawn = table(name, say["convention_columns"])
        for preset, changes in found["changes"].items():
            drawn.add_row(preset, _in_words(changes) or say["nothing"])
        console.print(drawn)
        return
    family = found.get("family") or ("" if found["kind"] == "preset" else name)
    rule = found.get("fields") or found["rule"]
    if rule is None:
        print(say["unknown_gate"])
    else:
        digest = found.get("config")
        title = say["fields"].format(name=name, digest=digest) if digest else name
        columns = [column.format(family=family) for column in say["field_columns"]]
        drawn = table(title, columns if family else columns[:2])
        for field in dict.fromkeys([*rule, *(found["spellings"] or {})]):
            value = str(rule[field]) if field in rule else ""
            drawn.add_row(field, value, *([_spelled(field, family, found, say)] if family else []))
        console.print(drawn)
    verdict = found["experts"]
    if family in BY_THEMSELVES:
        print(say["by_itself"])
    elif verdict is not None:
        words = say["is_refused" if verdict.startswith("refused") else "served"]
        print(words.format(verdict=say["verdicts"].get(verdict, verdict)))


def _spelled(field: str, family: str, found: dict[str, Any], say: dict[str, Any]) -> str:
    if field in (found["spellings"] or {}):
        return found["spellings"][field]
    return say["rule"] if field in (rule_of(family) or {}) or field in FIXED.get(family, ()) else ""


def _in_words(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
