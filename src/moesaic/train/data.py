"""The shipped corpus: four domains of real text, each split into documents to train on and whole documents held out."""

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

CORPUS = Path(__file__).parents[1] / "assets" / "corpus"
Split = Literal["train", "held_out"]


class Document(NamedTuple):
    """A whole play, poem, manual topic or Python module."""

    title: str
    text: str


class Domain(NamedTuple):
    """A kind of text: its name in two languages, and its share of the tokens that the tiny model is trained on."""

    en: str
    zh: str
    share: float


DOMAINS = {
    "english_verse": Domain("English verse", "英文诗剧", 0.3),
    "chinese_verse": Domain("Chinese verse", "中文诗歌", 0.3),
    "manual": Domain("English manual", "英文手册", 0.1),
    "python": Domain("Python code", "Python 代码", 0.3),
}


def corpus(domain: str, split: Split) -> list[Document]:
    """The documents of a domain in the order of their titles, frozen: the same on every machine and Python.

    Raises ValueError for an unknown domain or split.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r} is not in the corpus: use one of {', '.join(DOMAINS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} is unknown: use train or held_out")
    return list(_documents(domain, split))


@cache
def _documents(domain: str, split: str) -> tuple[Document, ...]:
    with lzma.open(CORPUS / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return tuple(Document(row["title"], row["text"]) for row in rows if row["split"] == split)
