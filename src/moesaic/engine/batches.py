"""The sorted assignments in batches: what the CPU engine computes at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Batch:
    """Neighbouring pieces that are computed together.

    rows: [n] the token of each row.  here: where these rows lie among the sorted assignments.
    """

    pieces: Sequence[Piece]
    rows: Tensor
    here: slice

    @cached_property
    def sizes(self) -> list[int]:
        return [piece.stop - piece.start for piece in self.pieces]

    @cached_property
    def span(self) -> slice:
        """Every expert from the first piece's to the last's."""
        return slice(self.pieces[0].expert, self.pieces[-1].expert + 1)

    @cached_property
    def offsets(self) -> Int[Tensor, " e"]:
        """Where the rows of every expert in the span end, the first beginning at 0."""
        counts = [0] * (self.span.stop - self.span.start)
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            counts[piece.expert - self.span.start] += size
        return torch.tensor(list(accumulate(counts)), dtype=torch.int32)

    def expert_of_row(self) -> Int[Tensor, " n"]:
        experts = torch.tensor([piece.expert for piece in self.pieces])
        return experts.repeat_interleave(torch.tensor(self.sizes))

    def run(self, first: int, stop: int) -> "Batch":
        """Some of the pieces, from number `first` on."""
        pieces = self.pieces[first:stop]
        here, begin = slice(pieces[0].start, pieces[-1].stop), self.here.start
        return Batch(pieces, self.rows[here.start - begin : here.stop - begin], here)


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
