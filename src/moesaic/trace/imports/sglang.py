"""SGLang's expert-distribution dumps: `expert_distribution_recorder_*.pt`, one a rank. Its answers: sglang_answers.py.

Source of the format: sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py (_DetailSinglePassGatherer,
_DetailAccumulator, _StatAccumulator) and model_executor/forward_batch_info.py (ForwardMode).
In the mode per_token the file is torch.save of {"records": [...], "last_physical_to_logical_map": [L, P]}; a record is
one forward pass of one rank: forward_pass_id, rank, input_ids, positions, extend_seq_lens, forward_mode, and
topk_ids_of_layer, int32 [layers of the model, tokens, 8]. The 8 is fixed there: a smaller K leaves -1 in the rest, and
so do dense layers and padding. Ids are physical experts; the map leads to logical ones.
In the modes stat and stat_approx (logical_count) and per_pass (global_physical_count) only counts are kept.
"""

import pickle
import re
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.strict_json import is_count
from moesaic.trace.imports import sglang_answers
from moesaic.trace.imports.assemble import MOST_PICKS, NONE, Imported, Part, assemble, without_copies, without_filler
from moesaic.trace.imports.notes import note
from moesaic.trace.imports.target import MOST_LAYERS, Target
from moesaic.trace.imports.untrusted import counts, is_json, size_of
from moesaic.trace.store import PHASES

MOST_ENTRIES = 1 << 20  # of the archive
DECODE, MIXED = 2, 3  # ForwardMode; 1 is EXTEND, a prefill
COUNTS_ONLY = (
    "holds counts per layer and expert, not what each token chose, so no trace can be made: record again with "
    "--expert-distribution-recorder-mode per_token (moesaic.trace.imports.sglang.read_counts gives the counts)"
)


class Pass(NamedTuple):
    """One forward pass of one rank. ids: physical experts [L, T, 8]. lengths: of the pieces of a prefill, or None."""

    where: str
    number: int
    ids: np.ndarray
    input_ids: np.ndarray
    positions: np.ndarray | None
    lengths: list[int] | None
    mode: int


def read(files: Iterable[Path], target: Target) -> Imported:
    """A trace of dumps or, where the first file is JSON, of answers with routed_experts."""
    every = iter(files)
    first = list(islice(every, 1))
    reader = sglang_answers.read if any(map(is_json, first)) else read_dumps
    return reader(chain(first, every), target)


def read_dumps(files: Iterable[Path], target: Target) -> Imported:
    """A trace of per_token dumps: the files of all ranks of one recording. Nothing in them is executed.

    The dumps hold no request ids: a piece of text goes on where an earlier one ended, in the order of the batch. Ranks
    that recorded the same tokens and picks (tensor parallelism) count once. ValueError, in one line, for counts and
    for anything else.
    """
    ranks: dict[int, list[Pass]] = {}
    maps: list[np.ndarray | None] = []
    n_picks = 0
    for path in files:
        content = _unpickled(path)
        if not isinstance(content, dict) or "logical_count" in content:
            raise ValueError(f"{path}: {COUNTS_ONLY if isinstance(content, dict) else 'not a dump of the recorder'}")
        for rank, one in _passes(content, path):
            n_picks += one.ids.size
            if n_picks > MOST_PICKS:
                raise ValueError(f"{path}: more than {MOST_PICKS:,} ids in all: import less")
            ranks.setdefault(rank, []).append(one)
        maps.append(_map_of(content, path))
    if not any(ranks.values()):
        raise ValueError("the dumps hold no forward passes: was anything recorded?")
    n_layers = _one_number_of_layers([one for passes in ranks.values() for one in passes])
    to_logical = _one_map(maps, n_layers, target)
    notes, distinct = without_copies({rank: _in_order(rank, passes) for rank, passes in ranks.items()}, _same)
    parts, shared, start = [], 0, 0
    for passes in distinct.values():
        numbers, start = _link(passes, start)
        for one, sequences in zip(passes, numbers, strict=True):
            ids, dropped = _logical(one, to_logical, target.n_experts)
            shared = max(shared, dropped)
            parts.append(Part(one.where, ids, sequences, one.input_ids, _phases(one)))
    if shared:
        notes.append(note("shared", count=shared))
    names = [f"layers.{number}" for number in range(n_layers)]
    imported = assemble(parts, names, range(n_layers), target)
    return imported._replace(notes=(*notes, *imported.notes))


