"""Trace: what a model's routers decided, as tensors and their provenance. Its file: writer.py and reader.py."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.trace.slots import twice
from moesaic.types import Routing
from moesaic.versions import versions

FORMAT = "moesaic-trace"
FORMAT_VERSION = 1
TENSORS = {  # name -> axes (a letter of L layers, T tokens, K experts a token, E experts, or a number), dtype in memory
    "picks": ("LTK", None),  # by the number of experts: `id_dtype`
    "weights": ("LTK", torch.float32),
    "logits": ("LTE", torch.float32),
    "bias": ("LE", torch.float32),
    "input_ids": ("T", torch.int64),
    "sequences": ("T", torch.int64),
    "phases": ("T", torch.uint8),
    "offsets": ("T2", torch.int64),
}
TYPES = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}  # as safetensors and numpy call them
PHASES = ("prefill", "decode")  # a text read at once, training included, and tokens fed one by one to a cache
ORIGINS = ("experts", "router", "derived", "imported")  # handed to the experts; returned by the router; ...


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trace:
    """Recorded routing of L layers over T tokens, tokens batch-major and in the order of the forwards.

    picks: expert ids, int16 (int32 from 32767 experts on) [L, T, K], in the order of the model's own slots; id E is
        "no expert". weights: float32 [L, T, K], what combine multiplied by; None where only ids were recorded.
    logits: float32 [L, T, E] or None. bias: the correction bias of the picks, float32 [L, E] or None.
    layers, configs: a name and a MoEConfig per layer; topk_method="unknown" where only the sizes are known.
    origins: per layer, where its picks were taken (a key of ORIGINS). missing: MoE layers of the model without data.
    sequences: int64 [T], which sequence (document) a token belongs to, counted from 0.
    labels: one name per sequence (its domain, say) or None. phases: uint8 [T], a number of PHASES, or None.
    input_ids: int64 [T] or None. pieces: token id -> its text, raw: show it through `visible` only; or None.
    offsets: int64 [T, 2], where a token lies in the text of its sequence, in characters; or None.
    dtypes: what the model computed logits and weights in.
    """

    picks: Tensor
    layers: tuple[str, ...]
    configs: tuple[MoEConfig, ...]
    weights: Tensor | None = None
    logits: Tensor | None = None
    bias: Tensor | None = None
    input_ids: Tensor | None = None
    sequences: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"))
    phases: Tensor | None = None
    offsets: Tensor | None = None
    labels: tuple[str, ...] | None = None
    pieces: Mapping[int, str] | None = None
    origins: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"logits": "float32", "weights": "float32"})
    model: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.picks.dim() != 3:
            raise ValueError(f"picks of the trace have shape {tuple(self.picks.shape)}: three axes are due")
        n_layers, n_tokens, k = self.picks.shape
        sizes = {"L": n_layers, "T": n_tokens, "K": k, "E": self.n_experts, "2": 2}
        for name, (axes, _) in TENSORS.items():
            if (tensor := getattr(self, name)) is not None and tensor.shape != (due := tuple(sizes[a] for a in axes)):
                raise ValueError(f"{name} of the trace has shape {tuple(tensor.shape)}, not {due}")
        if not len(self.layers) == len(self.configs) == n_layers:
            raise ValueError(f"{n_layers} layers of picks, {len(self.layers)} names and {len(self.configs)} configs")
        if not self.origins:
            object.__setattr__(self, "origins", (ORIGINS[0],) * n_layers)
        if len(self.origins) != n_layers or not set(self.origins) <= set(ORIGINS):
            raise ValueError(
                f"origins={self.origins} are not one of {', '.join(ORIGINS)} for each of {n_layers} layers"
            )
        for name, config in zip(self.layers, self.configs, strict=True):
            if (config.n_routed_experts, config.num_experts_per_tok) != (self.n_experts, self.top_k):
                raise ValueError(
                    f"the config of layer {name!r} has {config.num_experts_per_tok} of {config.n_routed_experts} "
                    f"experts and the trace {self.top_k} of {self.n_experts}: give configs of one size"
                )
        if self.picks.numel() and not 0 <= int(self.picks.min()) <= int(self.picks.max()) <= self.n_experts:
            raise ValueError(f"picks of the trace lie outside 0..{self.n_experts}")
        check_tokens(self)

    @classmethod
    def from_routings(
        cls,
        routings: Mapping[str, Routing],
        configs: MoEConfig | Sequence[MoEConfig],
        biases: Mapping[str, Tensor | None] | None = None,
        *,
        sequences: Tensor | None = None,
        **provenance: Any,
    ) -> Self:
        """A trace of routings that are at hand: {layer name: Routing}. Tokens are one sequence unless told.

        `biases` gives each layer's correction bias. `provenance` are fields of Trace: input_ids, labels, model, seed.
        """
        names, rows = tuple(routings), list(routings.values())
        if not rows:
            raise ValueError("no layer was recorded: give at least one routing")
        per_layer = (configs,) * len(rows) if isinstance(configs, MoEConfig) else tuple(configs)
        experts = [config.n_routed_experts for config in per_layer]
        shapes = [row.expert_ids.shape for row in rows]
        check_one_size(names, [(e, k, t) for e, (t, k) in zip(experts, shapes, strict=True)])
        with_logits = all(row.logits is not None for row in rows)
        with_weights = all(row.weights is not None for row in rows)
        one_document = torch.zeros(len(rows[0].expert_ids), dtype=torch.int64, device="cpu")
        return cls(
            picks=_stack([row.expert_ids for row in rows], id_dtype(per_layer[0].n_routed_experts)),
            weights=_stack([row.weights for row in rows], torch.float32) if with_weights else None,
            logits=_stack([row.logits for row in rows], torch.float32) if with_logits else None,
            bias=stacked_biases([(biases or {}).get(name) for name in names], per_layer),
            sequences=one_document if sequences is None else sequences.long().cpu(),
            layers=names,
            configs=per_layer,
            dtypes=provenance.pop("dtypes", None)
            or {
                "logits": name_of(rows[0].logits),
                "weights": name_of(rows[0].weights),
            },
            versions=versions_here(),
            **provenance,
        )

    @property
    def n_layers(self) -> int:
        return self.picks.shape[0]

    @property
    def top_k(self) -> int:
        return self.picks.shape[2]

    @property
    def n_experts(self) -> int:
        return self.configs[0].n_routed_experts if self.configs else 0

    @property
    def n_sequences(self) -> int:
        return int(self.sequences.max()) + 1 if len(self.sequences) else 0

    @property
    def detail(self) -> str:
        """ "scores" where logits were recorded, "picks" where only ids and weights were, "ids" where only ids were."""
        return "scores" if self.logits is not None else "ids" if self.weights is None else "picks"

    @property
    def repeats(self) -> Tensor:
        """Per layer, how many tokens were given one expert more than once, int64 [L]. A gate that ranks gives none; a
        hash table that no checkpoint has filled (DeepSeek-V4), or a broken gate, does. "No expert" may repeat."""
        counts = [int(twice(picks.numpy(), self.n_experts).sum()) for picks in self.picks]
        return torch.tensor(counts, dtype=torch.int64, device="cpu")

    @property
    def without_data(self) -> tuple[str, ...]:
        """MoE layers of the model that no token has an expert in: recorded ones first, then `missing`."""
        empty = [all(bool((ids >= self.n_experts).all()) for ids in (picks[:1], picks)) for picks in self.picks]
        return (*(name for name, is_empty in zip(self.layers, empty, strict=True) if is_empty), *self.missing)

    def __len__(self) -> int:
        """Number of tokens."""
        return self.picks.shape[1]

    def __repr__(self) -> str:
        layers = "1 layer" if self.n_layers == 1 else f"{self.n_layers} layers"
        sequences = "1 sequence" if self.n_sequences == 1 else f"{self.n_sequences} sequences"
        what = f"top {self.top_k} of {self.n_experts} experts, detail={self.detail!r}"
        return f"Trace({self.model or 'no model name'}: {layers}, {len(self)} tokens in {sequences}, {what})"

    def layer(self, index: int | str) -> Routing:
        """The routing of a layer, by number or name: logits [T, E] or None, weights [T, K], expert_ids int64 [T, K]."""
        from moesaic.trace.rule.given import layer_of

        index = layer_of(self, index)
        if self.weights is None:
            raise ValueError("only ids were recorded, no weights: take `picks`, or record with detail='picks'")
        logits = None if self.logits is None else self.logits[index]
        return Routing(logits, self.weights[index], self.picks[index].long())

    def select(self, tokens: Tensor | slice | Sequence[int]) -> Self:
        """The same trace over some of its tokens: a slice, indices or a boolean mask. Sequences keep their numbers
        and labels."""
        index = torch.arange(len(self), device="cpu")[tokens]
        axis = {name: axes.index("T") for name, (axes, _) in TENSORS.items() if "T" in axes}
        present = {name: t for name in axis if (t := getattr(self, name)) is not None}
        return dataclasses.replace(self, **{name: t.index_select(axis[name], index) for name, t in present.items()})

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What was recorded as numpy arrays, by field name: "picks" int [L, T, K], "weights", and the rest present."""
        return {name: t.numpy() for name in TENSORS if (t := getattr(self, name)) is not None}

    def rows(self, layer: int | str | None = None) -> dict[str, np.ndarray]:
        """One row an assignment, of all layers or of one, as columns of equal length: `pandas.DataFrame(trace.rows())`.

        layer (its name), token, sequence, label, phase, input_id, piece, slot, expert (E is "no expert") and weight, as
        far as they are known; layer by layer, token by token, slot by slot.
        """
        from moesaic.trace.rows import rows
        from moesaic.trace.rule.given import layer_of

        return rows(self, range(self.n_layers) if layer is None else [layer_of(self, layer)])

    def save(self, path: str | Path) -> None:
        """Write the trace as one safetensors file (docs: trace-format); an older trace is replaced whole or not at
        all; ValueError for any other file that is there."""
        from moesaic.trace.file.writer import save

        save(self, path)


