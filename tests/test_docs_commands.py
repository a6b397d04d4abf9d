"""The page of commands: every command has its section, and every option its row, in both languages."""

import re
from pathlib import Path

import pytest
import typer

from moesaic.cli import app

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*/commands.md"))


def commands(group=None, prefix: str = "moesaic") -> dict[str, set[str]]:
    """name -> options, of every command there is."""
    found = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        options = {
            option for parameter in command.params if parameter.param_type_name == "option" for option in parameter.opts
        }
        found[f"{prefix} {name}"] = options - {"--help", "-h"}
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix} {name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_command_and_every_option_is_on_the_page_and_no_other(page):
    sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
    told = {}
    for section in sections:
        first_cells = re.findall(r"^\| ([^|]*`-[^|]*) \|", section, re.MULTILINE)
        told[section.splitlines()[0]] = {o for cell in first_cells for o in re.findall(r"`(--?[\w-]+)`", cell)}
    assert told == commands()