def read_counts(path: Path) -> Tensor:
    """The counts of a dump of the mode stat: assignments per buffered step, layer and logical expert, int64 [S, L, E].

    Enough for loads; whether a load is chance needs the picks. ValueError for anything else.
    """
    content = _unpickled(path)
    found = content.get("logical_count") if isinstance(content, dict) else None
    if not isinstance(found, Tensor):
        raise ValueError(f"{path}: no logical_count: not a dump of the mode stat")
    _check_tensor(found, 3, str(path), "logical_count")
    if not found.numel() or int(found.min()) < 0:
        raise ValueError(f"{path}: logical_count is empty or negative somewhere: a damaged dump")
    return found.long()


def _unpickled(path: Path) -> Any:
    """What torch saved, if it is made of tensors, numbers, texts, lists and dicts. No code of the file runs."""
    size = size_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # a damaged directory fails in many ways
        raise ValueError(
            f"{path}: not a file of torch.save, or cut short (answers of the server are .json or .jsonl)"
        ) from None
    if len(entries) > MOST_ENTRIES or sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{path}: a compressed or overfull archive, which torch.save does not write")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message tells how to run the file's code; ours does not
        found = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"Python objects ({found[1]})" if found else "something else"
        raise ValueError(
            f"{path}: beside tensors, numbers, lists and dicts it holds {what}: it is not read, since that would run "
            "code of the file"
        ) from None
    except Exception as error:  # a damaged archive or pickle fails in any of many ways
        raise ValueError(f"{path}: a damaged file of torch.save ({type(error).__name__})") from None


def _passes(content: Mapping[str, Any], path: Path) -> list[tuple[int, Pass]]:
    records = content.get("records")
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a dump of the recorder: it has no list of records")
    found, n_bytes, size = [], 0, size_of(path)
    for index, record in enumerate(records):
        where = f"{path} record {index}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a dict")
        if "topk_ids_of_layer" not in record:
            raise ValueError(f"{path}: {COUNTS_ONLY if 'global_physical_count' in record else 'no topk_ids_of_layer'}")
        number, rank, mode = (record.get(name, 0) for name in ("forward_pass_id", "rank", "forward_mode"))
        if not all(map(is_count, (number, rank, mode))):
            raise ValueError(f"{where}: forward_pass_id, rank and forward_mode must be whole numbers from 0")
        ids = record["topk_ids_of_layer"]
        _check_tensor(ids, 3, where, "topk_ids_of_layer")
        n_bytes += ids.numel() * ids.element_size()
        if n_bytes > size:  # otherwise a small file in which all records point to one tensor fills the memory
            raise ValueError(f"{path}: its records share their tensors, which the recorder does not do")
        tokens = _numbers(record, "input_ids", ids.shape[1], where)
        if tokens is None:
            raise ValueError(f"{where}: no input_ids")
        lengths = record.get("extend_seq_lens")
        if lengths is not None:
            short = isinstance(lengths, list) and len(lengths) <= len(tokens)
            if not short or sum(counts(lengths, where, "extend_seq_lens")) != len(tokens):
                raise ValueError(f"{where}: extend_seq_lens do not add up to the {len(tokens)} input_ids")
        positions = _numbers(record, "positions", ids.shape[1], where)
        found.append((rank, Pass(where, number, ids.numpy(), tokens, positions, lengths, mode)))
    return found


def _numbers(record: Mapping[str, Any], name: str, length: int, where: str) -> np.ndarray | None:
    """A list of the record, one number a token, as int64 [T]; None where it is not there."""
    values = record.get(name)
    if values is None:
        return None
    if isinstance(values, list) and len(values) != length:
        raise ValueError(f"{where}: {len(values)} {name} and picks of {length} tokens")
    return np.array(counts(values, where, name), dtype=np.int64)


