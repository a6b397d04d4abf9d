"""Megatron-LM's router traces: `router_trace_rank*.jsonl`, written with `--moe-routing-trace-path`.

Source of the format: NVIDIA/Megatron-LM, megatron/core/transformer/moe/router_trace.py (RouterTracer, pull request
#5220). One JSON object a line for every call of a router: {"step", "stage": "pre_dispatch", "block": "decoder" | "mtp",
"layer", "rank", "num_tokens", "topk", "top_indices": [[...], ...]}, and "mtp_idx" in the block mtp.
A step of training has a record a layer and micro-batch, in the order of the calls, and another one where activations
are recomputed: layer by layer from the last one back, or some layers at once. A forward calls its layers in ascending
order; those of a rank with several virtual pipeline stages cannot be told apart. Layers count from 0 where hooks wrote
them (numbers of their pipeline stage) and from 1 where inference did.
There are neither token ids nor documents in it; hidden states and logits lie in files of their own, which are not read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.strict_json import is_count, parsed
from moesaic.trace.imports.assemble import MOST_PICKS, Imported, Part, assemble, without_copies
from moesaic.trace.imports.notes import Note, note
from moesaic.trace.imports.target import MOST_LAYERS, Target
from moesaic.trace.imports.untrusted import MOST_LINE, size_of, table


class Call(NamedTuple):
    """One call of the router of a decoder layer. ids: int32 [T, K]."""

    rank: int
    step: int
    layer: int
    ids: np.ndarray


class Step(NamedTuple):
    """What one rank did in one step. batches: of each micro-batch, in order, the ids [T, K] of every layer. n_repeated:
    calls of recomputed forwards. n_incomplete: micro-batches that lack a layer."""

    batches: list[list[np.ndarray]]
    n_repeated: int
    n_incomplete: int


def read(files: Iterable[Path], target: Target) -> Imported:
    """A trace of the decoder layers in these files: one rank a file, ranks that hold the same layers.

    Ranks that recorded the same picks (tensor parallelism) count once, and so does a recomputed forward; micro-batches
    that lack a layer are left out. ValueError, in one line, for anything else.
    """
    calls: dict[int, dict[int, list[Call]]] = {}  # rank -> step -> its calls in the order of the file
    file_of: dict[tuple[int, int], Path] = {}
    n_mtp = n_picks = 0
    for path in files:
        for call in _calls(path, target.n_experts):
            if call is None:
                n_mtp += 1
                continue
            if (other := file_of.setdefault((call.rank, call.step), path)) != path:
                raise ValueError(f"step {call.step} of rank {call.rank} is in {other} and in {path}: give one of them")
            n_picks += call.ids.size
            if n_picks > MOST_PICKS:
                raise ValueError(f"{path}: more than {MOST_PICKS:,} ids in all: import less")
            calls.setdefault(call.rank, {}).setdefault(call.step, []).append(call)
    if not calls:
        raise ValueError("no decoder layer was traced in these files: nothing can be imported")
    notes = [note("heads", count=n_mtp)] if n_mtp else []
    layers = _layers(calls)
    ranks = {
        rank: {step: _step(steps[step], len(layers), _where(rank, step)) for step in sorted(steps)}
        for rank, steps in calls.items()
    }
    if repeated := sum(step.n_repeated for steps in ranks.values() for step in steps.values()):
        notes.append(note("recomputed", count=repeated))
    copies, distinct = without_copies(ranks, _same)
    notes += copies
    if incomplete := sum(step.n_incomplete for steps in distinct.values() for step in steps.values()):
        notes.append(note("incomplete", count=incomplete))
    parts = [
        Part(_where(rank, step), np.stack(ids))
        for rank, steps in distinct.items()
        for step, found in steps.items()
        for ids in found.batches
    ]
    if not parts:
        raise ValueError("no step has all layers: nothing can be imported")
    numbers, shifted = _numbers(layers, target)
    names = [f"decoder.layers.{number}" for number in numbers]
    imported = assemble(parts, names, numbers, target)
    return imported._replace(notes=(*notes, *shifted, note("no_documents"), *imported.notes))


def _where(rank: int, step: int) -> str:
    return f"rank {rank} step {step}"


def _calls(path: Path, n_experts: int) -> Iterator[Call | None]:
    """The records of a file; None for one of another block than the decoder."""
    size_of(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise ValueError(f"{path} line {number}: longer than {MOST_LINE:,} bytes")
            if line.strip():
                where = f"{path} line {number}"
                yield _call(parsed(line, where), where, n_experts)


def _call(record: Any, where: str, n_experts: int) -> Call | None:
    if not isinstance(record, dict) or "top_indices" not in record:
        raise ValueError(f"{where}: not a record of a router trace: it has no top_indices")
    for name in ("step", "layer", "rank", "num_tokens", "topk"):
        if not is_count(record.get(name)):
            raise ValueError(f"{where}: {name} is not a whole number from 0")
    if (stage := record.get("stage", "pre_dispatch")) != "pre_dispatch":
        raise ValueError(f"{where}: stage {str(stage)[:40]!r} is unknown: pre_dispatch is read")
    if (block := record.get("block", "decoder")) not in ("decoder", "mtp"):
        raise ValueError(f"{where}: block {str(block)[:40]!r} is unknown: decoder is read, mtp left out")
    rows = table(record["top_indices"], where, "top_indices")
    due = (record["num_tokens"], record["topk"] if len(rows) else 0)
    if rows.shape != due:
        raise ValueError(f"{where}: top_indices has the shape {rows.shape}, and num_tokens and topk say {due}")
    if rows.size and not 0 <= rows.min() <= rows.max() < n_experts:
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise ValueError(
            f"{where}: expert {wrong} was chosen, and there are {n_experts}: give the config, or the --experts, of the "
            "model that was recorded"
        )
    if block != "decoder":
        return None
    return Call(record["rank"], record["step"], record["layer"], rows.astype(np.int32))


def _layers(ranks: Mapping[int, Mapping[int, Sequence[Call]]]) -> list[int]:
    """The layers of every rank. ValueError where ranks have different ones."""
    of_rank = {
        rank: sorted({call.layer for calls in steps.values() for call in calls}) for rank, steps in ranks.items()
    }
    first = min(of_rank)
    for rank, layers in of_rank.items():
        if layers != of_rank[first]:
            raise ValueError(
                f"rank {first} has layers {_span(of_rank[first])} and rank {rank} has {_span(layers)}: import the "
                "pipeline stages one by one"
            )
    if len(of_rank[first]) > MOST_LAYERS:
        raise ValueError(f"{len(of_rank[first])} layers: at most {MOST_LAYERS} are read")
    return of_rank[first]


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)})"


def _step(calls: Sequence[Call], n_layers: int, where: str) -> Step:
    """The forwards of one step: runs of calls of ascending layers. A run is a recompute, of a forward or of a part of
    one, where each of its calls repeats an earlier one of its layer, id for id."""
    seen: set[tuple[int, tuple[int, ...], bytes]] = set()
    batches, n_repeated, n_incomplete = [], 0, 0
    for run in _runs(calls):
        contents = {(call.layer, call.ids.shape, hashlib.sha256(call.ids.tobytes()).digest()) for call in run}
        if contents <= seen:
            n_repeated += len(run)
        elif len(run) < n_layers:
            n_incomplete += 1
        else:
            if len(shapes := {call.ids.shape for call in run}) > 1:
                raise ValueError(
                    f"{where}: micro-batch {len(batches)} has {' and '.join(map(str, sorted(shapes)))} ids in its "
                    "layers: they must be of the same tokens"
                )
            batches.append([call.ids for call in run])
        seen |= contents
    return Step(batches, n_repeated, n_incomplete)


def _runs(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls cut before each one whose layer does not lie above the layer before it."""
    run: list[Call] = []
    for call in calls:
        if run and call.layer <= run[-1].layer:
            yield run
            run = []
        run.append(call)
    if run:
        yield run


def _same(ours: Mapping[int, Step], theirs: Mapping[int, Step]) -> bool:
    return ours.keys() == theirs.keys() and all(
        len(ours[step].batches) == len(theirs[step].batches)
        and all(
            np.array_equal(one, two)
            for mine, other in zip(ours[step].batches, theirs[step].batches, strict=True)
            for one, two in zip(mine, other, strict=True)
        )
        for step in ours
    )


def _numbers(layers: Sequence[int], target: Target) -> tuple[list[int], list[Note]]:
    """Layer numbers from 0, as far as the config tells."""
    expected = set(target.layers or ())
    if expected and not set(layers) <= expected and {layer - 1 for layer in layers} <= expected:
        return [layer - 1 for layer in layers], [note("from_1")]
    return list(layers), []
