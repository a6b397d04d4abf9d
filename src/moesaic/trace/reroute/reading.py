"""Reading a trace along with a model that runs: which of its tokens the next forward holds."""

from copy import deepcopy

import torch
from torch import Tensor

from moesaic.trace.recording.forwards import Forward, SequenceNumbers
from moesaic.trace.store import Trace


class Reading:
    """Hands out the tokens of a trace, each once. A token is known by its sequence and its place in it, so forwards may
    be cut otherwise than they were recorded: a text at once, or its beginning and then token by token."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._order = trace.sequences.argsort(stable=True)  # tokens, sequence by sequence
        self._length = torch.bincount(trace.sequences, minlength=1)
        self._begin = self._length.cumsum(0) - self._length
        self._read = torch.zeros_like(self._length)  # tokens of each sequence that were handed out
        self._numbers = SequenceNumbers()
        self._before = self._read, self._numbers  # as they were before the last forward

    def take(self, forward: Forward) -> Tensor:
        """Tokens of the trace in the order of this forward's, int64 [n], -1 for padding. `forward` as
        `describe_forward` gives it. ValueError where they are not there, or are other tokens."""
        self._before = self._read.clone(), deepcopy(self._numbers)
        rows, keep = forward.rows, forward.keep
        kept = torch.ones_like(rows, dtype=torch.bool) if keep is None else keep
        sequences = self._numbers.of(forward)
        if self.trace.n_sequences <= 1:  # a record that does not tell texts apart is read in its order
            sequences = torch.zeros_like(sequences)
        out = torch.full_like(rows, -1)
        self.check_room(int(self._read.sum()) + len(sequences))
        if len(sequences) and int(sequences.max()) >= len(self._length):
            raise ValueError(
                f"the trace has {len(self._length)} sequences and the model begins another: it is of another run"
            )
        counts = torch.bincount(sequences, minlength=len(self._length))
        if len(over := (self._read + counts > self._length).nonzero()):
            first = int(over[0])
            raise ValueError(
                f"sequence {first} of the trace has {int(self._length[first])} tokens and the model runs "
                f"{int((self._read + counts)[first])} of it: it is of another run"
            )
        order = sequences.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[sequences[order]]
        tokens = self._order[(self._begin + self._read)[sequences] + place]
        self._check_ids(forward, kept, tokens)
        self._read += counts
        out[kept] = tokens
        return out

    @property
    def began(self) -> bool:
        """Whether any token was handed out."""
        return bool(self._read.any())

    def undo(self) -> None:
        """Take back what the last forward took."""
        self._read, self._numbers = self._before

    def check_room(self, n_tokens: int) -> None:
        """ValueError where the model has run more tokens than were recorded."""
        if n_tokens > len(self.trace):
            raise ValueError(f"the trace has {len(self.trace)} tokens and the model runs {n_tokens}: record them too")

    def _check_ids(self, forward: Forward, kept: Tensor, tokens: Tensor) -> None:
        if self.trace.input_ids is None or forward.input_ids is None:
            return
        here, there = forward.input_ids[kept], self.trace.input_ids[tokens]
        if len(wrong := (here != there).nonzero()):
            first = int(wrong[0])
            raise ValueError(
                f"token {int(tokens[first])} of the trace has id {int(there[first])} and the model is given "
                f"{int(here[first])}: it is of another text"
            )
