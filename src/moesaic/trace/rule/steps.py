"""The 15 stages of a DeepSeek-V3 gate for one token, derived from what was recorded and checked against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.rule.derive import compare, derive, dtype_of, weight_tolerance, why_not_derived
from moesaic.trace.rule.stages import (
    BIAS_NOT_RECORDED,
    DERIVED,
    NEED_BIAS,
    NO_WEIGHTS,
    NOT_RECORDED,
    SKIPPED,
    SOME_ABSENT,
    STAGES,
    Stage,
    notes_of,
    shapes_of,
    worded,
)  # fmt: skip
from moesaic.trace.store import Trace
from moesaic.types import Routing

__all__ = ["STAGES", "Stage", "Step", "VersusTopK", "steps", "steps_of_routing", "versus_topk"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one stage gave for one token.

    shape: of the whole tensor, all tokens. value: this token's part; None where it is not known, and `note` says why.
    agrees: on stages 12 to 15, whether the derivation gives what was recorded; None where nothing was compared.
    tied: the choice hung on scores equal to float32's last bits, where another machine may choose differently.
    """

    stage: Stage
    shape: tuple[int, ...]
    value: Tensor | tuple[Tensor, Tensor] | None
    config: MoEConfig
    note: dict[str, str] | None = None
    agrees: bool | None = None
    tied: bool = False


class VersusTopK(NamedTuple):
    """The token's experts beside those of plain top-k over unbiased scores, without groups.

    only_topk: experts that top-k would take and this gate did not; only_here: the reverse. score_lost: the share of
    top-k's summed score that bias and groups gave up, 0..1. groups_here, groups_topk: groups that each one reaches.
    """

    topk: Tensor
    only_topk: Tensor
    only_here: Tensor
    score_lost: float
    groups_here: tuple[int, ...]
    groups_topk: tuple[int, ...]


def steps(source: Trace, layer: int = 0, token: int = 0) -> list[Step]:
    """The 15 stages of one token of a recorded layer. ValueError for a layer or token that is not in the trace.

    A stage that needs what was not recorded, or a rule that is not known, has no value and a note that says so.
    """
    if not -source.n_layers <= layer < source.n_layers:
        raise ValueError(f"layer={layer} is not in the trace: it has layers 0 to {source.n_layers - 1}")
    if not -len(source) <= token < len(source):
        raise ValueError(f"token={token} is not in the trace: it has {len(source)} tokens, counted from 0")
    counts = torch.bincount(source.sequences)
    lengths = counts[counts > 0]
    batch = (len(lengths), int(lengths[0])) if len(lengths) and bool((lengths == lengths[0]).all()) else None
    return _steps(
        None if source.logits is None else source.logits[layer, token],
        None if source.weights is None else source.weights[layer, token],
        source.picks[layer, token].long(),
        None if source.bias is None else source.bias[layer],
        source.configs[layer],
        len(source),
        batch=batch,
        dtypes=(dtype_of(source.dtypes.get("logits")), dtype_of(source.dtypes.get("weights"))),
        without_bias=why_not_derived(source, layer) is BIAS_NOT_RECORDED,
    )


def steps_of_routing(
    routing: Routing,
    bias: Tensor | None,
    config: MoEConfig,
    token: int = 0,
    *,
    hidden: Tensor | None = None,
    batch: tuple[int, int] | None = None,
    logits_dtype: str | None = None,
    weights_dtype: str | None = None,
) -> list[Step]:
    """The 15 stages of one token of a live routing. `hidden` [T, D] fills the first two; `batch` is (B, S).

    Scores are computed in `logits_dtype`, weights compared in `weights_dtype`: those of the tensors unless told.
    """
    return _steps(
        None if routing.logits is None else routing.logits[token].detach().cpu(),
        routing.weights[token].detach().cpu().float(),
        routing.expert_ids[token].detach().cpu(),
        bias,
        config,
        len(routing.expert_ids),
        hidden=None if hidden is None else hidden.detach().flatten(0, -2)[token].cpu(),
        batch=batch,
        dtypes=(dtype_of(logits_dtype), dtype_of(weights_dtype) or routing.weights.dtype),
    )


