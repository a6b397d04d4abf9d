"""`moesaic bench`: engines and their peers side by side on this machine."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.bench.campaign import Campaign
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
    threads: Annotated[str | None, typer.Option(help="Numbers of threads; all cores unless given.")] = None,
    engine: Annotated[str, typer.Option(help="Our engines, with commas; auto is what the library takes.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="Whom to compare with: names, none, or .py files that define PEERS.")
    ] = "eager,batched_mm,grouped_mm,torchtitan",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of a cell, 10 unless given; fewer where one takes long.")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Minutes after which no cell is begun.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.jsonl and report.md.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny grid, to see that everything works.")] = False,
    targets: Annotated[bool, typer.Option("--targets", help="The cells that have a target of their own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure our engines against their peers: correctness first, rounds in turn, share of this machine's ceiling."""
    from moesaic.bench.shapes import ROUNDS, SMOKE_ROUNDS, choose

    given = choose(shapes=shape, tokens=tokens, dtypes=dtype, modes=mode, routings=routing, threads=threads)
    if smoke and targets:
        raise ValueError("--smoke and --targets are both given: use one")
    from moesaic.bench.campaign import Campaign, open_journal
    from moesaic.cli.output import make_ready

    cells = _cells(given, smoke=smoke, targets=targets)
    rounds = rounds or (SMOKE_ROUNDS if smoke else ROUNDS)
    campaign = Campaign(engine.split(","), peers.split(","), rounds, budget if budget is None else 60 * budget)
    if out is not None:
        make_ready(out)
    campaign.journal = open_journal(out, resume=resume)
    left_out = _run(campaign, cells)
    _tell(campaign, left_out, out, as_json=as_json)
    if any(row.kind == "ours" and row.note == "wrong" for result in campaign.journal.results for row in result.rows):
        raise typer.Exit(1)


def _cells(given: dict, *, smoke: bool, targets: bool) -> "list[Cell]":
    """The grid of the flag that is set, with the axes that were given; of the targets, those that fit them."""
    from dataclasses import replace

    from moesaic.bench.machine import num_cores
    from moesaic.bench.shapes import AXES, SMOKE, Grid, smoke_cells
    from moesaic.bench.targets import target_cells

    given = {"threads": (num_cores(),), **given}
    if not targets:
        cells = list(replace(SMOKE if smoke else Grid(), **given).cells())
        return cells + smoke_cells(given["threads"][0]) if smoke else cells
    cells = [cell for threads in given["threads"] for cell in target_cells(threads)]
    found = [cell for cell in cells if all(getattr(cell, AXES[axis]) in values for axis, values in given.items())]
    if not found:
        raise ValueError("--targets has no such cell: leave out --shape, --tokens, --dtype, --mode or --routing")
    return found


def _run(campaign: "Campaign", cells: "list[Cell]") -> "list[Cell]":
    """Run with a bar on stderr; its time left goes by what the cells are expected to take."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from moesaic.bench.campaign import expected_seconds

    expected = [expected_seconds(cell, campaign.rounds) for cell in cells]
    columns = (TextColumn("{task.fields[number]}"), BarColumn(20), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(expected), number="")

        def report(cell: "Cell") -> None:
            number = cells.index(cell)
            bar.update(
                task, description=cell.key, completed=sum(expected[:number]), number=f"{number + 1}/{len(cells)}"
            )

        return campaign.run(cells, report)


def _tell(campaign: "Campaign", left_out: "list[Cell]", out: Path | None, *, as_json: bool) -> None:
    from moesaic.bench.report import aligned, markdown, summary

    command, journal = shlex.join(["moesaic", *sys.argv[1:]]), campaign.journal
    if out is not None:
        (out / "report.md").write_text(markdown(journal, command, left_out), encoding="utf-8")
    if as_json:
        print(json.dumps({"lines": journal.lines, "left_out": [cell.key for cell in left_out]}))
        return
    print(aligned(summary(journal.results)))
    if left_out:
        print(f"left out by the budget: {len(left_out)} cells")
    if out is not None:
        print(f"everybody's numbers: {out / 'report.md'}")
    print(f"reproduce: {command}")
