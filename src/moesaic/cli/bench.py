"""`moesaic bench`: engines and their peers side by side on this machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesaic.bench.campaign import Campaign
    from moesaic.bench.runner import Result
    from moesaic.bench.shapes import Cell


def bench(
    shape: Annotated[str | None, typer.Option(help="Shapes, with commas: qwen3-30b, olmoe, dsv3-quarter, ...")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, with commas.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="forward, train-forward, fwd+bwd-fresh, fwd+bwd-accumulate, memory, router."),
    ] = None,
    routing: Annotated[str | None, typer.Option(help="balanced, zipf, all-to-k.")] = None,
    threads: Annotated[str | None, typer.Option(help="Numbers of threads; the machine's cores unless given.")] = None,
    engine: Annotated[str, typer.Option(help="Our engines; auto is what the library takes.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="eager, batched_mm, grouped_mm, torchtitan, none, or a .py file with a list PEERS.")
    ] = "eager,batched_mm,grouped_mm,torchtitan",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a cell; fewer where one takes long.")] = 10,
    budget: Annotated[float | None, typer.Option(min=0, help="Minutes after which no cell is begun.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.jsonl and report.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny grid, to see that everything works.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure our engines against their peers: correctness first, rounds in turn, share of this machine's ceiling."""
    from moesaic.bench.shapes import SMOKE, Grid, choose

    grid = choose(
        SMOKE if smoke else Grid(),
        shapes=shape, tokens=tokens, dtypes=dtype, modes=mode, routings=routing, threads=threads,
    )  # fmt: skip
    from moesaic.bench.campaign import Campaign, open_journal
    from moesaic.bench.contenders import our_engines, peers_named
    from moesaic.bench.machine import num_cores
    from moesaic.cli.output import make_ready

    if threads is None:
        grid = replace(grid, threads=(num_cores(),))
    cells = list(grid.cells())

    engines = engine.split(",")
    our_engines(engines, cells[0].dtype)  # a mistake is told before any work
    others = peers_named(peers.split(","))
    if out is not None:
        make_ready(out)
    journal = open_journal(out, resume=resume)
    campaign = Campaign(engines, others, rounds, journal, None if budget is None else 60 * budget)
    left_out = _run(campaign, cells)
    results = journal.results
    if as_json:
        print(json.dumps({"lines": journal.lines, "left_out": [cell.key for cell in left_out]}))
    else:
        _show(results)


def _run(campaign: "Campaign", cells: "Sequence[Cell]") -> "list[Cell]":
    """Run with a bar on stderr whose time left counts cells."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(20), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(cells))

        def report(cell: "Cell") -> None:
            bar.update(task, description=cell.key, completed=cells.index(cell))

        campaign.report = report
        return campaign.run(cells)


def _show(results: "Sequence[Result]") -> None:
    from rich.console import Console

    from moesaic.bench.report import tables

    console = Console()
    for table in tables(results):
        console.print(table)
