"""Two records of the same tokens, put side by side, and what has to be said of them whatever they show."""

from dataclasses import replace

import torch

from moesaic.trace.depth import depth_of
from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_trace
from moesaic.trace.shown import missing_notes, origin_notes, visible, words_of
from moesaic.trace.store import Trace

UNCHECKED = {
    "en": "Not both records hold token ids, so whether the tokens are the same could not be checked.",
    "zh": "两份记录没有都存 token 编号，无法核对 token 是否相同。",
}


def aligned(a: Trace, b: Trace) -> tuple[Trace, Trace]:
    """Both, b with its tokens in the order of a. ValueError, with the reason, unless they are of the same tokens,
    layers and sizes, or where a token has an expert twice."""
    check_trace(a, "a")
    check_trace(b, "b")
    for what, here, there in (
        ("MoE layers", a.n_layers, b.n_layers),
        ("experts", a.n_experts, b.n_experts),
        ("experts per token", a.top_k, b.top_k),
        ("tokens", len(a), len(b)),
    ):
        if here != there:
            raise ValueError(
                f"the traces cannot be compared: {here} {what} in one and {there} in the other: record both alike"
            )
    for here, there in zip(a.layers, b.layers, strict=True):
        if depth_of(here) != depth_of(there) and None not in (depth_of(here), depth_of(there)):
            raise ValueError(
                f"the traces cannot be compared: layer {visible(here, 60)!r} of one stands where the other has "
                f"{visible(there, 60)!r}: record the same layers"
            )
    if min(a.n_sequences, b.n_sequences) == 1 < max(a.n_sequences, b.n_sequences):  # one does not tell texts apart
        known = a.sequences if a.n_sequences > 1 else b.sequences
        a, b = replace(a, sequences=known, labels=None), replace(b, sequences=known, labels=None)
    order = [trace.sequences.argsort(stable=True) for trace in (a, b)]
    unlike = a.sequences[order[0]] != b.sequences[order[1]]
    if unlike.any():
        where = int(order[0][unlike.nonzero()[0]])
        raise ValueError(
            f"the traces cannot be compared: their sequences are of other lengths, from token {where} on: record both "
            "in the same batches"
        )
    if not torch.equal(*order):
        b = b.select(order[1][order[0].argsort()])
    if a.input_ids is not None and b.input_ids is not None and not torch.equal(a.input_ids, b.input_ids):
        where = int((a.input_ids != b.input_ids).nonzero()[0])
        here, there = int(a.input_ids[where]), int(b.input_ids[where])
        raise ValueError(
            f"the traces are not of the same tokens: token {where} is id {here} in one and {there} in the other: "
            "record both with the same text"
        )
    for trace in (a, b):
        check_distinct(trace)
    return a, b


def tokens_checked(a: Trace, b: Trace) -> bool:
    """Whether token ids were there to prove that the tokens are the same."""
    return a.input_ids is not None and b.input_ids is not None


def without_data(a: Trace, b: Trace) -> tuple[str, ...]:
    """Layers that one of the two has no expert of, whether it says so or not, by the names that `a` has for them."""
    named = dict(zip(b.layers, a.layers, strict=True))
    return tuple(dict.fromkeys((*a.without_data, *(named.get(name, name) for name in b.without_data))))


def notes_of_both(
    a: Trace, b: Trace, lang: str, *, names: tuple[str, str] = ("a", "b"), missing: bool = True
) -> list[str]:
    """Sentences: where picks of either were not read at the experts, layers without data, tokens not checked."""
    colon = words_of({"en": ": ", "zh": "："}, lang)
    notes = []
    for name, trace in zip(names, (a, b), strict=True):
        own = origin_notes(trace.layers, trace.origins, lang)
        own += missing_notes(trace.without_data, lang) if missing else []
        notes += [f"{name}{colon}{note}" for note in own]
    return notes if tokens_checked(a, b) else [*notes, UNCHECKED[lang]]
