"""`moesaic diff`: where two records of the same tokens route differently, and why."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import JSON_HELP, Lang, print_json, progress, provenance, say_how_again

if TYPE_CHECKING:
    from moesaic.trace.compare.diff import Diff

LIMIT = 0.005  # of all (layer, token) pairs may flip by rounding: bfloat16 flips about 1 % of them in a tiny model
WORDS = {
    "en": {
        "working": "Comparing layers",
        "above": "above the limit: {share:.2%} of the experts' sets differ and --max-flip allows {limit:.2%}",
    },
    "zh": {"working": "正在逐层比较", "above": "超出限度：{share:.2%} 的选择不同，--max-flip 允许 {limit:.2%}"},
}


def diff(
    a: Annotated[Path, typer.Argument(help="A recorded .safetensors.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same tokens.")],
    max_flip: Annotated[
        str | None,
        typer.Option(help=f"Share of (layer, token) pairs that may differ, such as 0.5% (unless given: {LIMIT:.1%})."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Coarser dtype of the two models, such as bfloat16; read from the records.")
    ] = None,
    lang: Lang = "en",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Compare the experts in two records of the same tokens: two engines, precisions or checkpoints.

    Exit code 0 where they are identical, or differ by rounding within --max-flip; 1 where another rule or other scores
    made them, or more differ; 2 where they cannot be compared, or nobody can tell why they differ and no --max-flip
    says that its number alone decides.
    """
    limit = LIMIT if max_flip is None else share_of(max_flip)
    from rich.console import Console

    from moesaic.trace.compare.diff import diff as compare
    from moesaic.trace.compare.diff_table import diff_table
    from moesaic.trace.file.reader import load

    one, two = load(a), load(b)
    with progress(WORDS[lang]["working"], one.n_layers, quiet=json) as done:
        found = compare(one, two, precision=precision, done=done)
    if found.a == found.b:  # two records of one model are told apart by their files
        found = replace(found, a=str(a), b=str(b))
    code = exit_code(found, limit, given=max_flip is not None)
    if json:
        print_json(provenance((a, one), (b, two)) | found.to_dict() | {"max_flip": limit, "exit_code": code})
    else:
        Console().print(diff_table(found, lang))
        if found.share > limit:
            print(WORDS[lang]["above"].format(share=found.share, limit=limit))
        say_how_again(one, lang)
    if code:
        raise typer.Exit(code)


def exit_code(found: "Diff", limit: float, *, given: bool) -> int:
    """0 good, 1 a bad verdict, 2 where nobody can tell. given: the limit was asked for, so it alone may decide."""
    if math.isnan(found.share):
        return 2
    if found.share > limit or found.verdict in ("different rule", "different scores"):
        return 1
    told = found.verdict != "cannot tell" or (given and not found.incomplete.any())
    return 0 if told else 2


def share_of(text: str) -> float:
    """0.005 for "0.5%" and for "0.005"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"--max-flip {text!r} is no share: give one such as 0.5% or 0.005")
    return value
