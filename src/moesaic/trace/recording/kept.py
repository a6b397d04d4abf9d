"""What a recorder keeps of the forwards that came to an end: rows of each layer, and what is told once a token."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from moesaic.trace.recording.forwards import Forward, SequenceNumbers


class Rows(NamedTuple):
    """What one call of one layer gave, copied, before it is known whether its forward comes to an end."""

    layer: str
    forward: Forward
    columns: dict[str, Tensor]  # "ids", "weights" or "logits" -> [n, width]


class Store(Protocol):
    """A growing [rows, width]: `Column` in memory, `Part` in a file."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int | None: ...

    def append(self, rows: Tensor) -> None: ...


S = TypeVar("S", bound=Store)


class Tally:
    """How many tokens a layer got, and in which forwards, in a few bytes however many there were."""

    def __init__(self) -> None:
        self.n_tokens = self.n_forwards = 0
        self._sizes = hashlib.sha256()

    def add(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        self.n_forwards += 1
        self._sizes.update(n_tokens.to_bytes(8, "little"))

    @property
    def sizes(self) -> str:
        """The same for layers whose forwards had the same numbers of tokens in the same order."""
        return self._sizes.hexdigest()


class Kept(Generic[S]):
    """columns: layer -> "ids", "weights" or "logits" -> its rows. tallies: layer -> what it got.
    tokens: "sequences", "input_ids" and "phases", [rows, 1], of the layer that was the first to report.
    """

    def __init__(self, layers: Iterable[str], new: Callable[[str, torch.dtype], S]) -> None:
        self._new = new  # (name, dtype) -> room for its rows
        self.columns: dict[str, dict[str, S]] = {name: {} for name in layers}
        self.tallies = {name: Tally() for name in self.columns}
        self.tokens: dict[str, S] = {}
        self._numbers = SequenceNumbers()
        self._first: str | None = None
        self._partly: set[str] = set()  # of the tokens: what some forwards told and others did not

    @property
    def n_sequences(self) -> int:
        return self._numbers.count

    def agreeing(self) -> list[str]:
        """The layers that got the tokens that the first one got, in the same forwards."""
        sizes = None if self._first is None else self.tallies[self._first].sizes
        return [layer for layer, tally in self.tallies.items() if tally.n_forwards and tally.sizes == sizes]

    def add(self, rows: Rows) -> None:
        """Keep what one layer gave in one forward, without the padding."""
        held = self.columns[rows.layer]
        kept = {name: rows.forward.kept(tensor) for name, tensor in rows.columns.items()}
        for name, tensor in kept.items():
            if name not in held:
                held[name] = self._new(f"{name}.{list(self.columns).index(rows.layer)}", tensor.dtype)
            held[name].append(tensor)
        if "ids" not in kept:
            return
        self.tallies[rows.layer].add(len(kept["ids"]))
        self._first = self._first or rows.layer
        if rows.layer == self._first:
            self._tell(rows.forward)

    def _tell(self, forward: Forward) -> None:
        """What a forward says of its tokens. Ids and phases count only where every forward tells them."""
        told: dict[str, Tensor | None] = {"sequences": self._numbers.of(forward), "input_ids": None, "phases": None}
        if forward.input_ids is not None:
            told["input_ids"] = forward.kept(forward.input_ids)
        if forward.known and forward.of_tokens:
            told["phases"] = forward.kept(torch.full_like(forward.rows, int(forward.decoding), dtype=torch.uint8))
        for name, numbers in told.items():
            if numbers is None:
                self._partly.add(name)
                self.tokens.pop(name, None)
            elif name not in self._partly:
                if name not in self.tokens:
                    self.tokens[name] = self._new(name, numbers.dtype)
                self.tokens[name].append(numbers[:, None])


def check_same_forwards(layers: Sequence[str], tallies: Sequence[Tally]) -> None:
    """Layers of one trace must have got their tokens in the same forwards. ValueError."""
    for name, tally in zip(layers, tallies, strict=True):
        if tally.sizes != tallies[0].sizes:
            raise ValueError(
                f"layer {name!r} got its tokens in other forwards than layer {layers[0]!r} "
                f"({tally.n_forwards} and {tallies[0].n_forwards}): record them one by one"
            )


def on_cpu(pending: Sequence[Rows]) -> list[Rows]:
    """The same rows on the CPU, with one transfer for every dtype and device instead of one for every tensor."""
    tensors = [tensor for rows in pending for tensor in rows.columns.values()]
    groups: dict[tuple, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(place)
    for places in groups.values():
        flat = torch.cat([tensors[place].flatten() for place in places]).cpu()
        pieces = flat.split([tensors[place].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            tensors[place] = piece.view(tensors[place].shape)
    moved = iter(tensors)
    return [rows._replace(columns={name: next(moved) for name in rows.columns}) for rows in pending]
