"""The sorted assignments in batches: what the CPU engine computes at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Loads:
    """Rows that lie sorted by expert: `sizes[i]` of `experts[i]`, ascending. An expert cut into pieces comes several
    times, and counts as several."""

    experts: Sequence[int]
    sizes: Sequence[int]
    _smaller: dict[int, tuple["Loads", Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def average(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    @cached_property
    def span(self) -> slice:
        """Every expert from the first to the last."""
        return slice(self.experts[0], self.experts[-1] + 1)

    @cached_property
    def offsets(self) -> Int[Tensor, " e"]:
        """Where the rows of every expert in the span end, the first beginning at 0."""
        counts = [0] * (self.span.stop - self.span.start)
        for expert, size in zip(self.experts, self.sizes, strict=True):
            counts[expert - self.span.start] += size
        return torch.tensor(list(accumulate(counts)), dtype=torch.int32)

    def up_to(self, most: int) -> tuple["Loads", Int[Tensor, " m"]]:
        """The experts of at most so many rows, and which rows are theirs; worked out once."""
        if most not in self._smaller:
            chosen = [(expert, place) for expert, place in self.places() if len(place) <= most]
            rows = torch.tensor([row for _, place in chosen for row in place], dtype=torch.int64)
            loads = Loads([expert for expert, _ in chosen], [len(place) for _, place in chosen])
            self._smaller[most] = loads, rows
        return self._smaller[most]

    def places(self, over: int = 0) -> Iterator[tuple[int, range]]:
        """The experts of more than `over` rows, each with its rows."""
        stop = 0
        for expert, size in zip(self.experts, self.sizes, strict=True):
            start, stop = stop, stop + size
            if size > over:
                yield expert, range(start, stop)


@dataclass(frozen=True, eq=False)
class Batch:
    """Neighbouring pieces that are computed together.

    rows: [n] the token of each row.  here: where these rows lie among the sorted assignments.
    """

    pieces: list[Piece]
    rows: Tensor
    here: slice

    @cached_property
    def loads(self) -> Loads:
        return Loads([piece.expert for piece in self.pieces], [piece.stop - piece.start for piece in self.pieces])

    def expert_of_row(self) -> Int[Tensor, " n"]:
        return torch.tensor(self.loads.experts).repeat_interleave(torch.tensor(self.loads.sizes))


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
