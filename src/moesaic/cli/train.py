"""`moesaic train`: train the shipped model again."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.train.evaluate import Report


def train(
    what: Annotated[str, typer.Argument(help="tiny, the shipped model (3.4 M parameters), or small (13.8 M).")],
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and order of the text; 0 unless given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model, empty or new; runs/ and its name unless given.")
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(help="none; aux, seq: losses; bias (unless given), bias-centred, bias-proportional."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of an interrupted run to go on with.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; the recipe's own number unless given.")] = None,
) -> None:
    """Train a model on the shipped corpus, balanced as you like, and say what it learnt.

    The shipped model came from `moesaic train tiny --seed 0`; its training.json says how long that took. Ctrl-C saves
    and leaves, with exit code 130; `--resume DIR` goes on to the same weights, also after a kill. Watch it from
    another terminal with `moesaic watch DIR`.
    """
    given = {"--out": out, "--seed": seed, "--steps": steps, "--balance": balance}
    if resume is not None and (said := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"--resume goes on as the run began: leave out {' and '.join(said)}")
    from rich.console import Console

    from moesaic.train.training import Recipe
    from moesaic.train.training import train as train_model

    changed: dict[str, Any] = {"steps": steps, "balance": balance}
    recipe = Recipe(**{name: value for name, value in changed.items() if value is not None})
    folder = resume or out or Path("runs") / what
    try:
        report = train_model(folder, size=what, seed=seed or 0, resume=resume, recipe=recipe, progress=True)
    except KeyboardInterrupt as stopped:
        when = " ".join(["interrupted", *map(str, stopped.args)])
        print(f"{when}: go on with {shlex.join(['moesaic', 'train', what, '--resume', str(folder)])}", file=sys.stderr)
        raise typer.Exit(130) from None
    Console().print(_table(report))
    print(f"look into it: moesaic demo --model {folder}")
    print(f"reproduce: the command, versions and recipe are in {folder / 'training.json'}")


def _table(report: "Report") -> "Table":
    from rich.table import Table

    worst = ", ".join(f"{value:.2f}" for value in report.max_violation.values())
    table = Table(title="held-out text, nats per token", caption=f"MaxVio by layer: {worst}")
    for name in ("domain", "tokens", "model", "Kneser-Ney bigram", "margin"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, result in report.domains.items():
        numbers = (f"{result.loss:.3f}", f"{result.kneser_ney:.3f}", f"{result.margin:+.3f}")
        table.add_row(domain, f"{result.tokens:,}", *numbers)
    return table
