"""What if the gate had another rule: recorded scores routed again, and what that changes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Group
from torch import Tensor

from moesaic.trace.chance.bands import balance_numbers
from moesaic.trace.chance.placement import distinct_places, place_experts
from moesaic.trace.reroute import settings
from moesaic.trace.reroute.layer import Rerouted, reroute
from moesaic.trace.rule.derive import check_can_derive
from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_trace
from moesaic.trace.shown import Shown, finite, missing_notes, origin_notes
from moesaic.trace.slots import shared
from moesaic.trace.store import Trace


@dataclass(frozen=True, eq=False, repr=False)
class WhatIf(Shown):
    """A trace routed again by another rule, beside the one that was recorded.

    before: the record. trace: the same tokens with the experts and weights of the other rule, a Trace like any other.
    changes: what was asked, in plain values. flipped: tokens that would get other experts, bool [L, T].
    ties: per layer, tokens whose record differs from the recorded rule's choice by exact ties only; they count as
    flipped only where the other rule leaves that choice. astray: those that differ by more; the record then follows
    another rule than it says. kept: tokens without experts, which stay without. score_lost: share of the recorded
    choice's summed unbiased score, float64 [L]; below 0 where the other rule takes higher scores.
    groups: the group of every expert, int [E], None where neither rule has groups. placement: its node, int [E], None
    where none was given.
    """

    before: Trace
    trace: Trace
    changes: Mapping[str, Any]
    flipped: Tensor
    ties: Tensor
    astray: Tensor
    kept: int
    score_lost: Tensor
    groups: np.ndarray | None
    placement: np.ndarray | None

    def __repr__(self) -> str:
        return "\n".join(self.sentences()) + "\n(more: .trace, .by_layer(), .to_dict(), .sentences('zh'))"

    @property
    def share(self) -> float:
        """Share of (layer, token) pairs with other experts."""
        return float(self.flipped.float().mean()) if self.flipped.numel() else float("nan")

    @property
    def token_share(self) -> float:
        """Share of tokens with other experts in some layer."""
        return float(self.flipped.any(0).float().mean()) if self.flipped.numel() else float("nan")

    def by_layer(self) -> list[dict[str, Any]]:
        """Per layer: tokens flipped, assignments lost and gained; load, balance, groups and nodes before and after."""
        rows = []
        for layer, name in enumerate(self.before.layers):
            one, two = (trace.picks[layer] for trace in (self.before, self.trace))
            loads, both = _loads(one, two, self.before.n_experts)
            balance = [balance_numbers(load) for load in loads]
            reached = {
                name: None if place is None else [_reached(ids.numpy(), place) for ids in (one, two)]
                for name, place in (("groups", self.groups), ("nodes", self.placement))
            }
            rows.append({
                "layer": name,
                "origin": self.before.origins[layer],
                "tokens": len(one),
                "flipped": int(self.flipped[layer].sum()),
                "ties": int(self.ties[layer]),
                "astray": int(self.astray[layer]),
                "assignments_lost": int(loads[0].sum()) - both,
                "assignments_gained": int(loads[1].sum()) - both,
                "load": [load.tolist() for load in loads],
                "max_over_mean": [finite(numbers["max_over_mean"]) for numbers in balance],
                "cv": [finite(numbers["cv"]) for numbers in balance],
                "unused": [int((load == 0).sum()) for load in loads],
                **reached,
                "score_lost": finite(self.score_lost[layer]),
            })  # fmt: skip
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and words, for JSON; what is not known is None. Pairs are [before, after]."""
        return {
            "model": self.before.model,
            "changes": dict(self.changes),
            "reproduced": not int(self.astray.sum()),
            "flipped_share": finite(self.share),
            "flipped_tokens_share": finite(self.token_share),
            "kept_without_experts": self.kept,
            "missing": list(self.before.without_data),
            "notes": {lang: self.notes(lang) for lang in ("en", "zh")},
            "placement": None if self.placement is None else self.placement.tolist(),
            "score_lost": finite(self.score_lost.nanmean()),
            "layers": self.by_layer(),
        }

    def notes(self, lang: str = "en") -> list[str]:
        """What has to be said of the record whatever was asked."""
        before = self.before
        return missing_notes(before.without_data, lang) + origin_notes(before.layers, before.origins, lang)

    def sentences(self, lang: str = "en") -> list[str]:
        """What would change, in plain words."""
        from moesaic.trace.reroute.what_if_table import sentences

        return sentences(self, lang)

    def table(self, lang: str = "en") -> Group:
        from moesaic.trace.reroute.what_if_table import what_if_table

        return what_if_table(self, lang)


