"""`moesaic doctor`: what is installed, what this machine can do, and which engine serves what, and why."""

import gc
from typing import Annotated

import typer

from moesaic.cli.doctor_table import WORDS, report
from moesaic.cli.examine import examine, take_measures, wrong
from moesaic.cli.output import JSON_HELP, Lang, print_json


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure memory and matmuls too: some seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    lang: Lang = "en",
) -> int:
    """Say what is installed, what this machine can do, and which engine serves which device and dtype, and why.

    Every engine is run on a small problem, forward and backward. Exit code 1 where "auto" gives wrong numbers.
    """
    gc.disable()  # as in demo
    from rich.console import Console

    found = examine()
    if measure:
        Console(stderr=True).print(WORDS[lang]["measuring"], style="dim")
        found["measured"] = take_measures()
    if as_json:
        print_json(found)
    else:
        console = Console()
        for part in report(found, WORDS[lang]):
            console.print(part, soft_wrap=isinstance(part, str))  # lines of code are for copying
    return 1 if wrong(found) else 0
