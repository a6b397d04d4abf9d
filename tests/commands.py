"""Commands as a user calls them, each by itself: an application of the command alone, and the exit of the real one."""

import sys
from collections.abc import Callable

import typer

from moesaic import cli


def runner(monkeypatch, capsys, *, columns: str = "160", **commands: Callable) -> Callable[..., tuple[int, str, str]]:
    """run("trace", "--corpus") -> (exit code, stdout, stderr), in this process."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    for name, command in commands.items():
        app.command(name.rstrip("_"))(command)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", columns)
        try:
            cli.main()
        except SystemExit as ending:
            out, err = capsys.readouterr()
            return ending.code or 0, out, err
        raise AssertionError("main did not end")

    return call
