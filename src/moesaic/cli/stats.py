"""`moesaic stats`: the balance of a recorded run beside chance, and a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.output import JSON_HELP, Lang, check_not_both, print_json, progress, provenance, say_how_again

if TYPE_CHECKING:
    from moesaic.trace.store import Trace

WORDS = {
    "en": {
        "about": "{model}: {layers}, {tokens} of {documents}, top {k} of {e}",
        "prefer": "Which experts prefer which domain?",
        "pairs": "Which experts are chosen together?",
        "against": "The same tokens in {other}:",
        "counting": "Judging layers",
        "unjudged": "not every layer could be judged: ",
        "no_test": "Domains are not tested: {why}.",
    },
    "zh": {
        "about": "{model}：{layers:,} 个 MoE 层，{documents:,} 个文档共 {tokens:,} 个 token，从 {e} 个专家中选 {k} 个",
        "prefer": "哪些专家偏好哪个领域？",
        "pairs": "哪些专家常被同时选中？",
        "against": "同样的 token 在 {other} 中：",
        "counting": "正在逐层判断",
        "unjudged": "并非每一层都能判断：",
        "no_test": "未检验领域偏好：{why}。",
    },
}

Nodes = Annotated[int | None, typer.Option(help="Machines; experts are placed on them in equal runs.")]
Placement = Annotated[
    str | None, typer.Option(help="The node of every expert as a JSON list, or a file of it, instead of --nodes.")
]


def stats(
    trace: Annotated[Path, typer.Argument(help="A recorded .safetensors.")],
    nodes: Nodes = None,
    placement: Placement = None,
    capacity: Annotated[str, typer.Option(help="Capacity factors: what each would drop.")] = "1,1.25,2",
    coselection: Annotated[
        bool, typer.Option("--coselection", help="Pairs of experts chosen together beyond chance; takes longer.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="Another record of the same tokens (another checkpoint, say): how alike.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Chance of any false alarm in the whole run.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the simulations behind the bands.")] = 0,
    lang: Lang = "en",
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Judge the load of every layer of a record, each number beside what chance gives; where its documents have two or
    more labels, test which experts prefer which.

    Exit code 0: every layer was judged and is healthy; 1: a layer is imbalanced, has dead experts or has collapsed; 2:
    layers without data or with too few tokens or documents, and none that is bad.
    """
    factors = _factors(capacity)
    check_not_both("--nodes", nodes, "--placement", placement)
    from moesaic.trace.chance.placement import read_placement
    from moesaic.trace.file.reader import load
    from moesaic.trace.statistics.coselection import coselection as pairs_of
    from moesaic.trace.statistics.stability import stability
    from moesaic.trace.statistics.stats import stats as stats_of

    recorded = load(trace)
    placed = None if placement is None else read_placement(placement, recorded.n_experts)
    other = None if against is None else load(against)
    with progress(WORDS[lang]["counting"], recorded.n_layers, quiet=as_json) as done:
        found = stats_of(recorded, placement=placed, nodes=nodes, capacity=factors, alpha=alpha, seed=seed, done=done)
        alike = None if other is None else stability(recorded, other)
        pairs = pairs_of(recorded, alpha=alpha) if coselection else None
        domains = _domains(recorded, alpha, seed)
    if as_json:
        records = [(trace, recorded)] + ([] if against is None or other is None else [(against, other)])
        print_json(provenance(*records) | _json(found, domains, pairs, alike, alpha))
    else:
        _show(recorded, found, domains, pairs, alike, against, alpha, lang)
    if found.is_sick:
        raise typer.Exit(1)
    if not found.is_healthy:
        raise ValueError(WORDS[lang]["unjudged"] + found.verdict(lang).replace("\n", "" if lang == "zh" else " "))


def _factors(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--capacity {text!r} is not a list of numbers: use 1,1.25,2, say") from None


def _domains(trace: "Trace", alpha: float, seed: int) -> Any:
    """The test of domain preference; {"en": ..., "zh": ...} why there is none; None where no domains are named."""
    from moesaic.trace.statistics.preference import Untestable, domain_preference

    if trace.labels is None or len(set(trace.labels)) < 2 or not len(trace):
        return None
    try:
        return domain_preference(trace, alpha=alpha, seed=seed)
    except Untestable as error:
        return error.words


def _show(
    trace: "Trace", found: Any, domains: Any, pairs: Any, alike: Any, against: Path | None, alpha: float, lang: str
) -> None:
    from rich.console import Console
    from rich.text import Text

    from moesaic.trace.shown import counted, visible
    from moesaic.trace.statistics.load_table import preference_table
    from moesaic.trace.statistics.tables import coselection_table, stability_table, stats_tables

    say, show = WORDS[lang], Console().print
    sizes: dict[str, Any] = {
        "layers": trace.n_layers,
        "tokens": len(trace),
        "documents": found.n_documents,
        "e": trace.n_experts,
    }
    if lang == "en":
        nouns = {"layers": "MoE layer", "tokens": "token", "documents": "document", "e": "expert"}
        sizes = {name: counted(n, nouns[name]) for name, n in sizes.items()}
    model = visible(trace.model, 80) or "–"
    show(Text(say["about"].format(model=model, k=trace.top_k, **sizes)))
    show(Text(found.verdict(lang), style="bold"))
    show(stats_tables(found, lang))
    if isinstance(domains, dict):
        show(Text("\n" + say["no_test"].format(why=domains[lang])))
    elif domains is not None:
        show(Text("\n" + say["prefer"]))
        show(preference_table(domains, lang, alpha=alpha))
    if pairs is not None:
        show(Text("\n" + say["pairs"]))
        show(coselection_table(pairs, lang))
    if alike is not None and against is not None:
        show(Text("\n" + say["against"].format(other=visible(str(against), 80))))
        show(stability_table(alike, lang))
    say_how_again(trace, lang)


def _json(found: Any, domains: Any, pairs: Any, alike: Any, alpha: float) -> dict[str, Any]:
    document = found.to_dict()
    if pairs is not None:
        document["coselection"] = pairs.to_dict()
    if alike is not None:
        document["against"] = alike.to_dict()
    if isinstance(domains, dict):
        document["domains"] = {"not_tested": domains}
    elif domains is not None:
        document["domains"] = domains.to_dict(alpha)
    return document
