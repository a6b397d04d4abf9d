"""What the commands look at: the shipped or a given model, and real text as windows of tokens, or as documents."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.hf.modules import moe_layers
from moesaic.trace.recording.assemble import pieces_of
from moesaic.trace.recording.record import record
from moesaic.trace.recording.recorder import Recorder
from moesaic.trace.store import Trace

WINDOW = 128  # tokens read at once, fewer where the model reads fewer
BATCH = 10  # windows in one forward
# windows of held-out works, in the shares of tokens that the tiny model was trained on; a poem is half a window
HELD_OUT = {"english_verse": 30, "chinese_verse": 52, "manual": 10, "python": 30}
BEGINNING = 10_000  # characters of a held-out work that its windows are taken from: all of it would take 0.4 s longer
SAMPLE = (
    "To be, or not to be: that is the question.\n床前明月光，疑是地上霜。\n"
    "A class definition is an executable statement.\nfor token in tokens: route(token)\n"
)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError:
        raise ValueError(f"--file {file}: not UTF-8 text: give a text file") from None
    except OSError as error:
        raise ValueError(f"--file {file}: cannot be read ({error.strerror}): give a text file") from None


class Document(NamedTuple):
    """A text that belongs together, and the name of what it is an example of.

    tokens: how many are read of a long one, in windows spread evenly over it; all of them unless given.
    """

    label: str
    text: str
    tokens: int | None = None


def documents(text: str | None, files: Sequence[Path], corpus: bool, by_line: bool = False) -> list[Document]:
    """What was asked for: one text, files (each with its name as label), or the shipped corpus.

    by_line: every line that is not empty is a document. ValueError where nothing, or more than one of them, was given,
    or a file twice.
    """
    if (text is not None) + bool(files) + corpus != 1:
        raise ValueError("give one of --text, --file (as often as needed) and --corpus: that is what the model reads")
    if corpus:
        return held_out()
    if text is not None:
        whole = [Document("text", text)]
    else:
        whole = [Document(name, _text_of(file)) for name, file in zip(_names(files), files, strict=True)]
    found = [part for document in whole for part in (_lines(document) if by_line else [document])]
    if empty := next((document for document in whole if not document.text.strip()), None):
        raise ValueError(f"{'--text' if text is not None else empty.label} is empty: give a word at least")
    return found


def _names(files: Sequence[Path]) -> list[str]:
    """What to call files: by name, and by as much of the path as tells those of one name apart."""
    real = [file.resolve() for file in files]
    spelled = dict(zip(real, files, strict=True))
    if twice := next((spelled[path] for path, times in Counter(real).items() if times > 1), None):
        raise ValueError(f"--file {twice}: is given twice, and a document counts once: leave one out")
    ends = [[file.parts[-n:] for n in range(1, len(file.parts) + 1)] for file in files]
    known = Counter(chain(*ends))
    return [
        str(Path(*next((end for end in some if known[end] == 1), file.parts)))
        for file, some in zip(files, ends, strict=True)
    ]


def _lines(document: Document) -> list[Document]:
    return [document._replace(text=line) for line in document.text.splitlines() if line.strip()]


def held_out() -> list[Document]:
    """Works of the four domains that the tiny model never saw, as many as there are windows (HELD_OUT) or works, spread
    evenly over all, and of each its part of the windows: passages of one play are no independent draws."""
    from moesaic.train.data import corpus

    found = []
    for domain, windows in HELD_OUT.items():
        works = corpus(domain, "held_out")
        n = min(windows, len(works))
        for i, place in enumerate(_spread(n, len(works))):
            share = (i + 1) * windows // n - i * windows // n
            found.append(Document(domain, works[place].text[:BEGINNING], share * WINDOW))
    return found


def _spread(n: int, many: int) -> list[int]:
    """The middles of n equal parts of range(many)."""
    return [(2 * i + 1) * many // (2 * n) for i in range(n)]


class Tokens(NamedTuple):
    """Documents as a model reads them.

    batches: ids [n, length], in order; a document longer than the window is several rows, each read by itself.
    sequences: int64 [T], the document of a token. labels: the name of every document. windows: rows of every document.
    offsets: int64 [T, 2], the place of a token in its document in characters; None where the tokenizer does not tell.
    pieces: id -> its text.
    """

    batches: list[Tensor]
    sequences: Tensor
    labels: tuple[str, ...]
    windows: tuple[int, ...]
    offsets: Tensor | None
    pieces: dict[int, str]


def window_of(model: Any, asked: int | None = None) -> tuple[int | None, int]:
    """The most tokens that the model reads at once, where it says so, and how many it is to read."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None, asked or WINDOW
    if asked is not None and asked > most:
        raise ValueError(f"--window {asked}: the model reads {most} tokens at most: use {most} or fewer")
    return most, asked or min(WINDOW, most)


