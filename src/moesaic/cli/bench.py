"""`moesaic bench`: engines and their peers side by side on this machine."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import check_not_both, make_ready

if TYPE_CHECKING:
    from moesaic.bench.campaign import Campaign
    from moesaic.bench.shapes import Cell


def bench(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shapes, with commas: qwen3-30b, olmoe and dsv3-quarter unless given; dsv3-64-half, dsv3-ep4, "
            "mixtral-half, mixtral, gpt-oss-20b, and twelve that SonicMoE is measured with, such as sonic-30b-n512."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, with commas; 1,16,128,512,2048 unless given.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; the first two unless given.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="forward (unless given), train-forward (keeps what backward needs), fwd+bwd-fresh (gradients are new "
            "memory), fwd+bwd-accumulate (they are added to), memory (peak), router."
        ),
    ] = None,
    routing: Annotated[str | None, typer.Option(help="balanced, zipf, all-to-k; the first two unless given.")] = None,
    threads: Annotated[str | None, typer.Option(help="Numbers of threads; all cores unless given.")] = None,
    engine: Annotated[str, typer.Option(help="Our engines, with commas; auto is what the library takes.")] = "auto",
    peers: Annotated[
        str, typer.Option(help="Whom to compare with: names, none, or .py files that define PEERS.")
    ] = "eager,batched_mm,grouped_mm,torchtitan",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of a cell; unless given 10, up to 50 of short ones, fewer of long ones."),
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="Minutes after which no cell is begun.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and report.md; nothing is kept without it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; with --budget 0 write its report again.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny grid, to see that everything works.")] = False,
    targets: Annotated[bool, typer.Option("--targets", help="The cells that have a target of their own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure our engines against their peers: correctness first, rounds in turn, share of this machine's ceiling."""
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from moesaic.bench.shapes import SMOKE_ROUNDS, choose

    check_not_both("--smoke", smoke, "--targets", targets)
    given = choose(shapes=shape, tokens=tokens, dtypes=dtype, modes=mode, routings=routing, threads=threads)
    from moesaic.bench.campaign import Campaign

    cells = _cells(given, smoke=smoke, targets=targets)
    engines, others = ([name.strip() for name in text.split(",")] for text in (engine, peers))
    rounds = rounds or (SMOKE_ROUNDS if smoke else None)
    campaign = Campaign(engines, others, rounds, budget if budget is None else 60 * budget)
    _measure(campaign, cells, out, resume=resume, as_json=as_json)
    results = campaign.journal.results
    said = [row.note for result in results for row in result.rows if row.kind == "ours"]
    if any(note.startswith(("wrong", "failed", "ended")) for note in (*said, *(result.skipped for result in results))):
        raise typer.Exit(1)


def tune(
    shape: Annotated[str, typer.Option(help="The shape to measure with, as of bench.")] = "qwen3-30b",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, with commas.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(min=0, help="After these no candidate is tried.")] = 20.0,
    out: Annotated[
        Path | None, typer.Option(help="File to write; unless given the one that the engine reads for this GPU.")
    ] = None,
) -> None:
    """Find the tiles of the Triton kernels that are fastest on this GPU, and keep them for the engine.

    Tries tiles around the built-in ones for few and for many rows an expert; each result is checked first. The engine
    reads the file when it first computes on a GPU of this name; delete it to have the built-in tiles again.
    """
    from moesaic.bench.shapes import SHAPES, choose

    chosen = choose(shapes=shape, dtypes=dtype)
    if len(chosen["shapes"]) > 1:
        raise ValueError(f"--shape {shape}: give one of {', '.join(SHAPES)}")
    import torch

    from moesaic.engine.triton import why_not

    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here: tiles are measured on the GPU that they are for")
    if reason := why_not("cuda"):
        raise ValueError(f"the Triton engine cannot run here: {reason}")
    _tune(shape, chosen["dtypes"], 60 * minutes, out)