def check_tokens(trace: Trace) -> None:
    """ValueError for numbers of sequences, tokens or phases, offsets or labels, that no trace file may hold."""
    from moesaic.trace.file.limits import check_labels, check_offsets, check_range

    for name in ("sequences", "input_ids", "phases"):
        if (numbers := getattr(trace, name)) is not None and len(numbers):
            if numbers.is_floating_point():
                raise ValueError(f"{name} of {name_of(numbers)} were given: give whole numbers")
            check_range(name, int(numbers.min()), int(numbers.max()), trace.n_experts)
    check_labels(trace.labels, trace.n_sequences)
    if trace.offsets is not None:
        check_offsets(trace.offsets)


def stacked_biases(biases: Sequence[Tensor | None], configs: Sequence[MoEConfig]) -> Tensor | None:
    """One bias a layer, float32 [L, E]: zeros for layers that have none. None where no layer has one, or one that has a
    bias did not tell it."""
    told = [bias is not None or not config.has_correction_bias for bias, config in zip(biases, configs, strict=True)]
    if not all(told) or all(bias is None for bias in biases):
        return None
    zeros = torch.zeros(configs[0].n_routed_experts, device="cpu")
    return _stack([zeros if bias is None else bias for bias in biases], torch.float32)


def id_dtype(n_experts: int) -> torch.dtype:
    """The smallest of the dtypes of Trace.picks that holds every id and E, "no expert"."""
    return torch.int16 if n_experts < 2**15 - 1 else torch.int32


def versions_here() -> dict[str, str]:
    """What made a trace. transformers is named only where it is loaded already."""
    return versions(*(name for name in ("transformers",) if name in sys.modules))


def check_one_size(names: Sequence[str], sizes: Sequence[tuple[int, int, int]]) -> None:
    """One trace is one array: its layers must agree in E, K and T, their `sizes`. ValueError."""
    for name, size in zip(names, sizes, strict=True):
        for what, here, there in zip(("experts", "experts per token", "tokens"), size, sizes[0], strict=True):
            if here != there:
                raise ValueError(
                    f"layer {name!r} has {here} {what} and layer {names[0]!r} has {there}: record them one by one"
                )


def _stack(tensors: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.stack([t.detach().to("cpu", dtype) for t in tensors])


def name_of(tensor: Tensor | None) -> str:
    """The dtype of a tensor as a trace names it; float32 where there is none."""
    return "float32" if tensor is None else str(tensor.dtype).removeprefix("torch.")
