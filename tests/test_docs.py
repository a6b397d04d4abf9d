"""The book: Python blocks and `$ moesaic` lines run and print what the page says; both languages hold the same code.

`python tests/test_docs.py --write` runs the pages and writes what they print, and the quoted sources, into them.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import os
import re
import shlex
import sys
import tempfile
import textwrap
import tomllib
from functools import reduce
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import moesaic
from moesaic import cli
from moesaic.config import MoEConfig
from moesaic.families import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*/*.md"))
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
QUOTE = "python of "  # ```python of module:name quotes that object's source


class Block(NamedTuple):
    """A fenced block: its info string, its body, the line its body starts on, and where that is in the page."""

    info: str
    body: str
    line: int
    span: tuple[int, int]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["info"], m["body"], text.count("\n", 0, m.start("body")) + 1, m.span("body"))
        for m in FENCE.finditer(text)
    ]


def source_of(name: str) -> str:
    """Source of `module:qualified.name`, flush left."""
    module, _, path = name.partition(":")
    return textwrap.dedent(inspect.getsource(reduce(getattr, path.split("."), importlib.import_module(module))))


def said_by(line: str) -> str:
    """What `$ moesaic ...` says on a terminal of 120 columns, stderr first; `| head -2` leaves two lines of stdout."""
    command, _, most = line.removeprefix("$ ").partition(" | head -")
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", shlex.split(command)),
        mock.patch.dict(os.environ, COLUMNS="120"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.suppress(SystemExit),
    ):
        cli.main()
    rows = err.getvalue().splitlines() + out.getvalue().splitlines()[: int(most) if most else None]
    return "".join(f"{row.rstrip()}\n" for row in rows)


def expected_bodies(page: Path) -> dict[Block, str]:
    """What each quotation and each output block of a page should hold. Runs the page's code, in an empty folder."""
    namespace: dict = {"__name__": page.stem}
    expected, printed, blocks = {}, "", blocks_of(page)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(torch.set_printoptions, profile="default")  # pages may set their own
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # small sums: a second thread costs time and decides last bits
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            if block.info.startswith(QUOTE):
                expected[block] = source_of(block.info.removeprefix(QUOTE))
            elif block.info == "text":
                assert printed, f"{page.name}:{block.line}: a text block must follow the block that prints it"
                expected[block], printed = printed, ""
            elif block.info == "python" or (block.info == "sh" and block.body.startswith("$ ")):
                if block.info == "sh":
                    printed = "".join(map(said_by, block.body.splitlines()))
                else:  # empty lines before the code, so that a traceback names the line of the page
                    code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
                    with contextlib.redirect_stdout(io.StringIO()) as stdout:
                        exec(code, namespace)
                    printed = stdout.getvalue()
                shown = following is not None and following.info == "text"
                assert shown or not printed, f"{page.name}:{block.line}: prints, and no text block follows"
    return expected


def write(page: Path) -> None:
    text = page.read_text()
    for block, body in reversed(expected_bodies(page).items()):
        text = text[: block.span[0]] + body + text[block.span[1] :]
    page.write_text(text)


def test_both_languages_have_the_same_pages():
    names = {lang: {page.name for page in PAGES if page.parent.name == lang} for lang in ("zh", "en")}
    assert names["zh"] == names["en"] != set()


def said(page: Path) -> list[str]:
    """All that a page runs and shows, without comments and diagrams."""
    blocks = [block for block in blocks_of(page) if block.info != "mermaid"]
    return [ast.dump(ast.parse(block.body)) if block.info == "python" else block.body for block in blocks]


def to_run() -> list[Path]:
    """Pages that say the same in both languages run once."""
    zh = {page.name: said(page) for page in PAGES if page.parent.name == "zh"}
    return [ROOT / "README.md", *(p for p in PAGES if p.parent.name == "zh" or said(p) != zh.get(p.name))]


@pytest.mark.parametrize("page", to_run(), ids=name_of)
def test_a_page_prints_what_it_says(page):
    for block, body in expected_bodies(page).items():
        assert block.body == body, f"{page.name}:{block.line}: run `python tests/test_docs.py --write` and look"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "zh"], ids=lambda p: p.stem)
def test_both_languages_hold_the_same_code(page):
    """Comments, strings and diagrams are translated; code and quotations are not, and equal code prints equal text."""
    zh, en = blocks_of(page), blocks_of(DOCS / "en" / page.name)
    assert [block.info for block in zh] == [block.info for block in en]
    for ours, theirs in zip(zh, en, strict=True):
        if ours.info == "python":
            assert without_strings(ours.body) == without_strings(theirs.body), f"{page.name}:{ours.line}"
        elif ours.info.startswith(QUOTE):
            assert ours.body == theirs.body, f"{page.name}:{ours.line}"


def without_strings(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/README.md", "benchmarks/README.md")]


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_inside_the_book_resolve(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(other), f"{page.name}: no heading for {target}"


def test_every_report_is_linked_from_the_table_of_its_machine():
    linked = LINK.findall((ROOT / "benchmarks" / "README.md").read_text())
    assert {path.name for path in ROOT.glob("benchmarks/20*.md")} <= set(linked)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_every_declared_dependency_is_listed_with_weight_and_reason(lang):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    rows = re.findall(
        r"^\| `([\w-]+)` \| [^|]+ \| [\d.]+ \| [^|]{2,} \|$", (DOCS / lang / "install.md").read_text(), re.M
    )
    assert sorted(rows) == sorted(re.match(r"[\w-]+", d).group() for d in declared)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_the_reference_has_every_field_of_a_config_its_default_and_the_presets_that_change_it(lang):
    text = (DOCS / lang / "reference.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`|–) \| [^|]{2,} \| ([^|]{2,}) \|$", text, re.MULTILINE)
    fields = dataclasses.fields(MoEConfig)
    assert [name for name, _, _ in rows] == [field.name for field in fields]
    for field, (name, default, models) in zip(fields, rows, strict=True):
        required = field.default is dataclasses.MISSING
        assert default == ("" if required else repr(field.default).replace("'", '"')), name
        changing = [preset for preset, values in PRESETS.items() if values.get(name, field.default) != field.default]
        named = [word for word in re.findall("`([^`]+)`", models) if word in PRESETS]
        assert sorted(named) == sorted(changing if len(changing) < len(PRESETS) else []), name  # else it says "all"


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_the_reference_has_every_public_name_once_with_its_page(lang):
    reference = DOCS / lang / "reference.md"
    row = re.compile(r"^\| `ms\.(\w+)` \| [^|]{2,} \| \[[^\]]+\]\(([^#)]*)[^)]*\) \|$", re.MULTILINE)
    rows = row.findall(reference.read_text())
    assert sorted(name for name, _ in rows) == sorted(moesaic.__all__)
    for name, page in rows:
        assert name in words_of_code(reference.with_name(page or reference.name)), f"ms.{name}: {page} does not have it"


def words_of_code(page: Path) -> set[str]:
    """All words in the code of a page, in blocks and in lines: in prose a name may be a word like any."""
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    return set(re.findall(r"\w+", " ".join([*inline, *(block.body for block in blocks_of(page))])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help="rewrite outputs and quotations")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="all pages unless named")
    for chosen in parser.parse_args().pages:
        write(chosen)