def _tune(shape: str, dtypes: tuple[str, ...], seconds: float, out: Path | None) -> None:
    import torch

    from moesaic.bench.gpu.clock import CudaClock
    from moesaic.bench.gpu.judge import DeviceLost, check_device
    from moesaic.bench.tune import Trial, Tuning, as_file, by_events, read_before
    from moesaic.engine.triton.blocks import Tiles
    from moesaic.engine.triton.tuned import tuned_path

    device = torch.cuda.get_device_name()
    path = tuned_path(device) if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)

    def report(trial: Trial) -> None:
        said = trial.note or f"{1e6 * (trial.seconds or 0):.1f} us"
        print(f"{trial.dtype} {trial.op} {tuple(trial.blocks)}: {said}", file=sys.stderr)

    def keep(tuning: Tuning, found: dict[int, Tiles]) -> None:
        path.write_text(json.dumps(as_file(device, tuning, found, read_before(path))), encoding="utf-8")

    clock, capability = CudaClock(), torch.cuda.get_device_capability()
    share, check = seconds / len(dtypes), partial(check_device, clock)
    tuning_of = partial(Tuning, capability=capability, seconds=share, report=report, keep=keep, check=check)
    tunings, found = [], []
    for name in dtypes:
        tunings.append(tuning_of(shape, name, by_events(clock)))
        try:
            found.append(tunings[-1].run())
        except DeviceLost as error:
            raise ValueError(
                f"the device was lost ({error}) at the tiles of the last line above: please report them; what was "
                f"found for other rows of {name} is kept in {path}; run again for another --dtype"
            ) from None
    for tuning, chosen in zip(tunings, found, strict=True):
        for most, tiles in chosen.items():
            rows = f"up to {most}" if most else "more"
            print(f"{tuning.dtype}, {rows} rows an expert: {tuning.gain(most, tiles):.2f} x the built-in tiles")
    print(f"tiles: {path}" + (f" (the engine reads {tuned_path(device)})" if out is not None else ""))


def _refuse_options(context: typer.Context) -> None:
    """Those before the name of a subcommand would be lost."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.removeprefix('as_')}"
            raise ValueError(f"{option} is none of {context.invoked_subcommand}'s options: see --help")


def _command(out: Path | None) -> str:
    """The command that gives these results from nothing: without --resume and --budget, the folder by its name."""
    words, kept = iter(sys.argv[1:]), ["moesaic"]
    for word in words:
        option, _, value = word.partition("=")
        if option in ("--out", "--budget"):
            value = value or next(words, "")
        elif option != "--resume":
            kept.append(word)
    return shlex.join(kept if out is None else [*kept, "--out", out.resolve().name])


def _cells(given: dict, *, smoke: bool, targets: bool) -> "list[Cell]":
    """The grid of the flag that is set, with the axes that were given; of the targets, those that fit them."""
    from dataclasses import replace

    from moesaic.bench.machine import num_cores
    from moesaic.bench.shapes import AXES, SMOKE, Grid, smoke_cells
    from moesaic.bench.targets import target_cells

    given = {"threads": (num_cores(),), **given}
    if not targets:
        cells = list(replace(SMOKE if smoke else Grid(), **given).cells())
        return list(dict.fromkeys([*cells, *smoke_cells(given["threads"][0])])) if smoke else cells
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


def _measure(campaign: "Campaign", cells: "list[Cell]", out: Path | None, *, resume: bool, as_json: bool) -> None:
    """Run into a journal, and tell what was found, after Ctrl-C too."""
    from moesaic.bench.campaign import open_journal

    if out is not None:
        make_ready(out)
    settings = {"engines": campaign.engines, "peers": campaign.peers, "rounds": campaign.rounds}
    campaign.journal = open_journal(out, resume=resume, settings=settings | {"command": _command(out)})
    try:
        left_out = _run(campaign, cells)
    except KeyboardInterrupt:
        measured = {result.cell for result in campaign.journal.results}
        _tell(campaign, [cell for cell in cells if cell not in measured], out, as_json=as_json)
        if out is not None:
            print("interrupted: --resume goes on", file=sys.stderr)
        raise
    _tell(campaign, left_out, out, as_json=as_json)


def _tell(campaign: "Campaign", left_out: "list[Cell]", out: Path | None, *, as_json: bool) -> None:
    from moesaic.bench.report import aligned, markdown, summary

    journal = campaign.journal
    environment = [f"{name}={shlex.quote(value)}" for name, value in journal.machine["environment"].items()]
    commands = [" ".join([*environment, command]) for command in journal.commands]
    if out is not None:
        (out / "report.md").write_text(markdown(journal, commands, left_out), encoding="utf-8")
    if as_json:
        print(json.dumps({"lines": journal.lines, "left_out": [cell.key for cell in left_out]}, allow_nan=False))
        return
    print(aligned(summary(journal.results)))
    if left_out:
        print(f"cells not measured: {len(left_out)}; --resume goes on with them")
    if out is not None:
        print(f"everybody's numbers: {out / 'report.md'}")
    print(f"reproduce: {', then '.join(commands)}")