def what_if(
    trace: Trace,
    *,
    k: int | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    group_score: str | None = None,
    group_mask: str | None = None,
    bias: settings.Bias = None,
    drop_experts: Iterable[int] = (),
    nodes: int | None = None,
    placement: Sequence[int] | np.ndarray | None = None,
    anyway: bool = False,
    done: Callable[[int], None] = lambda _: None,
) -> WhatIf:
    """Route the recorded scores of every layer again with some of the rule changed. What is not given stays.

    bias: False leaves the correction bias out, a tensor [E] or [L, E] replaces it, {expert: delta} is added to it.
    drop_experts: never chosen, in any layer; the new trace gives them a bias of minus infinity. placement: the node of
    every expert, or nodes: their number, experts in equal runs; the nodes of a token are then counted too. done hears
    the number of layers as they are routed.

    Unchanged settings must give the recorded picks, exact ties apart: that is checked first, and where they do not,
    the recorded rule is not the one of the trace and this refuses, unless `anyway`. Raises ValueError, in one line,
    too where a rule is not known, scores were not recorded, a token has an expert twice, or the settings cannot be met.
    """
    _check_can_ask(trace)
    placed = None
    if placement is not None or nodes is not None:
        placed = place_experts(trace.n_experts, nodes=nodes, placement=placement)
    left_out = settings.dropped(trace, drop_experts)
    biases = settings.biases(trace, bias, left_out)
    gets_bias = biases is not None and trace.bias is None
    configs = [
        settings.changed(config, k, n_group, topk_group, group_score, group_mask, gets_bias) for config in trace.configs
    ]
    layers = []
    for layer, config in enumerate(configs):
        layers.append(reroute(trace, layer, config, None if biases is None else biases[layer], anyway=anyway))
        done(1)
    found = Rerouted(*map(torch.stack, zip(*layers, strict=True)))
    had, has = found.scores.sum(1).unbind(-1)
    after = replace(
        trace,
        picks=found.ids,
        weights=found.weights,
        bias=biases,
        configs=tuple(configs),
        origins=("derived",) * trace.n_layers,
    )
    asked = {"k": k, "n_group": n_group, "topk_group": topk_group, "group_score": group_score,
             "group_mask": group_mask, "bias": settings.plain_bias(bias), "drop_experts": left_out or None}  # fmt: skip
    changes = {name: value for name, value in asked.items() if value is not None}
    groups = settings.groups(trace.configs[0], configs[0])
    return WhatIf(
        trace,
        after,
        changes,
        flipped=found.flipped,
        ties=found.tied.sum(-1),
        astray=found.astray.sum(-1),
        kept=int(found.empty.sum()),
        score_lost=(had - has) / had,
        groups=groups,
        placement=placed,
    )


def _check_can_ask(trace: Trace) -> None:
    """ValueError for a trace that no rule can route again."""
    check_trace(trace)
    if not len(trace):
        raise ValueError("the trace has no tokens: there is nothing to route again")
    check_distinct(trace)
    for layer, config in enumerate(trace.configs):
        if config.topk_method == "balanced":
            raise ValueError(f"layer {trace.layers[layer]!r} deals experts out in turn: its scores decide nothing")
        check_can_derive(trace, layer)


def _loads(one: Tensor, two: Tensor, n_experts: int) -> tuple[list[np.ndarray], int]:
    """Assignments of every expert under two choices [T, K], and how many are in both."""
    loads = [np.bincount(ids.flatten().numpy(), minlength=n_experts + 1)[:n_experts] for ids in (one, two)]
    return loads, int(shared(one.numpy(), two.numpy(), n_experts).sum())


def _reached(picks: np.ndarray, place: np.ndarray) -> float | None:
    """Distinct places per token, mean over tokens that have experts."""
    reached = distinct_places(picks, place)
    reached = reached[reached > 0]
    return float(reached.mean()) if len(reached) else None
