"""The 15 stages of a DeepSeek-V3 gate: names, formulas and shapes as a config has them, and what it does not have."""

from typing import NamedTuple

from moesaic.config import MoEConfig


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
    Stage(5, "biased", "添加选择偏置", "add bias", "choice = scores + bias"),
    Stage(6, "grouped", "重塑为组形式", "by group", "choice.view(T, G, E/G)"),
    Stage(7, "group_scores", "每组 Top-2 求和", "group score", "sum(top2(choice))"),
    Stage(8, "groups", "选择组", "pick groups", "topk(group_scores, M)"),
    Stage(9, "group_mask", "创建组掩码", "group mask", "mask[groups] = 1"),
    Stage(10, "expert_mask", "扩展掩码到专家", "expert mask", "mask of experts"),
    Stage(11, "masked", "应用掩码", "apply mask", "choice where open, else -inf"),
    Stage(12, "experts", "选择 Top-K 专家", "pick experts", "topk(masked, K)"),
    Stage(13, "normalised", "权重归一化", "normalise", "w = scores[experts] / sum"),
    Stage(14, "scaled", "应用缩放因子", "scale", "w * routed_scaling_factor"),
    Stage(15, "output", "输出", "output", "expert_ids, weights"),
)
GROUP_STAGES = ("grouped", "group_scores", "groups", "group_mask", "expert_mask", "masked")
SKIPPED = ("biased", *GROUP_STAGES)  # stages that do nothing where they do not apply, so show no value there
NEED_RULE = ("scores", *SKIPPED, "normalised")
NEED_BIAS = SKIPPED  # these cannot be derived where the model has a bias that was not recorded

NOT_RECORDED = {"zh": "未记录", "en": "not recorded"}
NO_LOGITS = {
    "zh": "logits 未记录：请用 detail='scores'（--detail scores）记录",
    "en": "logits were not recorded: record with detail='scores' (--detail scores)",
}
NO_WEIGHTS = {"zh": "权重未记录", "en": "weights were not recorded"}
DERIVED = {"zh": "推导得出，未记录", "en": "derived, not recorded"}
BIAS_NOT_RECORDED = {"zh": "选择偏置未记录", "en": "the correction bias was not recorded"}
RULE_UNKNOWN = {"zh": "此层的路由规则未知", "en": "the rule of this layer is not known"}
ONE_GROUP = {"zh": "此模型没有：只有一组", "en": "not in this model: one group"}
NO_GROUP_RULE = {"zh": "此模型没有：不按组选择", "en": "not in this model: the rule ignores groups"}
NO_BIAS = {"zh": "此模型没有：没有选择偏置", "en": "not in this model: no correction bias"}
NO_NORM = {"zh": "此模型没有：不归一化", "en": "not in this model: not normalised"}
NO_SCALE = {"zh": "此模型没有：缩放因子为 1", "en": "not in this model: the factor is 1"}
SCORED_LATER = {
    "zh": "此模型没有：先选专家，后算分数",
    "en": "not in this model: logits are ranked, scored later",
}
DEALT = {"zh": "轮流分配，与分数无关", "en": "dealt out in turn, not by score"}
SOME_ABSENT = {"zh": "有的位置没有专家", "en": "some slots hold no expert"}


def notes_of(config: MoEConfig) -> dict[str, dict[str, str]]:
    """What a stage is to a config that does not have it, by key of the stage."""
    if not config.rule_is_known:
        return dict.fromkeys(NEED_RULE, RULE_UNKNOWN)
    notes = {}
    if not config.limits_groups:
        notes = dict.fromkeys(GROUP_STAGES, ONE_GROUP if config.n_group == 1 else NO_GROUP_RULE)
    if config.score_after_topk:
        notes["scores"] = SCORED_LATER
    if not config.has_correction_bias:
        notes["biased"] = NO_BIAS
    if not config.normalises and not config.score_after_topk:
        notes["normalised"] = NO_NORM
    if config.routed_scaling_factor == 1.0:
        notes["scaled"] = NO_SCALE
    if config.topk_method == "balanced":
        notes["experts"] = DEALT
    return notes


def shapes_of(config: MoEConfig, n_tokens: int, batch: tuple[int, int] | None) -> dict[str, tuple[int, ...]]:
    """Shape of the whole tensor of every stage, as in the flow chart; () where the rule is not known."""
    e, k, d, g = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size, config.n_group
    per_token: dict[str, tuple[int, ...]] = {
        "tokens": (d,), "logits": (e,), "scores": (e,), "biased": (e,), "grouped": (g, e // g), "group_scores": (g,),
        "groups": (config.topk_group,), "group_mask": (g,), "expert_mask": (e,), "masked": (e,), "experts": (k,),
        "normalised": (k,), "scaled": (k,), "output": (k,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {key: (n_tokens, *rest) for key, rest in per_token.items()}
    shapes["input"] = (*(batch or (n_tokens,)), d)
    return shapes if config.rule_is_known else shapes | dict.fromkeys(NEED_RULE, ())


def worded(stage: Stage, config: MoEConfig) -> Stage:
    """The stage with its formula as this config computes it; "?" where the rule is not known."""
    if not config.rule_is_known:
        recorded = {"experts": "expert_ids", "scaled": "weights"}
        unknown = dict.fromkeys(NEED_RULE, "?") | recorded
        return stage._replace(formula=unknown.get(stage.key, stage.formula))
    formulas = {
        "logits": "logits = x @ weight.T + router bias" if config.router_bias else stage.formula,
        "scores": "scores = logits (scored after top-k)"
        if config.score_after_topk
        else f"{config.scoring_func}(logits)",
        "group_scores": f"sum(top{config.scores_of_group}(choice))",
        "groups": f"topk(group_scores, {config.topk_group})",
        "masked": f"choice where open, else {config.group_mask}",
        "experts": f"topk(masked, {config.num_experts_per_tok})",
        "normalised": _normalising(config),
        "scaled": f"w * {config.routed_scaling_factor:g}",
    }
    if not config.limits_groups:
        formulas["experts"] = f"topk(choice, {config.num_experts_per_tok})"
    return stage._replace(formula=formulas.get(stage.key, stage.formula))


def _normalising(config: MoEConfig) -> str:
    if config.score_after_topk:
        return f"w = {config.scoring_func} over the kept"
    return "w = scores[experts] / sum" if config.normalises else "w = scores[experts]"
