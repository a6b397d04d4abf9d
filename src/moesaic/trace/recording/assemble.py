"""From what a recorder kept to one Trace, or to one file: layers checked against each other, memory moved."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.hf.modules import MoELayer, unwrapped, with_sizes
from moesaic.trace.file.limits import MOST_TEXT
from moesaic.trace.file.parts import Part, joined, of_tensor
from moesaic.trace.file.writer import write
from moesaic.trace.recording.columns import Column
from moesaic.trace.recording.kept import Kept, S, Store, check_same_forwards
from moesaic.trace.recording.watch import DETAILS
from moesaic.trace.shown import piece_of
from moesaic.trace.store import TENSORS, Trace, check_one_size, id_dtype, stacked_biases, versions_here

OF_LAYERS = {"picks": "ids", "weights": "weights", "logits": "logits"}  # a tensor of a trace: what it was kept as


def outline(
    layers: Sequence[MoELayer],
    kept: Kept[S],
    biases: Mapping[str, Tensor],
    *,
    detail: str,
    model: Any,
    only_agreeing: bool = False,
    **provenance: Any,
) -> Trace:
    """The trace without its tokens. ValueError where the layers do not fit together, unless those that do not fit to
    the first that reported are to be `missing`."""
    seen = [layer for layer in layers if kept.tallies[layer.name].n_forwards] or list(layers)
    configs = [_config(layer, kept.columns[layer.name]) for layer in seen]
    if only_agreeing and (fits := kept.agreeing()):
        size = next(size_of(config) for layer, config in zip(seen, configs, strict=True) if layer.name == fits[0])
        pairs = [(a, b) for a, b in zip(seen, configs, strict=True) if a.name in fits and size_of(b) == size]
        seen, configs = [layer for layer, _ in pairs], [config for _, config in pairs]
    names = [layer.name for layer in seen]
    sizes = [size_of(config) for config in configs]
    tallies = [kept.tallies[name] for name in names]
    check_one_size(names, [(*size, tally.n_tokens) for size, tally in zip(sizes, tallies, strict=True)])
    check_same_forwards(names, tallies)
    n_experts, k = sizes[0]
    rows = {"picks": k, "weights": k, "logits": n_experts}
    dtypes = {"picks": id_dtype(n_experts), "weights": torch.float32, "logits": torch.float32}
    none: dict[str, Any] = {
        name: torch.empty(len(seen), 0, rows[name], dtype=dtypes[name], device="cpu")
        for name in list(rows)[: DETAILS.index(detail) + 1]
    }
    return Trace(
        **none,
        bias=stacked_biases([biases.get(name) for name in names], configs),
        layers=tuple(names),
        configs=tuple(configs),
        origins=tuple(layer.origin for layer in seen),
        missing=tuple(layer.name for layer in layers if layer not in seen),
        model=Path(getattr(unwrapped(model), "name_or_path", "")).name or type(unwrapped(model)).__name__,
        versions=versions_here(),
        **provenance,
    )


def assemble(like: Trace, kept: Kept[Column], given: Mapping[str, Any], tokenizer: Any = None) -> Trace:
    """One trace in memory; what is kept has the trace's arrays instead of its own afterwards.

    given: fields of Trace that are used instead of what was kept.
    """
    n_tokens = _checked(like, kept, given)
    fields: dict[str, Any] = {}
    for name, column in kept.tokens.items():
        whole = torch.empty(n_tokens, 1, dtype=column.dtype, device="cpu")
        column.move_into(whole)
        fields[name] = whole[:, 0]
    for name, columns in _layered(like, kept, n_tokens):
        width, dtype = getattr(like, name).shape[2], getattr(like, name).dtype
        out = torch.empty(len(columns), n_tokens, width, dtype=dtype, device="cpu")
        for layer, column in enumerate(columns):
            column.move_into(out[layer])
        fields[name] = out
    if tokenizer is not None and "input_ids" in fields:
        fields["pieces"] = pieces_of(tokenizer, fields["input_ids"].unique().tolist())
    return dataclasses.replace(like, **{**fields, **given})


def write_file(path: Path, like: Trace, kept: Kept[Part], given: Mapping[str, Any], tokenizer: Any = None) -> None:
    """The same trace as a file, from parts that are files: byte for byte what `assemble` and `save` would give."""
    n_tokens = _checked(like, kept, given)
    columns = {name: of_tensor(t) for name in TENSORS if (t := getattr(like, name)) is not None}
    for name, part in kept.tokens.items():
        columns[name] = joined([part], (n_tokens,))
    for name, parts in _layered(like, kept, n_tokens):
        shape = (len(parts), n_tokens, getattr(like, name).shape[2])
        columns[name] = joined(parts, shape)
    fields: dict[str, Any] = {name: value for name, value in given.items() if name not in TENSORS}
    columns |= {name: of_tensor(value) for name, value in given.items() if name in TENSORS}
    if tokenizer is not None and "input_ids" in kept.tokens:
        ids: set[int] = set().union(*(np.unique(block).tolist() for block in kept.tokens["input_ids"].blocks()))
        fields = {"pieces": pieces_of(tokenizer, sorted(ids)), **fields}
    columns = {name: columns[name] for name in TENSORS if name in columns}
    write(path, columns, dataclasses.replace(like, **fields))


def size_of(config: MoEConfig) -> tuple[int, int]:
    return config.n_routed_experts, config.num_experts_per_tok


def _config(layer: MoELayer, columns: Mapping[str, Store]) -> MoEConfig:
    """The layer's config, with as many experts per token as were recorded."""
    width = columns["ids"].width if "ids" in columns else None
    return layer.config if width is None else with_sizes(layer.config, width)


def _checked(like: Trace, kept: Kept[Any], given: Mapping[str, Any]) -> int:
    """The number of tokens; ValueError where what is given is of another number."""
    n_tokens = kept.tallies[like.layers[0]].n_tokens
    for name, value in given.items():
        if name in TENSORS and len(value) != n_tokens:
            raise ValueError(
                f"{name} of {len(value)} tokens were given and {n_tokens} recorded: the model's layers see other tokens"
            )
    return n_tokens


def _layered(like: Trace, kept: Kept[S], n_tokens: int) -> Iterator[tuple[str, list[S]]]:
    """The tensors of the detail that was asked for, by their name in a trace, as they were kept layer by layer."""
    for name, kept_as in OF_LAYERS.items():
        if getattr(like, name) is None or not n_tokens:
            continue
        found = [kept.columns[layer].get(kept_as) for layer in like.layers]
        for layer, column in zip(like.layers, found, strict=True):
            if column is None or len(column) != n_tokens:
                raise ValueError(f"the router of layer {layer!r} gave no {name} per token: use detail='picks'")
        yield name, [column for column in found if column is not None]


def pieces_of(tokenizer: Any, numbers: Sequence[int]) -> dict[int, str]:
    """Token id -> its text (see `piece_of`), of a very long one the beginning."""
    return {token: piece_of(tokenizer, token)[:MOST_TEXT] for token in numbers}
