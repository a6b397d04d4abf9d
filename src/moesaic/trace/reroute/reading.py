"""Reading a trace along with a model that runs: which of its tokens the next forward holds."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from moesaic.trace.recording.forwards import Forward, SequenceNumbers
from moesaic.trace.store import Trace

PADDING, UNRECORDED = -1, -2  # tokens of a forward that are not in the trace


class Reading:
    """Hands out the tokens of a trace, each once. A token is known by its sequence and its place in it, so forwards may
    be cut otherwise than they were recorded: a text at once, or its beginning and then token by token.

    sequences: those of the trace that the rows of all forwards are, in their order; all of them unless told.
    last_unrecorded: a sequence may be one token longer than its record.
    """

    def __init__(
        self, trace: Trace, sequences: Sequence[int] | Tensor | None = None, *, last_unrecorded: bool = False
    ) -> None:
        self.trace, self.last_unrecorded = trace, last_unrecorded
        self._order = trace.sequences.argsort(stable=True)  # tokens, sequence by sequence
        length = torch.bincount(trace.sequences, minlength=1)
        self.in_order = sequences is None
        self._whole = last_unrecorded or not self.in_order  # who trains gives texts whole
        self._rows = torch.arange(len(length), device="cpu") if sequences is None else _checked(sequences, length)
        self._length = length[self._rows]  # of the sequence that each row is
        self._begin = (length.cumsum(0) - length)[self._rows]
        self._read = torch.zeros_like(self._length)  # tokens of each row that were handed out
        self._numbers = SequenceNumbers()
        self._before = self._read, self._numbers  # as they were before the last forward

    def take(self, forward: Forward) -> Tensor:
        """Tokens of the trace in the order of this forward's, int64 [n], PADDING or UNRECORDED for others. `forward`
        as `describe_forward` gives it. ValueError where they are not there, or are other tokens; nothing is then taken.
        """
        self._before = self._read.clone(), deepcopy(self._numbers)
        try:
            return self._take(forward)
        except ValueError:
            self.undo()
            raise

    def _take(self, forward: Forward) -> Tensor:
        kept = torch.ones_like(forward.rows, dtype=torch.bool) if forward.keep is None else forward.keep
        rows = self._numbers.of(forward)
        if self.in_order and len(self._rows) == 1:  # a record that does not tell texts apart is read in its order
            if self.last_unrecorded and rows.any():
                raise ValueError("last_unrecorded=True needs to know where texts end, and the trace has one sequence")
            rows = torch.zeros_like(rows)
        counts = torch.bincount(rows, minlength=len(self._length))
        self._check_counts(counts)
        order = rows.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[rows[order]]
        place += self._read[rows]
        recorded = place < self._length[rows]
        tokens = torch.full_like(rows, UNRECORDED)
        tokens[recorded] = self._order[(self._begin[rows] + place)[recorded]]
        self._check_ids(forward, kept, tokens)
        self._read += counts
        return torch.full_like(forward.rows, PADDING).masked_scatter(kept, tokens)

    def alone(self, start: int, n: int) -> Tensor:
        """The n tokens from `start` on in the order of the record, for a layer that is called alone."""
        if not self.in_order:
            raise ValueError("a layer that runs alone does not say which tokens it has: sequences= needs the model")
        if start + n > len(self.trace):
            raise ValueError(f"the trace has {len(self.trace)} tokens and the model runs {start + n}: record them too")
        return torch.arange(start, start + n, device="cpu")

    @property
    def began(self) -> bool:
        """Whether any token was handed out."""
        return bool(self._read.any())

    def check_whole(self) -> None:
        """Every text that was asked for was read to the end of its record: of one that was cut at its beginning, each
        token took the experts of an earlier one."""
        if not self._whole or not self.began:
            return
        if len(short := (self._read < self._length).nonzero()):
            row = int(short[0])
            length, read = int(self._length[row]), int(self._read[row])
            raise ValueError(
                f"sequence {int(self._rows[row])} of the trace has {length} tokens and the model ran {read} of it: "
                + ("cut the record as the text was cut (Trace.select)" if read else "say with sequences= which run")
                + ", or give every text whole"
            )

    def undo(self) -> None:
        """Take back what the last forward took."""
        self._read, self._numbers = self._before

    def _check_counts(self, counts: Tensor) -> None:
        """`counts` tokens of each row are there."""
        if len(counts) > len(self._length):
            if self.in_order:
                raise ValueError(
                    f"the trace has {len(self._length)} sequences and the model begins another: it is of another run"
                )
            raise ValueError(f"sequences= names {len(self._length)} and the model begins another: name every row's")
        read = self._read + counts
        room = self._length + (self.last_unrecorded & (self._length > 0))
        if len(over := (read > room).nonzero()):
            row = int(over[0])
            length, runs = int(self._length[row]), int(read[row])
            hint = ""
            if not length:
                hint = ", or a part of one, which keeps its numbers: say with sequences= which the rows are"
            elif runs == length + 1 and not self.last_unrecorded:
                hint = ", or an engine's, which never reads the last token that it chose: give last_unrecorded=True"
            raise ValueError(
                f"sequence {int(self._rows[row])} of the trace has {length} tokens and the model runs {runs} of it: "
                f"it is of another run{hint}"
            )

    def _check_ids(self, forward: Forward, kept: Tensor, tokens: Tensor) -> None:
        if self.trace.input_ids is None or forward.input_ids is None:
            return
        recorded = tokens >= 0
        here, there = forward.input_ids[kept][recorded], self.trace.input_ids[tokens[recorded]]
        if len(wrong := (here != there).nonzero()):
            first = int(wrong[0])
            raise ValueError(
                f"token {int(tokens[recorded][first])} of the trace has id {int(there[first])} and the model is given "
                f"{int(here[first])}: it is of another text"
            )


def _checked(sequences: Sequence[int] | Tensor, length: Tensor) -> Tensor:
    """Numbers of sequences that have tokens in the trace, int64 [n]."""
    numbers = torch.as_tensor(sequences, device="cpu")
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"sequences={sequences!r} are no numbers of sequences: give one whole number a row")
    for number in numbers.tolist():
        if not 0 <= number < len(length) or not length[number]:
            raise ValueError(
                f"sequences= names {number}, of which the trace has no token: its sequences are 0 to {len(length) - 1}"
            )
    return numbers.long()
