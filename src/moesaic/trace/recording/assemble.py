"""From what a recorder holds to one Trace: layers checked against each other, tokens numbered, memory moved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.hf.modules import MoELayer, unwrapped, with_sizes
from moesaic.trace.recording.columns import Column
from moesaic.trace.recording.forwards import Forward, number_sequences
from moesaic.trace.shown import piece_of
from moesaic.trace.store import Trace, stacked_biases, versions

Columns = Mapping[str, Column]  # "ids", "weights" and "logits" of one layer


def assemble(
    layers: Sequence[MoELayer],
    columns: Mapping[str, Columns],
    forwards: Mapping[str, Sequence[Forward]],
    biases: Mapping[str, Tensor],
    *,
    detail: str,
    model: Any,
    tokenizer: Any = None,
    **provenance: Any,
) -> Trace:
    """One trace; the columns keep its arrays instead of their own. ValueError where layers do not fit together."""
    seen = [layer for layer in layers if forwards[layer.name]] or list(layers)
    configs = [_config(layer, columns[layer.name]) for layer in seen]
    calls = forwards[seen[0].name]
    n_tokens = _check_one_size(seen, configs, forwards)
    n_experts, k = configs[0].n_routed_experts, configs[0].num_experts_per_tok
    arrays = {"ids": torch.empty(len(seen), n_tokens, k, dtype=id_dtype(n_experts))}
    if detail != "ids":
        arrays["weights"] = torch.empty(len(seen), n_tokens, k)
    if detail == "scores":
        arrays["logits"] = torch.empty(len(seen), n_tokens, n_experts)
    for name, out in arrays.items():
        _move(name, [(layer.name, columns[layer.name]) for layer in seen], out)
    input_ids = _input_ids(calls)
    return Trace(
        picks=arrays["ids"],
        weights=arrays.get("weights"),
        logits=arrays.get("logits"),
        bias=stacked_biases([biases.get(layer.name) for layer in seen], configs),
        layers=tuple(layer.name for layer in seen),
        configs=tuple(configs),
        origins=tuple(layer.origin for layer in seen),
        missing=tuple(layer.name for layer in layers if layer not in seen),
        sequences=number_sequences(calls),
        phases=_phases(calls),
        input_ids=input_ids,
        pieces=None if tokenizer is None or input_ids is None else pieces_of(tokenizer, input_ids),
        model=Path(getattr(unwrapped(model), "name_or_path", "")).name or type(unwrapped(model)).__name__,
        versions=versions(),
        **provenance,
    )


def id_dtype(n_experts: int) -> torch.dtype:
    """The smallest of the dtypes of Trace.picks that holds every id and E, "no expert"."""
    return torch.int16 if n_experts < 2**15 - 1 else torch.int32


def _config(layer: MoELayer, columns: Columns) -> MoEConfig:
    """The layer's config, with as many experts per token as were recorded."""
    width = columns["ids"].width if "ids" in columns else None
    return layer.config if width is None else with_sizes(layer.config, width)


def _check_one_size(
    layers: Sequence[MoELayer], configs: Sequence[MoEConfig], forwards: Mapping[str, Sequence[Forward]]
) -> int:
    """The number of tokens. One trace is one array: its layers must agree in E, K and T, and in the forwards."""
    sizes = []
    for layer, config in zip(layers, configs, strict=True):
        counts = [len(call.rows) if call.keep is None else int(call.keep.sum()) for call in forwards[layer.name]]
        sizes.append((config.n_routed_experts, config.num_experts_per_tok, sum(counts), counts))
    for layer, size in zip(layers, sizes, strict=True):
        whats = ("experts", "experts per token", "tokens", "tokens in each forward")
        for what, here, there in zip(whats, size, sizes[0], strict=True):
            if here != there:
                raise ValueError(
                    f"layer {layer.name!r} has {here} {what} and layer {layers[0].name!r} has {there}: "
                    "record them one by one"
                )
    return sizes[0][2]


def _move(name: str, columns: Sequence[tuple[str, Columns]], out: Tensor) -> None:
    for layer, (layer_name, held) in enumerate(columns):
        column = held.get(name)
        if (0 if column is None else len(column)) != out.shape[1]:
            raise ValueError(f"the router of layer {layer_name!r} gave no {name} per token: use detail='picks'")
        if column is not None:
            column.move_into(out[layer])
        if name == "logits" and are_probabilities(out[layer]):
            out[layer].log_()


def are_probabilities(scores: Tensor) -> bool:
    """True for rows that are no logits: some routers return what softmax made of them (gemma4)."""
    if not len(scores) or float(scores.min()) < 0:
        return False
    return bool(((scores.sum(-1) - 1).abs() < 1e-3).all())


def _input_ids(calls: Sequence[Forward]) -> Tensor | None:
    ids = [call.kept(call.input_ids) for call in calls if call.input_ids is not None]
    return torch.cat(ids) if ids and len(ids) == len(calls) else None


def _phases(calls: Sequence[Forward]) -> Tensor | None:
    """0 (prefill) or 1 (decode) per token, where every call of a language model was seen."""
    if not calls or not all(call.known and call.of_tokens for call in calls):
        return None
    return torch.cat([call.kept(torch.full_like(call.rows, int(call.decoding), dtype=torch.uint8)) for call in calls])


def pieces_of(tokenizer: Any, input_ids: Tensor) -> dict[int, str]:
    """Token id -> its text (see `piece_of`), for the ids that occur."""
    return {token: piece_of(tokenizer, token) for token in input_ids.unique().tolist()}
