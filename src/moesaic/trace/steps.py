"""The 15 stages of a DeepSeek-V3 gate for one token, derived from what was recorded and checked against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.trace.chance import limits_groups
from moesaic.trace.derive import compare, derive, dtype_of, weight_tolerance
from moesaic.trace.store import Trace
from moesaic.types import Routing


class Stage(NamedTuple):
    """One node of the flow chart: its number (1..15), a key, its names and what it computes."""

    number: int
    key: str
    name_zh: str
    name_en: str
    formula: str


STAGES = (
    Stage(1, "input", "输入", "input", "hidden_states"),
    Stage(2, "tokens", "重塑输入", "flatten", "x = hidden_states.view(-1, D)"),
    Stage(3, "logits", "线性变换", "linear", "logits = x @ weight.T"),
    Stage(4, "scores", "激活函数", "score", "scores = sigmoid(logits)"),
    Stage(5, "biased", "添加修正偏置", "add bias", "choice = scores + bias"),
    Stage(6, "grouped", "重塑为组形式", "by group", "choice.view(T, G, E/G)"),
    Stage(7, "group_scores", "每组 Top-2 求和", "group score", "sum(top2(choice))"),
    Stage(8, "groups", "选择节点", "pick groups", "topk(group_scores, M)"),
    Stage(9, "group_mask", "创建节点掩码", "group mask", "mask[groups] = 1"),
    Stage(10, "expert_mask", "扩展掩码到专家", "expert mask", "mask of experts"),
    Stage(11, "masked", "应用掩码", "apply mask", "choice where open, else -inf"),
    Stage(12, "experts", "选择 Top-K 专家", "pick experts", "topk(masked, K)"),
    Stage(13, "normalised", "权重归一化", "normalise", "w = scores[experts] / sum"),
    Stage(14, "scaled", "应用缩放因子", "scale", "w * routed_scaling_factor"),
    Stage(15, "output", "输出", "output", "expert_ids, weights"),
)
NOT_RECORDED = {"zh": "未记录", "en": "not recorded"}
ONE_GROUP = {"zh": "不适用：只有一组", "en": "n/a: one group"}
NO_GROUP_RULE = {"zh": "不适用：此方法不按组选择", "en": "n/a: this rule ignores groups"}
NO_BIAS = {"zh": "不适用：没有修正偏置", "en": "n/a: no correction bias"}
NO_NORM = {"zh": "不适用：不归一化", "en": "n/a: not normalised"}
GROUP_STAGES = ("grouped", "group_scores", "groups", "group_mask", "expert_mask", "masked")
SKIPPED = ("biased", *GROUP_STAGES)  # stages that do nothing where they do not apply, so show no value there
DEALT = {"zh": "轮流分配，与分数无关", "en": "dealt out in turn, not by score"}


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

    Stages that need logits have no value where only picks were recorded.
    """
    routing = source.layer(layer)
    if not -len(source) <= token < len(source):
        raise ValueError(f"token={token} is not in the trace: it has {len(source)} tokens, counted from 0")
    counts = torch.bincount(source.sequences)
    lengths = counts[counts > 0]
    batch = (len(lengths), int(lengths[0])) if len(lengths) and bool((lengths == lengths[0]).all()) else None
    bias = None if source.bias is None else source.bias[layer]
    return steps_of_routing(
        routing, bias, source.configs[layer], token, batch=batch, logits_dtype=source.dtypes["logits"],
        weights_dtype=source.dtypes["weights"],
    )  # fmt: skip


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
    ids, weights = routing.expert_ids[token].detach().cpu(), routing.weights[token].detach().cpu().float()
    x = None if hidden is None else hidden.detach().flatten(0, -2)[token].cpu()
    values: dict[str, Tensor | tuple[Tensor, Tensor] | None] = {"input": x, "tokens": x}
    agrees: dict[str, bool | None] = {}
    tied = False
    if routing.logits is not None:
        logits = routing.logits[token : token + 1 or None].detach().cpu()
        derived = derive(logits.to(dtype_of(logits_dtype) or logits.dtype), bias, config, ids[None])
        tolerance = weight_tolerance(dtype_of(weights_dtype) or routing.weights.dtype)
        check = compare(derived, ids[None], weights[None], config, tolerance)
        values |= {key: value[0] for key, value in derived.items()}
        tied = bool(check.tied[0])
        agrees = {"experts": bool(check.experts[0]), "scaled": bool(check.weights[0])}
        agrees["output"] = agrees["experts"] and agrees["scaled"]
        if config.topk_method == "balanced":
            agrees |= {"experts": None, "output": agrees["scaled"]}
    values |= {"experts": ids, "scaled": weights, "output": (ids, weights)}
    notes, shapes = _notes(config), _shapes(config, len(routing.expert_ids), batch)
    return [
        Step(
            stage=_worded(stage, config),
            shape=shapes[stage.key],
            value=None if stage.key in notes and stage.key in SKIPPED else values.get(stage.key),
            config=config,
            note=notes.get(stage.key) or (NOT_RECORDED if values.get(stage.key) is None else None),
            agrees=agrees.get(stage.key),
            tied=tied and stage.key in ("experts", "output"),
        )
        for stage in STAGES
    ]


