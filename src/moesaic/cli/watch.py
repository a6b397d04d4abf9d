"""`moesaic watch`: a training run as it goes on, or as it went."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.output import Lang, print_json

if TYPE_CHECKING:
    from moesaic.train.monitor.run_log import LogReader, RunLog

DAY = 86400.0
MOST = 512  # step lines that are held: twice that is more than any curve here can show


def watch(
    run: Annotated[Path, typer.Argument(help="Folder or log of a run that ms.LoadMonitor watches, or watched.")],
    once: Annotated[bool, typer.Option("--once", help="Show one picture and leave.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 2.0,
    lang: Lang = "en",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document and leave.")] = False,
) -> None:
    """Show a training run: loss, balance of every layer beside chance, dead experts, biases, alerts, time left.

    Looks again until the run has finished; Ctrl-C leaves. Where stdout is no terminal, one picture. Exit code 0: judged
    and healthy; 1: a layer has collapsed or dead experts, or loss or gradients are not finite; 2: nothing to show, or
    nothing judged yet.
    """
    if not 0 < every <= DAY:
        raise ValueError(f"--every {every} is no time to wait: give seconds, such as 2")
    from rich.console import Console

    from moesaic.train.monitor.frame import frame, outcome
    from moesaic.train.monitor.run_log import reader_of

    reader = reader_of(run, most=MOST)
    log, console = reader.log, Console()
    if as_json:
        print_json(_json(log))
    elif once or not console.is_terminal or log.end is not None:
        console.print(frame(log, now=time.time(), lang=lang, width=console.width))
    else:
        log = _follow(reader, console, every, lang)
    if code := outcome(log):
        raise typer.Exit(code)


def _follow(reader: "LogReader", console: Any, every: float, lang: str) -> "RunLog":
    """Look again and again, until the run has finished or Ctrl-C; the last picture stays."""
    from rich.live import Live

    from moesaic.train.monitor.frame import frame

    log = reader.log

    def picture(height: int | None) -> Any:
        return frame(log, now=time.time(), lang=lang, width=console.width, height=height)

    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while log.end is None:
                live.update(picture(console.height), refresh=True)
                time.sleep(every)
                log = reader.poll()
        except KeyboardInterrupt:
            pass
    console.print(picture(None))
    return log


def _json(log: "RunLog") -> dict[str, Any]:
    from moesaic.train.monitor.frame import outcome, seconds_a_step

    return {
        "run": log.header,
        "step": log.done,
        "total_steps": log.total,
        "seconds_a_step": seconds_a_step(log),
        "finished": log.finished,
        "stopped": log.end is not None and not log.finished,
        "last": log.steps[-1] if log.steps else None,
        "verdict": log.verdicts[-1] if log.verdicts else None,
        "standing": log.standing,
        "alerts": list(log.active.values()),
        "exit_code": outcome(log),
    }
