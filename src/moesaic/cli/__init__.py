"""The command line. One module a command; heavy imports happen inside the commands, so that `--help` is quick."""

import gc
import io
import re
import signal
import sys
import traceback

import typer

from moesaic import __version__
from moesaic.cli.bench import bench, tune
from moesaic.cli.bench_generate import generate
from moesaic.cli.check import check
from moesaic.cli.compare import compare
from moesaic.cli.demo import demo
from moesaic.cli.diff import diff
from moesaic.cli.doctor import doctor
from moesaic.cli.import_ import import_
from moesaic.cli.models import models
from moesaic.cli.stats import stats
from moesaic.cli.steps import steps
from moesaic.cli.trace import trace
from moesaic.cli.train import train
from moesaic.cli.upcycle import upcycle
from moesaic.cli.watch import watch
from moesaic.cli.what_if import what_if

app = typer.Typer(
    name="moesaic",
    help="See, train and scale Mixture-of-Experts routing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
benches = typer.Typer(invoke_without_command=True)
benches.callback()(bench)
benches.command()(generate)
benches.command()(tune)
PANELS = {  # of --help, in the order of use
    "Look into a model": (demo, trace, import_, stats, steps, diff, what_if),
    "Check": (check, doctor, models),
    "Train": (train, watch, compare, upcycle),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(command.__name__.strip("_").replace("_", "-"), rich_help_panel=panel)(command)
app.add_typer(benches, name="bench", rich_help_panel="Measure")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moesaic {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    del version


def main() -> None:
    """Run a command. Exit codes: 0 good, 1 a bad verdict, 2 a user's mistake, told in one line on stderr, or too little
    memory; 3 a mistake of ours, with its traceback."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly where the reader goes away, as `| head` does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Chinese shows question marks, not a traceback
    try:
        code = app(standalone_mode=False)
    except typer.exceptions.TyperException as error:
        code = _complain(error.format_message() if hasattr(error, "format_message") else str(error))
    except (ValueError, OSError) as error:
        code = _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        words = ("not enough memory", "can't allocate memory", "out of memory")  # of torch, by system and device
        if isinstance(error, MemoryError) or any(said in str(error) for said in words):
            code = _complain("not enough memory for this: give less at once, or use a larger machine")
        else:
            traceback.print_exc()
            code = 3
    if not _triton_tells_leaks():
        gc.freeze()  # collecting at the exit would take a second and free what ends anyway
    gc.enable()
    sys.exit(code)


def _triton_tells_leaks() -> bool:
    """Whether Triton was loaded, as dynamo does, and lists on stderr what is left at the exit: from 3.9 on."""
    version = getattr(sys.modules.get("triton"), "__version__", "0")
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= (3, 9)


def _complain(message: str) -> int:
    from moesaic.trace.shown import visible

    if message:  # empty where the help was shown instead
        print("moesaic: " + visible(" ".join(message.split())), file=sys.stderr)
    return 2
