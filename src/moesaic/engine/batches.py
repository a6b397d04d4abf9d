"""The sorted assignments in batches: what the CPU engine computes at a time."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

BATCH_ROWS = 512  # small experts share the cost of the operations between matmuls, in scratch that stays in cache
PIECE_ROWS = 1024  # a hot expert is cut here: memory stays bounded when all tokens go to one


class Piece(NamedTuple):
    """Rows start..stop of the sorted assignments, all of one expert; `first` and `last` of that expert's or not."""

    expert: int
    start: int
    stop: int
    first: bool
    last: bool


class Batch(NamedTuple):
    """Neighbouring pieces that are computed together.

    rows: [n] the token of each row.  here: where these rows lie among the sorted assignments.
    """

    pieces: list[Piece]
    rows: Tensor
    here: slice

    def expert_of_row(self) -> Int[Tensor, " n"]:
        experts = torch.tensor([piece.expert for piece in self.pieces])
        return experts.repeat_interleave(torch.tensor(self.sizes))

    @property
    def sizes(self) -> list[int]:
        return [piece.stop - piece.start for piece in self.pieces]


def span_of(pieces: Sequence[Piece]) -> slice:
    """Every expert from the first of neighbouring pieces to the last."""
    return slice(pieces[0].expert, pieces[-1].expert + 1)


def offsets_of(pieces: Sequence[Piece]) -> Int[Tensor, " e"]:
    """Where the rows of every expert in their span end, the first piece beginning at 0."""
    span = span_of(pieces)
    counts = [0] * (span.stop - span.start)
    for piece in pieces:
        counts[piece.expert - span.start] += piece.stop - piece.start
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def batches(counts: list[int], token_of: Tensor, piece_rows: int = PIECE_ROWS) -> Iterator[Batch]:
    """All assignments that `counts` covers, experts ascending."""
    pieces: list[Piece] = []
    start = begin = 0
    for expert, count in enumerate(counts):
        if not count:  # most are, for a few tokens
            continue
        end = start + count
        for cut in range(start, end, piece_rows):
            stop = min(cut + piece_rows, end)
            if pieces and stop - begin > BATCH_ROWS:
                yield Batch(pieces, token_of[begin:cut], slice(begin, cut))
                pieces, begin = [], cut
            pieces.append(Piece(expert, cut, stop, first=cut == start, last=stop == end))
        start = end
    if pieces:
        yield Batch(pieces, token_of[begin:start], slice(begin, start))
