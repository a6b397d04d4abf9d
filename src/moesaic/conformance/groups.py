"""Probes: which groups are kept, and what is outside of them."""

import contextlib
import dataclasses

import torch
from torch import Tensor

from moesaic.conformance.asking import (
    as_list,
    clear_logits,
    expect_definition,
    need_groups,
    random_bias,
    short,
    some_bias,
    told_as,
)
from moesaic.conformance.definition import COUNTED, decide
from moesaic.conformance.gates import Gate
from moesaic.conformance.verdict import Both, Fault, GateRaised, NotApplicable, probe


@probe(
    "masked-groups",
    "wrong",
    name=("masked groups stay masked", "被屏蔽的组不会被选中"),
    story=(
        "masked experts are filled with 0, and where every biased score is negative 0 wins: tokens go to groups that "
        "the group limit had excluded",
        "被屏蔽的专家填成 0；当带偏置的分数全为负时 0 反而最大，token 被送到分组限制已排除的组",
    ),
    advice=("fill with -inf before the top-k", "在 top-k 之前填 -inf"),
    references=(
        "deepseek-ai/DeepSeek-V3#741", "vllm-project/vllm#13474", "sgl-project/sglang#3705",
        "huggingface/transformers#45440", "huggingface/transformers#45441",
    ),
)  # fmt: skip
def masked_groups(gate: Gate) -> None:
    need_groups(gate)
    config = gate.config
    for shift in (-2.0, -50.0, 0.0, 50.0):  # +50 lies in wait for a large negative fill that is not -inf
        bias = some_bias(gate, scale=0.05, shift=shift)
        logits = clear_logits(config, bias, spread=4.0)
        answer = gate.answer(logits, bias)
        for row, values in enumerate(logits.tolist()):
            kept = decide(values, bias.tolist(), config).groups
            outside = [e for e in answer.ids[row].tolist() if e // config.experts_per_group not in kept]
            if outside:
                raise Fault(
                    f"row {row}, biases around {shift:g}: {len(outside)} of {config.num_experts_per_tok} experts, such "
                    f"as {outside[0]}, lie outside the kept groups {short(kept)}",
                    f"第 {row} 行，偏置约 {shift:g}：{config.num_experts_per_tok} 个专家中有 {len(outside)} 个"
                    f"（如 {outside[0]}）不在保留的组 {short(kept)} 内",
                    row=row, outside=outside, kept=kept,
                )  # fmt: skip


@probe(
    "masked-underflow",
    "fragile",
    name=("underflowing scores do not open masked groups", "分数下溢不会打开被屏蔽的组"),
    story=(
        "masked experts hold 0 and so do kept ones whose score underflows: a very sure token reaches groups that its "
        "group limit excludes, with weight 0 but with traffic",
        "被屏蔽的专家是 0，分数下溢的保留专家也是 0：非常确定的 token 会到达被排除的组，权重为 0，但通信照发",
    ),
    advice=("fill with -inf before the top-k", "在 top-k 之前填 -inf"),
    references=("huggingface/transformers#45441",),
)
def masked_underflow(gate: Gate) -> None:
    need_groups(gate)
    config = gate.config
    size, kept = config.experts_per_group, config.topk_group
    starts = range(config.n_group - kept + 1)
    logits = torch.full((len(starts), config.n_routed_experts), -150.0)  # float32's sigmoid and exp are 0 there
    for row, start in enumerate(starts):
        logits[row, start * size : (start + kept) * size : size] = 3.0  # one sure expert in each group to be kept
    answer = gate.answer(logits, random_bias(config, scale=0.0))
    for row, start in enumerate(starts):
        outside = [e for e in answer.ids[row].tolist() if not start <= e // size < start + kept]
        if outside:
            raise Fault(
                f"row {row}: {len(outside)} of {config.num_experts_per_tok} experts, such as {outside[0]}, lie outside "
                f"the kept groups {short(list(range(start, start + kept)))}, where all but {kept} scores underflow",
                f"第 {row} 行：保留组 {short(list(range(start, start + kept)))} 中除 {kept} 个外分数全部下溢，"
                f"{config.num_experts_per_tok} 个专家中有 {len(outside)} 个（如 {outside[0]}）不在其内",
                row=row, outside=outside,
            )  # fmt: skip


@probe(
    "group-score",
    "wrong",
    name=("a group scores as its rule says", "组分数符合规则"),
    story=(
        "V2 takes the best expert of a group, V3 the sum of the best two, its paper K/M of them: with the wrong one "
        "half of all tokens go to other groups than in training",
        "V2 取组内最大分数，V3 取前两名之和，论文写的是前 K/M 名：用错时一半 token 的去向与训练时不同",
    ),
    advice=("take the group score of the model's own code", "采用模型自己代码中的组分数"),
    references=("NVIDIA/Megatron-LM#1381", "NVIDIA/Megatron-LM#1441"),
)
def group_score(gate: Gate) -> None:
    need_groups(gate)
    config = gate.config
    bias = random_bias(config, scale=0.2)
    mine, asked = COUNTED[config.group_score_rule](config), 0
    for rule, count in COUNTED.items():
        if count(config) == mine or not 1 <= count(config) <= config.experts_per_group:
            continue
        other = dataclasses.replace(config, group_score=rule)

        def tells(values: list[float], decision, other=other, bias: Tensor | None = bias) -> bool:
            by_other = decide(values, as_list(bias), other)
            return sorted(by_other.experts) != sorted(decision.experts)

        try:
            logits = clear_logits(config, bias, rows=6, wanted=tells)
        except NotApplicable:
            continue
        asked += 1
        with told_as(f"the definition is {config.group_score_rule}", f"定义是 {config.group_score_rule}"):
            expect_definition(gate, logits, bias)
    if not asked:
        raise NotApplicable("all group scores agree at these sizes", "在这些尺寸下各种组分数结果相同")


@probe(
    "one-group",
    "wrong",
    name=("one group is no limit", "只有一组等于没有限制"),
    story=(
        "GLM-4.5 and Kimi-K2 set n_group=1: a group step that is not an exact no-op there re-routes every token",
        "GLM-4.5、Kimi-K2 设 n_group=1：此时分组步骤若不是严格的空操作，所有 token 都会被改道",
    ),
    advice=("skip the group step where n_group is 1", "n_group 为 1 时跳过分组"),
    references=(),
)
def one_group(gate: Gate) -> None:
    if gate.config.topk_method not in ("noaux_tc", "group_limited_greedy"):
        raise NotApplicable("it has no group step", "它没有分组步骤")
    if gate.config.n_group > 1:
        gate = gate.changed(n_group=1, topk_group=1)
    bias = random_bias(gate.config, scale=0.2)
    with told_as("with n_group=1", "n_group=1 时"):
        expect_definition(gate, clear_logits(gate.config, bias), bias)


@probe(
    "all-groups",
    "wrong",
    name=("keeping all groups is no limit", "保留全部组等于没有限制"),
    story=(
        "topk_group = n_group must mask nothing: an off-by-one there forbids a group for ever, and its experts die",
        "topk_group = n_group 时不应屏蔽任何组：差一错误会让某一组永远选不到，其中的专家随之成为死专家",
    ),
    advice=("compare with a plain top-k", "与普通 top-k 对照"),
    references=(),
)
def all_groups(gate: Gate) -> None:
    need_groups(gate)
    if gate.config.topk_group < gate.config.n_group:
        gate = gate.changed(topk_group=gate.config.n_group)
    bias = random_bias(gate.config, scale=0.2)
    # so many experts that no group can be missed; as few as the model takes seldom reach the worst group
    k = gate.config.n_routed_experts - gate.config.experts_per_group + 1
    with told_as(f"with all {gate.config.n_group} groups kept", f"保留全部 {gate.config.n_group} 组时"):
        expect_definition(gate, clear_logits(gate.config, bias), bias)
        with contextlib.suppress(NotApplicable):
            crowded = gate.changed(num_experts_per_tok=k)
            expect_definition(crowded, clear_logits(crowded.config, bias, rows=4), bias)


@probe(
    "exactly-enough",
    "wrong",
    name=("K = M*E/G works", "K = M*E/G 可用"),
    story=(
        "the boundary is lawful, every expert of the kept groups is chosen; a check that is off by one refuses it",
        "边界是合法的：保留组里的专家全部入选；差一的检查会拒绝它",
    ),
    advice=("refuse only K > M*E/G", "只拒绝 K > M*E/G"),
    references=("sgl-project/sglang#37741",),
)
def exactly_enough(gate: Gate) -> None:
    need_groups(gate)
    reach = gate.config.topk_group * gate.config.experts_per_group
    gate = gate.changed(num_experts_per_tok=reach)
    bias = random_bias(gate.config, scale=0.2)
    with told_as(f"with K = {reach} of {reach} candidates", f"K = {reach}，候选恰为 {reach} 个时"):
        expect_definition(gate, clear_logits(gate.config, bias, rows=4), bias)


@probe(
    "too-many",
    "fragile",
    name=("K > M*E/G is refused", "K > M*E/G 会被拒绝"),
    story=(
        "the top-k runs out of candidates and takes masked experts, with their full weights: the group limit is broken "
        "for every token and nothing says so",
        "top-k 的候选不够，于是取到被屏蔽的专家，且带着完整权重：每个 token 都违反分组限制，而没有任何提示",
    ),
    advice=("refuse the config at construction and name the numbers", "构造时拒绝该配置，并指出数字"),
    references=("sgl-project/sglang#37741",),
)
def too_many(gate: Gate) -> None:
    config = gate.config
    need_groups(gate)
    reach = config.topk_group * config.experts_per_group
    k = reach + 1
    if k > config.n_routed_experts:
        raise NotApplicable("all groups are kept", "保留了全部组")
    bias = random_bias(config)
    try:
        answer = gate.changed(checked=False, num_experts_per_tok=k).answer(clear_logits(config, bias), bias)
    except GateRaised:
        return  # refused, at construction or at the first token
    except NotApplicable as refusal:
        if gate.refuses_itself:
            return
        raise refusal
    kept = decide(clear_logits(config, bias)[0].tolist(), as_list(bias), config).groups
    outside = [e for e in answer.ids[0].tolist() if e // config.experts_per_group not in kept]
    raise Fault(
        f"K = {k} was accepted with {reach} candidates (M = {config.topk_group}, E/G = {config.experts_per_group}); "
        f"outside the kept groups row 0 has experts {short(outside)}",
        f"候选只有 {reach} 个（M = {config.topk_group}，E/G = {config.experts_per_group}）却接受了 K = {k}；"
        f"第 0 行选中了保留组之外的专家 {short(outside)}",
        k=k, candidates=reach, outside=outside,
    )  # fmt: skip


@probe(
    "scoring-functions",
    "wrong",
    name=("the group limit holds for every scoring function", "每种打分函数都遵守分组限制"),
    story=(
        "the limit sits in the branch of one gating function and is skipped in the others: a config with softmax is "
        "routed without it",
        "分组限制只写在某个打分函数的分支里，其他分支被跳过：换成 softmax 的配置就不再受限",
    ),
    advice=("score, then limit, in that order, for all of them", "先打分，再限制，对所有函数都如此"),
    references=("allenai/OLMo-core#763",),
)
def scoring_functions(gate: Gate) -> None:
    tried, refusals = 0, []
    for name in ("sigmoid", "softmax", "sqrtsoftplus"):
        if name == gate.config.scoring_func:
            continue
        try:
            other = gate.changed(scoring_func=name)
            bias = random_bias(other.config, scale=0.05)
            logits = clear_logits(other.config, bias)
            if torch.equal(other.answer(logits, bias).weights, gate.answer(logits, bias).weights):
                raise NotApplicable("it does not read scoring_func", "它不读取 scoring_func")
            with told_as(f"scoring_func={name!r}", f"scoring_func={name!r}"):
                expect_definition(other, logits, bias)
            tried += 1
        except NotApplicable as refusal:  # to know one function alone is lawful
            refusals.append(refusal.says)
        except GateRaised as error:
            refusals.append(Both(str(error), str(error)))
    if not tried:
        why = refusals[0]
        raise NotApplicable(f"it knows one scoring function: {why.en}", f"它只有一种打分函数：{why.zh}")