def _shapes(config: MoEConfig, n_tokens: int, batch: tuple[int, int] | None) -> dict[str, tuple[int, ...]]:
    """Shape of the whole tensor of every stage, as in the flow chart."""
    e, k, d, g = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size, config.n_group
    per_token = {
        "tokens": (d,), "logits": (e,), "scores": (e,), "biased": (e,), "grouped": (g, e // g), "group_scores": (g,),
        "groups": (config.topk_group,), "group_mask": (g,), "expert_mask": (e,), "masked": (e,), "experts": (k,),
        "normalised": (k,), "scaled": (k,), "output": (k,),
    }  # fmt: skip
    return {"input": (*(batch or (n_tokens,)), d), **{key: (n_tokens, *shape) for key, shape in per_token.items()}}


def _notes(config: MoEConfig) -> dict[str, dict[str, str]]:
    """What a stage is to a config that does not have it."""
    notes = {}
    if not limits_groups(config):
        notes = dict.fromkeys(GROUP_STAGES, ONE_GROUP if config.n_group == 1 else NO_GROUP_RULE)
    if not config.has_correction_bias:
        notes["biased"] = NO_BIAS
    if not (config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_single_expert)):
        notes["normalised"] = NO_NORM
    if config.topk_method == "balanced":
        notes["experts"] = DEALT
    return notes


def versus_topk(token_steps: Sequence[Step]) -> VersusTopK:
    """What plain top-k over the unbiased scores would have taken for the token of these steps."""
    by_key = {step.stage.key: step for step in token_steps}
    scores, here, config = by_key["scores"].value, by_key["experts"].value, token_steps[0].config
    if not isinstance(scores, Tensor) or not isinstance(here, Tensor):
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


def _worded(stage: Stage, config: MoEConfig) -> Stage:
    """The formula as this config computes it."""
    counted = {
        "top2_sum": "top2",
        "max": "top1",
        "k_over_m_sum": f"top{config.num_experts_per_tok // config.topk_group}",
    }
    formulas = {
        "scores": "scores = logits (scored after top-k)"
        if config.score_after_topk
        else f"{config.scoring_func}(logits)",
        "group_scores": f"sum({counted[config.group_score_rule]}(choice))",
        "groups": f"topk(group_scores, {config.topk_group})",
        "masked": f"choice where open, else {config.group_mask}",
        "experts": f"topk(masked, {config.num_experts_per_tok})",
        "normalised": f"{config.scoring_func} over the kept" if config.score_after_topk else stage.formula,
        "scaled": f"w * {config.routed_scaling_factor:g}",
    }
    return stage._replace(formula=formulas.get(stage.key, stage.formula))