def tokens_of(tokenizer: Any, documents: Sequence[Document], window: int = WINDOW) -> Tokens:
    """Documents as tokens, with the special ones that the tokenizer adds. ValueError where one gives no token."""
    with_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer([document.text for document in documents], return_offsets_mapping=with_offsets)
    rows = encoded["input_ids"]
    if empty := [document.label for document, row in zip(documents, rows, strict=True) if not row]:
        raise ValueError(f"the tokenizer makes nothing of a text of {empty[0]!r}: give another")
    windows = [_windows(len(row), document.tokens, window) for document, row in zip(documents, rows, strict=True)]
    places = [(number, here) for number, each in enumerate(windows) for here in each]
    parts = [torch.tensor(rows[number][here]) for number, here in places]
    batches: list[list[Tensor]] = []
    for part in parts:
        if batches and len(batches[-1]) < BATCH and len(batches[-1][0]) == len(part):
            batches[-1].append(part)
        else:
            batches.append([part])
    offsets = None
    if with_offsets:
        offsets = torch.tensor([pair for number, here in places for pair in encoded["offset_mapping"][number][here]])
    return Tokens(
        [torch.stack(batch) for batch in batches],
        torch.tensor([number for number, _ in places]).repeat_interleave(torch.tensor([len(part) for part in parts])),
        tuple(document.label for document in documents),
        tuple(len(each) for each in windows),
        offsets,
        pieces_of(tokenizer, torch.cat(parts).unique().tolist()),
    )


def _windows(length: int, tokens: int | None, window: int) -> list[slice]:
    """Where a document of `length` tokens is read, all of it or so many."""
    if tokens is None:
        return [slice(start, start + window) for start in range(0, length, window)]
    window = min(window, tokens)
    whole = max(length // window, 1)
    places = _spread(min(tokens // window, whole), whole)
    return [slice(place * window, (place + 1) * window) for place in places]


def record_documents(
    model: Any, tokens: Tokens, detail: str, to: Path, *, seed: int = 0, done: Callable[[int], None]
) -> Trace:
    """Write what a model that reads documents chooses to the file `to`, batch by batch: ids only, ids and weights
    ("picks"), or "scores" too. Returns the trace without its tokens, which are in the file.

    `done` hears the number of tokens of every batch that was read.
    """
    with record(model, detail, seed=seed, to=to) as recorder:
        _read(model, tokens, recorder, seed, done)
        return recorder.outline()


def route(model: Any, tokens: Tokens, seed: int = 0) -> Trace:
    """Every gate's scores and picks while the model reads, in memory."""
    with record(model, "scores", seed=seed) as recorder:
        _read(model, tokens, recorder, seed, lambda _: None)
    return recorder.trace


@torch.inference_mode()
def _read(model: Any, tokens: Tokens, recorder: Recorder, seed: int, done: Callable[[int], None]) -> None:
    """Let the model read and tell the recorder which document a token belongs to: rows are only how it was read."""
    accepted = inspect.signature(model.forward).parameters
    less = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}
    torch.manual_seed(seed)
    for ids in tokens.batches:
        model(input_ids=ids.to(model.device), **less)
        done(ids.numel())
    recorder.describe(sequences=tokens.sequences, labels=tokens.labels, offsets=tokens.offsets, pieces=tokens.pieces)


def check_before(model: Any, tokens: Tokens, layer: int | None = None, token: int | None = None) -> None:
    """Refuse what cannot be routed, and a layer or token that the recording will not have, before anything is made."""
    known, highest = model.get_input_embeddings().num_embeddings, max(tokens.pieces)
    if highest >= known:
        raise ValueError(f"the tokenizer gives id {highest} and the model knows {known}: they do not belong together")
    counts = {"layer": len(moe_layers(model)), "token": len(tokens.sequences)}
    check_numbers({"layer": layer, "token": token}, counts)


def check_numbers(given: dict[str, int | None], counts: dict[str, int]) -> None:
    for name, value in given.items():
        if value is not None and not 0 <= value < counts[name]:
            there = f"use 0 to {counts[name] - 1}" if counts[name] else f"there is no {name}"
            raise ValueError(f"--{name} {value} is not there: {there}")
