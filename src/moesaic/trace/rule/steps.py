"""The 15 stages of a DeepSeek-V3 gate for one token, derived from what was recorded and checked against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Group
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.rule.derive import bias_of, compare, derive, dtype_of, logits_of, weight_tolerance, why_not_derived
from moesaic.trace.rule.given import check_trace, layer_of, whole_number
from moesaic.trace.rule.stages import (
    BIAS_NOT_RECORDED,
    DERIVED,
    NEED_BIAS,
    NO_LOGITS,
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
from moesaic.trace.shown import Shown, counted, origin_notes, short_layer
from moesaic.trace.store import Trace


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        shape = list(self.shape) if self.shape else "?"
        return f"Step({self.stage.number} {self.stage.name_en}: {self.stage.formula}, shape {shape})"


@dataclass(frozen=True, eq=False, repr=False)
class Steps(Shown, Sequence[Step]):
    """The 15 stages of one token, in order, and whose they are.

    layer, token: the layer's name and the number of the token. origin: where its picks were read (see Trace.origins).
    """

    steps: tuple[Step, ...]
    layer: str
    token: int
    origin: str = "experts"

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __repr__(self) -> str:
        of_layer = f" of {short_layer(self.layer)}" if self.layer else ""
        experts = self.steps[11].value
        config = self.steps[0].config
        chosen = experts.tolist() if isinstance(experts, Tensor) else []
        named = " ".join(f"e{e}" if e < config.n_routed_experts else "–" for e in chosen)
        said = [f"token {self.token}{of_layer}: {named} of {counted(config.n_routed_experts, 'expert')}", *self.notes()]
        said += ["recorded values differ from the derived ones"] * any(step.agrees is False for step in self.steps)
        return "\n".join([*said, f"(more: [0] to [{len(self) - 1}], each with .stage, .value, .note)"])

    def notes(self, lang: str = "en") -> list[str]:
        """What has to be said of the record whatever its steps show."""
        missing = self.steps[2].note is NOT_RECORDED and self.origin != "imported"  # the logits
        return [*origin_notes([self.layer], [self.origin], lang), *([NO_LOGITS[lang]] if missing else [])]

    def table(self, lang: str = "en") -> Group:
        from moesaic.trace.rule.steps_table import steps_table

        title = f"token {self.token}  {short_layer(self.layer, lang)}"
        return steps_table(self, lang, versus=True, title=title)


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


def steps(source: Trace, layer: int | str = 0, token: int = 0) -> Steps:
    """The 15 stages of one token of a recorded layer. ValueError for a layer or token that is not in the trace.

    A stage that needs what was not recorded, or a rule that is not known, has no value and a note that says so.
    """
    check_trace(source, "source")
    layer, token = layer_of(source, layer), whole_number(token, "token")
    if not -len(source) <= token < len(source):
        raise ValueError(f"token={token} is not in the trace: it has {len(source)} tokens, counted from 0")
    token = range(len(source))[token]
    return Steps(_steps(source, layer, token), source.layers[layer], token, source.origins[layer])


def _steps(trace: Trace, layer: int, token: int) -> tuple[Step, ...]:
    config, ids, here = trace.configs[layer], trace.picks[layer, token].long(), slice(token, token + 1)
    logits = None if trace.logits is None else trace.logits[layer, token]
    weights = None if trace.weights is None else trace.weights[layer, token]
    without_bias = why_not_derived(trace, layer) is BIAS_NOT_RECORDED  # the rule has one that nobody recorded
    values: dict[str, Tensor | tuple[Tensor, Tensor] | None] = {"logits": logits}
    agrees: dict[str, bool | None] = {}
    tied, notes = False, notes_of(config)
    if logits is not None and config.rule_is_known:
        derived = derive(logits_of(trace, layer, here), bias_of(trace, layer), config, ids[None])
        tolerance = weight_tolerance(dtype_of(trace.dtypes.get("weights")))
        check = compare(derived, ids[None], None if weights is None else weights[None], config, tolerance)
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
    counts = torch.bincount(trace.sequences)
    lengths = counts[counts > 0]
    batch = (len(lengths), int(lengths[0])) if bool((lengths == lengths[0]).all()) else None
    shapes = shapes_of(config, len(trace), batch)
    return tuple(
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
    )


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