def _check_tensor(tensor: Any, n_axes: int, where: str, name: str) -> None:
    """A plain dense tensor of integers whose elements are really there: a stride of 0 would be a memory bomb."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{where}: {name} is not a plain tensor")
    if tensor.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}, and expert ids are int32")
    if tensor.dim() != n_axes or 0 in (tensor.shape[0], tensor.shape[-1]) or tensor.shape[0] > MOST_PICKS:
        raise ValueError(f"{where}: {name} has the shape {tuple(tensor.shape)}, and {n_axes} axes are due")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where}: {name} claims {tensor.numel():,} numbers that the file does not hold")


def _map_of(content: Mapping[str, Any], path: Path) -> np.ndarray | None:
    found = content.get("last_physical_to_logical_map")
    if found is None:
        return None
    _check_tensor(found, 2, str(path), "last_physical_to_logical_map")
    return found.long().numpy()


def _one_number_of_layers(passes: Sequence[Pass]) -> int:
    shapes = {(one.ids.shape[0], one.ids.shape[2]) for one in passes}
    if len(shapes) > 1:
        raise ValueError(f"the records differ in layers or in ids a token ({sorted(shapes)}): import models one by one")
    n_layers = shapes.pop()[0]
    if n_layers > MOST_LAYERS:
        raise ValueError(f"{n_layers} layers: at most {MOST_LAYERS} are read")
    return n_layers


def _one_map(maps: Sequence[np.ndarray | None], n_layers: int, target: Target) -> np.ndarray | None:
    """Physical to logical experts, [L, P]; None where no file has a map."""
    first = maps[0]
    for other in maps:
        same = other is None if first is None else other is not None and np.array_equal(first, other)
        if not same:
            raise ValueError("the files have different maps of experts: give files of one recording")
    if first is None:
        return None
    if len(first) != n_layers or first.min() < 0:
        raise ValueError(f"last_physical_to_logical_map of shape {first.shape} does not fit {n_layers} layers")
    if (n_logical := int(first.max()) + 1) != target.n_experts:
        raise ValueError(
            f"the dump is of {n_logical} experts (last_physical_to_logical_map), and {target.n_experts} were given: "
            "give the config of the model that was recorded"
        )
    return first


def _logical(one: Pass, to_logical: np.ndarray | None, n_experts: int) -> tuple[np.ndarray, int]:
    """Logical ids [L, T, 8] with NONE for none, and how many columns of fused shared experts were left out."""
    ids = without_filler(one.ids, n_experts) if one.ids.dtype.kind == "u" else one.ids.copy()
    if ids.size and ids.min() < NONE:
        raise ValueError(f"{one.where}: expert {int(ids.min())} was chosen: a damaged dump")
    n_physical = n_experts if to_logical is None else to_logical.shape[1]
    beyond = ids >= n_physical
    used = (ids >= 0).any((0, 1))
    shared = used & (beyond | (ids < 0)).all((0, 1))  # a column with nothing else
    ids[:, :, shared] = NONE
    if to_logical is not None:
        if (beyond & ~shared).any():
            expert = int(ids[beyond & ~shared][0])
            raise ValueError(f"{one.where}: expert {expert} is not among the {n_physical} of the map: a damaged dump")
        layer = np.arange(len(ids))[:, None, None]
        ids = np.where(ids < 0, NONE, to_logical[layer, np.maximum(ids, 0)])
    return ids.astype(np.int32), int(shared.sum())


def _in_order(rank: int, passes: Sequence[Pass]) -> list[Pass]:
    ordered = sorted(passes, key=lambda one: one.number)
    if len({one.number for one in ordered}) < len(ordered):
        raise ValueError(f"rank {rank} has a forward pass twice: is one file given twice?")
    return ordered


def _same(ours: list[Pass], theirs: list[Pass]) -> bool:
    return len(ours) == len(theirs) and all(
        a.number == b.number and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.ids, b.ids)
        for a, b in zip(ours, theirs, strict=True)
    )


def _link(passes: Sequence[Pass], start: int) -> tuple[list[np.ndarray], int]:
    """A sequence number for every token of every pass of one rank, from `start`, and the next free number.

    A piece that starts at a position beyond 0 goes on with the sequence that ended there, the one last seen; of
    several in one pass, in the order of the batch. Where none did, it is a sequence of its own.
    """
    # end of a sequence -> groups of sequences that were there in one pass, the latest pass last
    ends: dict[int, list[tuple[int, deque[int]]]] = defaultdict(list)
    numbers = []
    for index, one in enumerate(passes):
        lengths = one.lengths if one.lengths is not None else [1] * len(one.input_ids)
        firsts = np.cumsum([0, *lengths])[:-1].tolist()
        found, ended = [], []
        for first, length in zip(firsts, lengths, strict=True):
            at = 0 if one.positions is None or not length else int(one.positions[first])
            groups = ends.get(at) if at else None
            if groups:
                number = groups[-1][1].popleft()
                if not groups[-1][1]:
                    groups.pop()
            else:
                number, start = start, start + 1
            found.append(number)
            ended.append((at + length, number))
        for end, number in ended:  # only now: a token of this pass does not go on with another one
            if not ends[end] or ends[end][-1][0] != index:
                ends[end].append((index, deque()))
            ends[end][-1][1].append(number)
        numbers.append(np.repeat(np.array(found, dtype=np.int64), lengths))
    return numbers, start


def _phases(one: Pass) -> np.ndarray:
    phases = np.full(len(one.input_ids), PHASES.index("prefill"), dtype=np.uint8)
    if one.mode == DECODE:
        phases[:] = PHASES.index("decode")
    elif one.mode == MIXED and one.lengths is not None and one.positions is not None:
        lengths = np.repeat(np.array(one.lengths), one.lengths)
        phases[(lengths == 1) & (one.positions > 0)] = PHASES.index("decode")
    return phases
