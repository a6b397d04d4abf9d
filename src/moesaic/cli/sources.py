"""What the commands look at: the shipped or a given model, and real text as windows of tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.hf.modules import moe_layers
from moesaic.trace.record import record
from moesaic.trace.store import Trace

WINDOW = 128  # tokens routed as one sequence
CHARACTERS = 60_000  # of held-out text a domain that the sequences are drawn from: all of it would take 0.4 s longer
BATCH = 10  # sequences in one forward
SEQUENCES = 100  # of the four shipped domains together, in the shares the tiny model was trained on
SAMPLE = (
    "To be, or not to be: that is the question.\n床前明月光，疑是地上霜。\n"
    "A class definition is an executable statement.\nfor token in tokens: route(token)\n"
)


def read_text(text: str | None, file: Path | None) -> str | None:
    """The text that was asked for, or None where neither option was used."""
    if text is not None and file is not None:
        raise ValueError("--text and --file are both given: use one of them")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--file {file}: not UTF-8 text: give a text file") from None
        except OSError as error:
            raise ValueError(f"--file {file}: cannot be read ({error.strerror}): give a text file") from None
    if text is not None and not text.strip():
        raise ValueError("the text is empty: give a word at least")
    return text


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
            raise ValueError(f"--{name} {value} is not there: use 0 to {counts[name] - 1}")


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
    number = int(trace.input_ids[token])
    piece = tokenizer.decode([number])
    return repr(tokenizer.convert_ids_to_tokens(number) if "\ufffd" in piece else piece)
