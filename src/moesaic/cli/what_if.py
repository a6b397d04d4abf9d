"""`moesaic what-if`: recorded scores routed again by another rule."""

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import check_lang, print_json, say_how_again

WORDS = {
    "en": {"working": "Routing again...", "saved": "Saved: {out}"},
    "zh": {"working": "正在重新路由……", "saved": "已保存：{out}"},
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
    force: Annotated[bool, typer.Option("--force", help="Answer although the record follows another rule.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save the new routing as a record.")] = None,
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Route recorded scores again by another rule: who gets other experts, and what happens to load and groups.

    With nothing changed it proves that the recorded rule gives the recorded experts, exact ties apart.
    """
    check_lang(lang)
    if no_bias and bias is not None:
        raise ValueError("--no-bias and --bias are both given: use one of them")
    dropped, deltas = numbers(drop), shifts(bias)
    if out is not None and out.resolve() == trace.resolve():
        raise ValueError(f"--out {out} is the record itself: give another file")
    from rich.console import Console

    from moesaic.trace.file.reader import load
    from moesaic.trace.reroute.what_if import what_if as ask
    from moesaic.trace.reroute.what_if_table import what_if_table
    from moesaic.trace.shown import visible

    with Console(stderr=True).status(WORDS[lang]["working"]):
        recorded = load(trace)
        found = ask(
            recorded,
            k=k,
            n_group=n_group,
            topk_group=topk_group,
            group_score=group_score,
            group_mask=group_mask,
            bias=False if no_bias else deltas,
            drop_experts=dropped,
            force=force,
        )
        if out is not None:
            found.trace.save(out)
    if json:
        print_json(found.to_dict() | {"saved": None if out is None else str(out)})
        return
    Console().print(what_if_table(found, lang))
    if out is not None:
        print(WORDS[lang]["saved"].format(out=visible(str(out))))
    say_how_again(recorded, lang)


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
        return {int(expert): float(delta) for expert, delta in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--bias {text!r} is not understood: give experts and what to add, such as 41:-0.1") from None
