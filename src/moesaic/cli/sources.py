"""What the commands look at: the shipped or a given model, and real text as windows of tokens, or as documents."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.cli.output import check_not_both
from moesaic.hf.modules import moe_layers
from moesaic.trace.recording.assemble import pieces_of
from moesaic.trace.recording.record import record
from moesaic.trace.shown import piece_of
from moesaic.trace.store import Trace

WINDOW = 128  # tokens routed as one sequence
CHARACTERS = 60_000  # of held-out text a domain that the sequences are drawn from: all of it would take 0.4 s longer
BATCH = 10  # sequences in one forward
SEQUENCES = 100  # of the four shipped domains together, in the shares the tiny model was trained on
PASSAGES = 100  # documents of the four shipped domains together, for a record of documents
PASSAGE = 400  # characters: a longer document is cut into passages, at ends of lines
SAMPLE = (
    "To be, or not to be: that is the question.\n床前明月光，疑是地上霜。\n"
    "A class definition is an executable statement.\nfor token in tokens: route(token)\n"
)


def read_text(text: str | None, file: Path | None) -> str | None:
    """The text that was asked for, or None where neither option was used."""
    check_not_both("--text", text, "--file", file)
    if file is not None:
        text = _text_of(file)
    if text is not None and not text.strip():
        raise ValueError("the text is empty: give a word at least")
    return text


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError:
        raise ValueError(f"--file {file}: not UTF-8 text: give a text file") from None
    except OSError as error:
        raise ValueError(f"--file {file}: cannot be read ({error.strerror}): give a text file") from None


class Document(NamedTuple):
    """A text that belongs together, and the name of what it is an example of."""

    label: str
    text: str


def documents(text: str | None, files: Sequence[Path], corpus: bool, by_line: bool = False) -> list[Document]:
    """What was asked for: one text, files (each with its name as label), or the shipped corpus.

    by_line: every line that is not empty is a document. ValueError where nothing, or more than one of them, was given,
    or a file twice.
    """
    if (text is not None) + bool(files) + corpus != 1:
        raise ValueError("give one of --text, --file (as often as needed) and --corpus: that is what the model reads")
    if corpus:
        return corpus_passages()
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
    if twice := next((file for at, file in enumerate(files) if real[at] in real[:at]), None):
        raise ValueError(f"--file {twice}: is given twice, and a document counts once: leave one out")

    names = []
    for file in files:
        ends = (file.parts[-n:] for n in range(1, len(file.parts)))
        alone = (end for end in ends if sum(other.parts[-len(end) :] == end for other in files) == 1)
        names.append(str(Path(*next(alone, file.parts))))
    return names


def _lines(document: Document) -> list[Document]:
    return [document._replace(text=line) for line in document.text.splitlines() if line.strip()]


def corpus_passages() -> list[Document]:
    """Held-out passages of the four domains, PASSAGES of them in their shares, spread evenly over all documents."""
    import numpy as np

    from moesaic.train.data import DOMAINS, corpus

    chosen = []
    for name, domain in DOMAINS.items():
        all_of_it = [passage for document in corpus(name, "held_out") for passage in _passages(document.text)]
        places = np.linspace(0, len(all_of_it) - 1, round(PASSAGES * domain.share)).astype(int)
        chosen += [Document(name, all_of_it[place]) for place in places]
    return chosen


def _passages(text: str) -> list[str]:
    """A text in parts of at least PASSAGE characters that end where lines do; a short rest goes with the last one."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= PASSAGE:
            parts.append("")
        parts[-1] += line
    if len(parts) > 1 and len(parts[-1]) < PASSAGE // 2:
        rest = parts.pop()
        parts[-1] += rest
    return parts


class Tokens(NamedTuple):
    """Documents as a model reads them.

    batches: ids [n, length], in order; a document longer than the window is several rows, each read by itself.
    sequences: int64 [T], the document of a token. offsets: int64 [T, 2], its place in the document in characters; None
    where the tokenizer does not tell. pieces: id -> its text.
    """

    batches: list[Tensor]
    sequences: Tensor
    offsets: Tensor | None
    pieces: dict[int, str]


