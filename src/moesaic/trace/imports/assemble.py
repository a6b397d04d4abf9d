"""From the picks of foreign records to a trace: checked, layers and tokens without data left out, and said so."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from moesaic.trace.imports.notes import Note, note
from moesaic.trace.imports.target import Target
from moesaic.trace.store import Trace, id_dtype, versions_here

R = TypeVar("R")
MOST_PICKS = 1 << 30  # ids of one trace, 2 GB; readers count while they read
NONE = -1  # no expert, until the number of experts is put there


class Imported(NamedTuple):
    """A trace, and what a reader of it must know about how it was made."""

    trace: Trace
    notes: tuple[Note, ...]


class Part(NamedTuple):
    """Some tokens of a record.

    picks: integers [L, T, K]; NONE is no expert, or no data. sequences: int64 [T], numbers from 0 that mean the same
    in all parts, or None where each part is a sequence. input_ids: int64 [T] or None. phases: uint8 [T] or None.
    label: of its sequences, or None.
    """

    where: str
    picks: np.ndarray
    sequences: np.ndarray | None = None
    input_ids: np.ndarray | None = None
    phases: np.ndarray | None = None
    label: str | None = None


def assemble(parts: Sequence[Part], layers: Sequence[str], numbers: Sequence[int], target: Target) -> Imported:
    """The trace of parts that agree in their layers. `layers` and `numbers` are names and numbers of the L layers.

    Raises ValueError, in one line, for ids that are no experts, for tokens that chose an expert twice, where the K of
    the record is not that of the config, and where nothing is left.
    """
    parts = [part for part in parts if part.picks.shape[1]]
    n_columns = _columns(parts, target)
    for part in parts:
        _check(part, n_columns, layers, target.n_experts)
    with_data, kept = _with_data(parts, n_columns, layers)
    missing, notes = _missing(with_data, layers, numbers, target)
    config = target.config_of(n_columns)
    picks = torch.cat([_filled(part, with_data, rows, n_columns, target.n_experts) for part, rows in kept], 1)
    if partly := int((picks == target.n_experts).all(-1).sum()):
        notes.append(note("partly", count=partly, all=picks.shape[0] * picks.shape[1]))
    if left_out := sum(part.picks.shape[1] for part in parts) - picks.shape[1]:
        notes.append(note("no_pick", count=left_out))
    sequences, labels = _numbered(kept)
    trace = Trace(
        picks=picks,
        layers=tuple(layers[i] for i in with_data),
        configs=(config,) * len(with_data),
        input_ids=_joined([None if p.input_ids is None else p.input_ids[rows] for p, rows in kept], torch.int64),
        phases=_joined([None if p.phases is None else p.phases[rows] for p, rows in kept], torch.uint8),
        sequences=sequences,
        labels=labels,
        origins=("imported",) * len(with_data),
        missing=missing,
        model=target.model,
        versions=versions_here(),
    )
    return Imported(trace, tuple(notes))


def _columns(parts: Sequence[Part], target: Target) -> int:
    """K: the columns that hold picks. ValueError where that is not what the config says."""
    used = max((int(np.flatnonzero((p.picks >= 0).any((0, 1))).max(initial=-1)) + 1 for p in parts), default=0)
    if not used:
        raise ValueError("the record holds no picks: nothing can be imported")
    width = max(part.picks.shape[2] for part in parts)
    if target.top_k is None:
        return used
    if used > target.top_k or width < target.top_k:
        raise ValueError(
            f"num_experts_per_tok={target.top_k} in the config, and the record holds {used} ids a token: "
            "give the config of the model that was recorded"
        )
    return target.top_k


def _check(part: Part, n_columns: int, layers: Sequence[str], n_experts: int) -> None:
    """Every id is an expert or NONE, and no token has an expert twice."""
    for index, ids in enumerate(part.picks[:, :, :n_columns]):
        wrong = (ids < NONE) | (ids >= n_experts)
        if wrong.any():
            token = int(wrong.any(-1).argmax())
            raise ValueError(
                f"{part.where}: token {token} of {layers[index]} chose expert {int(ids[wrong][0])}, and there are "
                f"{n_experts}: give the config, or the --experts, of the model that was recorded"
            )
        ordered = np.sort(ids, -1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
        if twice.any():
            token = int(twice.argmax())
            raise ValueError(
                f"{part.where}: token {token} of {layers[index]} chose one expert twice "
                f"({', '.join(map(str, ids[token].tolist()))}): the record is damaged, or is read in a wrong shape"
            )


def _with_data(
    parts: Sequence[Part], n_columns: int, layers: Sequence[str]
) -> tuple[list[int], list[tuple[Part, np.ndarray]]]:
    """The layers in which some token has a pick, and for every part the tokens that have one in some layer."""
    in_layer = np.zeros(len(layers), dtype=bool)
    kept = []
    for part in parts:
        there = np.any(part.picks[:, :, :n_columns] >= 0, axis=-1)  # [L, T]
        in_layer |= there.any(1)
        rows = np.flatnonzero(there.any(0))
        if len(rows):
            kept.append((part, rows))
    return np.flatnonzero(in_layer).tolist(), kept


def _missing(
    with_data: Sequence[int], layers: Sequence[str], numbers: Sequence[int], target: Target
) -> tuple[tuple[str, ...], list[Note]]:
    """MoE layers that the config names and the record lacks, and what to say about layers without picks."""
    empty = [i for i in range(len(layers)) if i not in with_data]
    if target.layers is None:
        return (), [note("empty", names=", ".join(layers[i] for i in empty))] if empty else []
    expected = set(target.layers)
    missing, notes = tuple(layers[i] for i in empty if numbers[i] in expected), []
    if missing:
        notes.append(note("missing", names=", ".join(missing)))
    if absent := sorted(expected - set(numbers)):
        notes.append(note("absent", names=", ".join(map(str, absent))))
        prefix = layers[0].removesuffix(str(numbers[0]))  # as the record names those that it reaches
        missing += tuple(f"{prefix}{number}" for number in absent)
    if dense := [layers[i] for i in with_data if numbers[i] not in expected]:
        notes.append(note("dense", names=", ".join(dense)))
    return missing, notes


def _filled(part: Part, with_data: list[int], rows: np.ndarray, n_columns: int, n_experts: int) -> Tensor:
    """[L, T, K] in the trace's own type, with the number of experts where there is none."""
    ids = part.picks[with_data][:, rows, :n_columns].astype(np.int32)  # 300 wraps to 44 in int8
    return torch.from_numpy(np.where(ids < 0, n_experts, ids)).to(id_dtype(n_experts))


