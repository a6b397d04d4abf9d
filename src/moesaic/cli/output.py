"""What every command does with its output: a language, JSON, a folder that can be written, how to get it again."""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.trace.store import Trace


def _known(lang: str) -> str:
    if lang not in AGAIN:
        raise ValueError(f"--lang {lang!r} is unknown: use zh or en")
    return lang


Lang = Annotated[str, typer.Option(help="en or zh.", callback=_known)]
JSON_HELP = "Print the result as JSON."

NEXT = {"en": "Next:", "zh": "接下来："}
AGAIN = {
    "en": ("Reproduce: {command}", "with ", ", ", ("seed {}", "config {}", "no config: only sizes are known")),
    "zh": ("复现：{command}", "版本 ", "，", ("随机种子 {}", "配置 {}", "没有配置：只知道尺寸")),
}


def check_not_both(first: str, one: object, second: str, other: object) -> None:
    """ValueError where two options are given that exclude each other: both are neither None nor False."""
    if all(given is not None and given is not False for given in (one, other)):
        raise ValueError(f"{first} and {second} are both given: use one of them")


def print_json(what: Any) -> None:
    """One JSON document on stdout, strict: a number that is not finite must be None before it comes here. Chinese is
    written as it is, what could steer a terminal as an escape."""
    from moesaic.trace.shown import hidden

    text = json.dumps(what, ensure_ascii=False, allow_nan=False)
    print("".join(json.dumps(c)[1:-1] if hidden(c) else c for c in text))


def table(title: str, columns: Sequence[str], justify: Any = "left", *, whole: bool = True) -> "Table":
    """A table as every command draws it: a line under the head, no box. whole: only the last column goes on in a second
    line; numbers and names of the others are never cut in two."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        if whole and index < len(columns) - 1:
            drawn.add_column(name, justify=justify, no_wrap=True)
        else:
            drawn.add_column(name, justify=justify, overflow="fold")
    return drawn


class Done(Protocol):
    """Told how many more things are done, and what is worked on now where that changes."""

    def __call__(self, count: int, what: str | None = None) -> None: ...


@contextmanager
def progress(what: str, total: int, *, quiet: bool = False) -> "Iterator[Done]":
    """A bar on stderr, where that is a terminal; what it yields is called with the number of things done."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(escape(what), total=total)

        def done(count: int, what: str | None = None) -> None:
            bar.update(task, advance=count, description=None if what is None else escape(what))

        yield done


def make_ready(out: Path) -> None:
    """Make the folder and try to write there, before any work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}): give another folder") from None


def typed() -> str:
    """The command as it was typed."""
    return shlex.join(["moesaic", *sys.argv[1:]])


def say_next(commands: Sequence[tuple[str, str]], lang: str) -> None:
    """Print commands that go on from here, each with its reason, in the language that was asked for."""
    from moesaic.trace.shown import visible

    told = [(visible(command + ("" if lang == "en" else f" --lang {lang}")), why) for command, why in commands]
    width = max(len(command) for command, _ in told)
    print("\n" + NEXT[lang])
    for command, why in told:
        print(f"   {command:<{width}}   {why}")


def say_how_again(trace: "Trace", lang: str, *more: str) -> None:
    """Print the command, versions, seed and config behind a record that was shown, and what more it hangs on."""
    say_command(trace.versions, trace.seed, config_of(trace), lang, *more)


def say_command(versions: Mapping[str, str], seed: int | None, digest: str | None, lang: str, *more: str) -> None:
    """Print what was typed, and what it takes to get the same again."""
    from moesaic.trace.shown import visible

    command, begin, comma, (seeded, config, no_config) = AGAIN[lang]
    facts = [f"{visible(name, 40)} {visible(version, 40)}" for name, version in versions.items()]
    facts = [", ".join(facts)] if facts else []
    facts += [seeded.format(seed)] if seed is not None else []
    facts += [config.format(digest) if digest is not None else no_config, *more]
    print("\n" + visible(command.format(command=typed())))
    print((begin if versions else "") + comma.join(facts))


def config_of(trace: "Trace") -> str | None:
    """The digest of the config that a trace was made with; None for the record of another engine of which only sizes
    are known: what else stands in its config stands in for nothing that was read."""
    config = trace.configs[0]
    return config.digest() if config.rule_is_known or "imported" not in trace.origins else None


def provenance(*records: "tuple[Path | None, Trace]") -> dict[str, Any]:
    """What the JSON of every command about records and gates begins with: program, command, the records read or
    written. The file of a record is None where it was made by the command itself."""
    import torch

    from moesaic import __version__

    return {
        "moesaic": __version__,
        "torch": str(torch.__version__),
        "command": typed(),
        "records": [
            {
                "file": None if file is None else str(file),
                "model": trace.model,
                "config": config_of(trace),
                "seed": trace.seed,
                "versions": dict(trace.versions),
                "layers": list(trace.layers),
                "origins": list(trace.origins),
                "missing": list(trace.missing),
            }
            for file, trace in records
        ],
    }