def tokens_of(tokenizer: Any, texts: Sequence[Document], window: int = WINDOW) -> Tokens:
    """Documents as tokens, with the special ones that the tokenizer adds. ValueError where one gives no token."""
    with_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer([document.text for document in texts], return_offsets_mapping=with_offsets)
    rows = encoded["input_ids"]
    if empty := [document.label for document, row in zip(texts, rows, strict=True) if not row]:
        raise ValueError(f"the tokenizer makes nothing of a text of {empty[0]!r}: give another")
    parts = [torch.tensor(row[at : at + window]) for row in rows for at in range(0, len(row), window)]
    batches: list[list[Tensor]] = []
    for part in parts:
        if batches and len(batches[-1]) < BATCH and len(batches[-1][0]) == len(part):
            batches[-1].append(part)
        else:
            batches.append([part])
    lengths = torch.tensor([len(row) for row in rows])
    offsets = [pair for row in encoded["offset_mapping"] for pair in row] if with_offsets else None
    return Tokens(
        [torch.stack(batch) for batch in batches],
        torch.arange(len(rows)).repeat_interleave(lengths),
        None if offsets is None else torch.tensor(offsets, dtype=torch.int64),
        pieces_of(tokenizer, sorted({number for row in rows for number in row})),
    )


def record_documents(
    model: Any,
    tokens: Tokens,
    labels: Sequence[str],
    detail: str,
    to: Path,
    *,
    seed: int = 0,
    done: Callable[[int], None],
) -> Trace:
    """Write what a model that reads documents chooses to the file `to`, batch by batch: ids only, ids and weights
    ("picks"), or "scores" too. Returns the trace without its tokens, which are in the file.

    `done` hears the number of tokens of every batch that was read.
    """
    accepted = inspect.signature(model.forward).parameters
    less = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}
    torch.manual_seed(seed)
    with torch.inference_mode(), record(model, detail, seed=seed, to=to) as recorder:
        for ids in tokens.batches:
            model(input_ids=ids.to(model.device), **less)
            done(ids.numel())
        recorder.describe(sequences=tokens.sequences, labels=labels, offsets=tokens.offsets, pieces=tokens.pieces)
        return recorder.outline()


def windows_of(tokenizer: Any, text: str, label: str = "text") -> list[tuple[str, Tensor]]:
    """A text cut into sequences of WINDOW tokens and a shorter rest."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = len(ids) // WINDOW * WINDOW
    parts = [*ids[:whole].view(-1, WINDOW).split(BATCH), ids[whole:][None]]
    if not len(ids):
        raise ValueError("the tokenizer makes nothing of this text: give another")
    return [(label, part) for part in parts if part.numel()]


def held_out_windows(tokenizer: Any) -> list[tuple[str, Tensor]]:
    """Sequences from documents of the four domains that the tiny model never saw, spread evenly over them."""
    import numpy as np

    from moesaic.train.data import DOMAINS, corpus
    from moesaic.train.packing import token_stream, windows

    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to set documents apart: use --text or --file")
    sequences = []
    for domain in DOMAINS:
        documents = corpus(domain, "held_out")
        share = CHARACTERS // len(documents)  # of each document, from its beginning
        rows = windows(token_stream(tokenizer, [d._replace(text=d.text[:share]) for d in documents]), WINDOW)
        chosen = np.linspace(0, len(rows) - 1, round(SEQUENCES * DOMAINS[domain].share)).astype(int)
        sequences += [(domain, part) for part in torch.from_numpy(rows[chosen]).split(BATCH)]
    return sequences


def check_before(model: Any, sequences: list[tuple[str, Tensor]], layer: int | None, token: int | None) -> None:
    """Refuse what cannot be routed, and a layer or token that the recording will not have, before anything is made."""
    known, highest = model.get_input_embeddings().num_embeddings, max(int(ids.max()) for _, ids in sequences)
    if highest >= known:
        raise ValueError(f"the tokenizer gives id {highest} and the model knows {known}: they do not belong together")
    counts = {"layer": len(moe_layers(model)), "token": sum(ids.numel() for _, ids in sequences)}
    check_numbers({"layer": layer, "token": token}, counts)


def check_numbers(given: dict[str, int | None], counts: dict[str, int]) -> None:
    for name, value in given.items():
        if value is not None and not 0 <= value < counts[name]:
            there = f"use 0 to {counts[name] - 1}" if counts[name] else f"there is no {name}"
            raise ValueError(f"--{name} {value} is not there: {there}")


def route(model: Any, sequences: list[tuple[str, Tensor]], seed: int = 0) -> Trace:
    """Record every gate's scores and picks while the model reads; `sequences` are (label, ids [n, tokens])."""
    labels = [label for label, ids in sequences for _ in ids]
    with torch.inference_mode(), record(model, detail="scores", labels=labels, seed=seed) as recorder:
        for _, ids in sequences:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return recorder.trace


def word_of(tokenizer: Any, trace: Trace, token: int) -> str:
    """A token as it may be shown: its text, or its bytes where it is only part of a character."""
    if trace.input_ids is None:
        return ""
    return repr(piece_of(tokenizer, int(trace.input_ids[token])))