def _numbered(kept: Sequence[tuple[Part, np.ndarray]]) -> tuple[Tensor, tuple[str, ...] | None]:
    """Sequences numbered from 0 in the order in which they first appear, and a label for each where all have one."""
    own = [
        np.full(len(rows), -1 - index) if part.sequences is None else part.sequences[rows]
        for index, (part, rows) in enumerate(kept)
    ]
    _, first, inverse = np.unique(np.concatenate(own), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[order] = np.arange(len(first))
    ends = np.cumsum([len(numbers) for numbers in own])
    of_sequence = [kept[part][0].label for part in np.searchsorted(ends, first[order], side="right")]
    labels = tuple(label for label in of_sequence if label is not None)
    return torch.from_numpy(rank[inverse]), labels if len(labels) == len(of_sequence) else None


def _joined(columns: Sequence[np.ndarray | None], dtype: torch.dtype) -> Tensor | None:
    """One tensor of all parts; None where a part has none."""
    there = [column for column in columns if column is not None]
    return torch.from_numpy(np.concatenate(there)).to(dtype) if len(there) == len(columns) else None


def without_copies(ranks: Mapping[int, R], same: Callable[[R, R], bool]) -> tuple[list[Note], dict[int, R]]:
    """Ranks that hold the same as an earlier one, as under tensor parallelism, left out; and said so."""
    notes: list[Note] = []
    kept: dict[int, R] = {}
    for rank in sorted(ranks):
        twin = next((other for other, theirs in kept.items() if same(ranks[rank], theirs)), None)
        if twin is None:
            kept[rank] = ranks[rank]
        else:
            notes.append(note("copy", rank=rank, twin=twin))
    return notes, kept


def without_filler(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Unsigned ids [..., K] as signed ones: what -1 became when it was cast (255, 65535) is NONE again.

    Where the largest number is an expert too, it is one unless the whole row is that number.
    """
    filler = np.iinfo(ids.dtype).max
    padding = ids == filler
    if n_experts > filler:
        padding &= padding.all(-1, keepdims=True) & (ids.shape[-1] > 1)
    return np.where(padding, NONE, ids.astype(np.int32))
