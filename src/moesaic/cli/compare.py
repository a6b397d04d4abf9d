"""`moesaic compare`: training runs side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moesaic import __version__
from moesaic.cli.output import JSON_HELP, Lang, print_json, say_command, typed


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `moesaic train` runs, or one that holds them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw them into this .png, .svg or .pdf.")] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer whose loads and biases are drawn; the last one unless given."),
    ] = None,
    lang: Lang = "en",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Loss and balance of several runs: each one over its steps, and ways to balance with their spread over seeds."""
    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: what ends in {out.suffix or 'nothing'} is not drawn: use .png, .svg or .pdf")
    from rich.console import Console

    from moesaic.train.comparing.runs import as_dict, made_with, read_runs
    from moesaic.train.comparing.table import balances_table, runs_table

    found = read_runs(runs)
    tables = runs_table(found, lang), balances_table(found, lang)  # which refuse before anything is drawn or said
    if out is not None:
        from moesaic.trace.figures.figure import save_figure
        from moesaic.train.comparing.figure import runs_figure

        save_figure(runs_figure(found, lang, layer=layer), out, dpi=150)
        print(f"{out}", file=sys.stderr)
    if json:
        print_json({"moesaic": __version__, "command": typed(), **as_dict(found)})
        return
    console = Console()
    for table in tables:
        console.print(table)
    versions, digest = made_with(found)
    say_command(versions, None, digest, lang)