def _steps(
    logits: Tensor | None,
    weights: Tensor | None,
    ids: Tensor,
    bias: Tensor | None,
    config: MoEConfig,
    n_tokens: int,
    *,
    hidden: Tensor | None = None,
    batch: tuple[int, int] | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    without_bias: bool = False,
) -> list[Step]:
    """Of one token: logits [E], weights [K], ids [K]. without_bias: the rule has a bias that nobody recorded."""
    values: dict[str, Tensor | tuple[Tensor, Tensor] | None] = {"input": hidden, "tokens": hidden, "logits": logits}
    agrees: dict[str, bool | None] = {}
    tied, notes = False, notes_of(config)
    if logits is not None and config.rule_is_known:
        derived = derive(logits[None].to(dtypes[0] or logits.dtype), bias, config, ids[None])
        check = compare(
            derived, ids[None], None if weights is None else weights[None], config, weight_tolerance(dtypes[1])
        )
        values |= {key: value[0] for key, value in derived.items()}
        tied = bool(check.tied[0]) and not without_bias
        agrees = {"experts": bool(check.experts[0]), "scaled": None if weights is None else bool(check.weights[0])}
        agrees["output"] = agrees["experts"] and agrees["scaled"]
        if without_bias:
            notes = dict.fromkeys(NEED_BIAS, BIAS_NOT_RECORDED) | notes
        if config.topk_method == "balanced" or without_bias or bool((ids >= config.n_routed_experts).any()):
            agrees |= {"experts": None, "output": agrees["scaled"]}
        if weights is None:
            notes["scaled"] = DERIVED
    if (ids >= config.n_routed_experts).any():
        notes["experts"] = SOME_ABSENT
    values |= {"experts": ids, "output": ids if weights is None else (ids, weights)}
    if weights is None:
        notes["output"] = NO_WEIGHTS
    else:
        values["scaled"] = weights
    shapes = shapes_of(config, n_tokens, batch)
    return [
        Step(
            stage=worded(stage, config),
            shape=shapes[stage.key],
            value=None if stage.key in notes and stage.key in SKIPPED else values.get(stage.key),
            config=config,
            note=notes.get(stage.key) or (NOT_RECORDED if values.get(stage.key) is None else None),
            agrees=agrees.get(stage.key),
            tied=tied and stage.key in ("experts", "output"),
        )
        for stage in STAGES
    ]


def versus_topk(token_steps: Sequence[Step]) -> VersusTopK:
    """What plain top-k over the unbiased scores would have taken for the token of these steps."""
    by_key = {step.stage.key: step for step in token_steps}
    scores, here, config = by_key["scores"].value, by_key["experts"].value, token_steps[0].config
    if not isinstance(scores, Tensor) or not isinstance(here, Tensor):
        if not config.rule_is_known:
            raise ValueError("the rule of this layer is not known, so its scores are not: see the logits")
        raise ValueError("scores were not recorded: record with detail='scores'")
    here = here[here < config.n_routed_experts]  # the id E is no expert
    topk = rules.largest(scores[None], config.num_experts_per_tok)[0]
    taken = scores.softmax(-1) if config.score_after_topk else scores
    best, got = float(taken[topk].sum()), float(taken[here].sum())
    return VersusTopK(
        topk=topk,
        only_topk=topk[~torch.isin(topk, here)],
        only_here=here[~torch.isin(here, topk)],
        score_lost=(best - got) / best if best else 0.0,
        groups_here=_groups(here, config),
        groups_topk=_groups(topk, config),
    )


def _groups(expert_ids: Tensor, config: MoEConfig) -> tuple[int, ...]:
    return tuple((expert_ids // config.experts_per_group).unique().tolist())
