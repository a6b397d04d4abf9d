"""Several traces as one: the ranks of a run, shards of a corpus, files imported apart; or the layers of its stages."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from moesaic.trace.rule.given import check_trace
from moesaic.trace.store import TENSORS, Trace

ADDED = {"tokens": ("labels",), "layers": ("layers", "configs", "origins")}  # texts and configs that are put in a row
MERGED = ("missing", "pieces", "seed", "versions")
OF_TOKENS = ("input_ids", "phases", "offsets", "labels")  # the first stage of a pipeline alone may be told


def join(traces: Iterable[Trace], along: str = "tokens") -> Trace:
    """One trace of several of one model, in the order given.

    along "tokens": of the same layers; sequences are numbered on, so a sequence of one trace never goes on in the next.
    along "layers": of the same tokens, as the stages of a pipeline record them; what only some know of the tokens (ids,
    labels) is then known of all. All else has to be the same; `missing` and `pieces` are those of all, `seed` and
    `versions` what all agree on.

    ValueError, with the number of the trace and what differs, for traces that do not fit.
    """
    if isinstance(traces, Trace) or isinstance(along, Trace):
        raise ValueError("a trace was given by itself: give a list of them, ms.join([a, b])")
    if along not in ADDED:
        raise ValueError(f"along={along!r} is unknown: use 'tokens' or 'layers'")
    traces = list(traces)
    if not traces:
        raise ValueError("there is no trace to join: give at least one")
    for trace in traces:
        check_trace(trace)
    if along == "layers":
        traces = _told(traces)
    axis = {name: axes.index(along[0].upper()) for name, (axes, _) in TENSORS.items() if along[0].upper() in axes}
    for number, other in enumerate(traces[1:], 1):
        _check_fits(traces[0], other, number, along, {*axis, *ADDED[along]})
    fields: dict[str, Any] = {}
    for name in (*axis, *ADDED[along]):
        parts = [getattr(trace, name) for trace in traces]
        if parts[0] is not None:
            fields[name] = torch.cat(parts, axis[name]) if name in axis else tuple(itertools.chain(*parts))
    if along == "tokens":
        fields["sequences"] = torch.cat([t.sequences + n for t, n in zip(traces, _begins(traces), strict=False)])
    names = fields.get("layers", traces[0].layers)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"layer {twice!r} is in more than one trace: give stages that share no layer")
    return dataclasses.replace(traces[0], **fields, **_merged(traces, names))


def _told(stages: list[Trace]) -> list[Trace]:
    """Stages of one run, each with what another one knows of the tokens, and with zeros for the biases that no layer of
    it has: a record of the whole model has these."""
    alike = [stage for stage in stages if torch.equal(stage.sequences, stages[0].sequences)]  # others are refused later
    known = {name: next((v for s in alike if (v := getattr(s, name)) is not None), None) for name in OF_TOKENS}
    biased = any(stage.bias is not None for stage in stages)
    told = []
    for stage in stages:
        more: dict[str, Any] = {}
        if stage in alike:
            more |= {name: value for name, value in known.items() if value is not None and getattr(stage, name) is None}
        if biased and stage.bias is None and not any(config.has_correction_bias for config in stage.configs):
            more["bias"] = torch.zeros(stage.n_layers, stage.n_experts, dtype=torch.float32, device="cpu")
        told.append(dataclasses.replace(stage, **more) if more else stage)
    return told


def _begins(traces: list[Trace]) -> Iterator[int]:
    """The number of the first sequence of each trace; a label may be of a sequence that has no token."""
    return itertools.accumulate((max(t.n_sequences, len(t.labels or ())) for t in traces), initial=0)


def _check_fits(first: Trace, other: Trace, number: int, along: str, joined: set[str]) -> None:
    """ValueError unless the two have the same kinds of data, and are alike in all that is not joined."""
    sizes = [(trace.top_k, trace.n_experts) for trace in (first, other)]
    if sizes[0] != sizes[1]:
        (k, e), (k0, e0) = sizes[1], sizes[0]
        raise ValueError(
            f"trace {number} has {k} of {e} experts a token and trace 0 has {k0} of {e0}: join traces of one size"
        )
    for field in dataclasses.fields(Trace):
        name, a, b = field.name, getattr(first, field.name), getattr(other, field.name)
        if name in MERGED:
            continue
        if (a is None) != (b is None):
            here = 0 if b is None else number
            raise ValueError(f"only trace {here} has {name}: leave it out with dataclasses.replace(trace, {name}=None)")
        if name not in joined and not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            shown = "" if isinstance(a, torch.Tensor) else f" ({str(b)[:60]!r}, not {str(a)[:60]!r})"
            raise ValueError(
                f"trace {number} has another {name} than trace 0{shown}: along {along}, all else must be the same"
            )


def _merged(traces: list[Trace], layers: tuple[str, ...]) -> dict[str, Any]:
    pieces: dict[int, str] = {}
    for number, trace in enumerate(traces):
        for token, text in (trace.pieces or {}).items():
            if pieces.setdefault(token, text) != text:
                raise ValueError(
                    f"token {token} is {text[:40]!r} in trace {number} and {pieces[token][:40]!r} before: "
                    "join traces of one tokenizer"
                )
    seeds = {trace.seed for trace in traces}
    shared = set.intersection(*(set(trace.versions.items()) for trace in traces))
    missing = dict.fromkeys(itertools.chain(*(trace.missing for trace in traces)))
    return {
        "missing": tuple(name for name in missing if name not in layers),
        "pieces": pieces if any(trace.pieces is not None for trace in traces) else None,
        "seed": seeds.pop() if len(seeds) == 1 else None,
        "versions": {name: version for name, version in traces[0].versions.items() if (name, version) in shared},
    }
