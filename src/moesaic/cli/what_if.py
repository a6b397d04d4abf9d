"""`moesaic what-if`: recorded scores routed again by another rule."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import JSON_HELP, Lang, check_not_both, print_json, progress, provenance, say_how_again
from moesaic.cli.stats import Nodes, Placement
from moesaic.cli.trace import check_target

if TYPE_CHECKING:
    from moesaic.trace.reroute.what_if import WhatIf

WORDS = {
    "en": {"working": "Routing layers again", "saved": "Saved: {out}"},
    "zh": {"working": "正在逐层重新路由", "saved": "已保存：{out}"},
}


def what_if(
    trace: Annotated[Path, typer.Argument(help="A .safetensors recorded with scores.")],
    k: Annotated[int | None, typer.Option(help="Experts per token.")] = None,
    n_group: Annotated[int | None, typer.Option(help="Groups of experts; 1 for none.")] = None,
    topk_group: Annotated[int | None, typer.Option(help="Groups kept per token.")] = None,
    group_score: Annotated[str | None, typer.Option(help="top2_sum, max or k_over_m_sum.")] = None,
    group_mask: Annotated[str | None, typer.Option(help="-inf, or zero, the old bug.")] = None,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Leave the correction bias out.")] = False,
    bias: Annotated[str | None, typer.Option(help="Add to biases of experts, such as 41:-0.1,7:0.2.")] = None,
    drop: Annotated[str | None, typer.Option(help="Experts that are never chosen, such as 3,7.")] = None,
    nodes: Nodes = None,
    placement: Placement = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Answer although the record follows another rule.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save the new routing as a record.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out where it exists.")] = False,
    lang: Lang = "en",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Route recorded scores again by another rule: who gets other experts, and what happens to load and groups.

    With nothing changed it proves that the recorded rule gives the recorded experts, exact ties apart.
    """
    check_not_both("--no-bias", no_bias, "--bias", bias)
    check_not_both("--nodes", nodes, "--placement", placement)
    dropped, deltas = numbers(drop), shifts(bias)
    _check_target(out, trace, force)
    from moesaic.trace.chance.placement import read_placement
    from moesaic.trace.file.reader import load
    from moesaic.trace.reroute.what_if import what_if as ask

    recorded = load(trace)
    with progress(WORDS[lang]["working"], recorded.n_layers, quiet=json) as done:
        found = ask(
            recorded,
            k=k,
            n_group=n_group,
            topk_group=topk_group,
            group_score=group_score,
            group_mask=group_mask,
            bias=False if no_bias else deltas,
            drop_experts=dropped,
            nodes=nodes,
            placement=None if placement is None else read_placement(placement, recorded.n_experts),
            anyway=anyway,
            done=done,
        )
        if out is not None:
            found.trace.save(out)
    if json:
        print_json(provenance((trace, recorded)) | found.to_dict() | {"saved": None if out is None else str(out)})
    else:
        _show(found, out, lang)
        say_how_again(recorded, lang)


def _show(found: "WhatIf", out: Path | None, lang: str) -> None:
    from rich.console import Console

    from moesaic.trace.reroute.what_if_table import what_if_table
    from moesaic.trace.shown import visible

    Console().print(what_if_table(found, lang))
    if out is not None:
        print(WORDS[lang]["saved"].format(out=visible(str(out))))


def _check_target(out: Path | None, trace: Path, force: bool) -> None:
    """Refuse a file that cannot or should not be written, before any work."""
    if out is None:
        return
    if out.resolve() == trace.resolve():
        raise ValueError(f"--out {out} is the record itself: give another file")
    check_target(out)
    if out.exists() and not force:
        raise ValueError(f"--out {out}: exists already: give another file, or --force to replace it")


def numbers(text: str | None) -> list[int]:
    """[3, 7] for "3,7"."""
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--drop {text!r} is not understood: give experts such as 3,7") from None


def shifts(text: str | None) -> dict[int, float] | None:
    """{41: -0.1} for "41:-0.1"."""
    if text is None:
        return None
    try:
        pairs = [(int(expert), float(delta)) for expert, delta in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--bias {text!r} is not understood: give experts and what to add, such as 41:-0.1") from None
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(expert for index, (expert, _) in enumerate(pairs) if expert in dict(pairs[:index]))
        raise ValueError(f"--bias {text!r} names expert {twice} twice: give one number for each expert")
    return found
