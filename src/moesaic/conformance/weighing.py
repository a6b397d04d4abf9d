"""Probes: what the chosen experts weigh."""

import math

import torch

from moesaic.config import MoEConfig
from moesaic.conformance.asking import (
    WEIGHT_TOLERANCE,
    as_list,
    clear_logits,
    expect_definition,
    need_module,
    random_bias,
    some_bias,
    told_as,
)
from moesaic.conformance.definition import decide
from moesaic.conformance.gates import Gate
from moesaic.conformance.parts import Answer
from moesaic.conformance.verdict import Fault, NotApplicable, gate_code, probe


@probe(
    "biased-weight",
    "wrong",
    name=("the bias never reaches a weight", "偏置不进入权重"),
    story=(
        "the biased score is used as the weight: the balancing bias now changes what the layer computes, and the model "
        "degrades as the bias grows",
        "把带偏置的分数当作权重：均衡用的偏置改变了层的输出，偏置越大模型越差",
    ),
    advice=("gather the weight from the unbiased scores", "从不带偏置的分数里取权重"),
    references=("vllm-project/vllm#12002",),
)
def biased_weight(gate: Gate) -> None:
    for shift in (0.0, 2.0, -2.0):
        bias = some_bias(gate, scale=1.0, shift=shift)
        with told_as(f"biases around {shift:g}", f"偏置约 {shift:g}"):
            expect_definition(gate, clear_logits(gate.config, bias), bias)


@probe(
    "recovered-weight",
    "wrong",
    name=("small scores survive a large bias", "大偏置下小分数不丢失"),
    story=(
        "the weight is recovered as biased score - bias; with a bias of 12 and sigmoids of 1e-8 the difference cancels "
        "to 0, the weights become 0 or NaN",
        "用“带偏置分数 - 偏置”还原权重；偏置为 12、sigmoid 为 1e-8 时相减抵消为 0，权重变成 0 或 NaN",
    ),
    advice=("gather the weight, do not subtract", "直接取分数，不要相减"),
    references=("flashinfer-ai/flashinfer#3875",),
)
def recovered_weight(gate: Gate) -> None:
    bias = some_bias(gate, scale=1.0, shift=12.0)
    logits = clear_logits(gate.config, bias, shift=-18.0, spread=0.5)  # sigmoids around 1e-8
    with told_as("biases around 12, scores around 1e-8", "偏置约 12，分数约 1e-8"):
        expect_definition(gate, logits, bias)


@probe(
    "softmax-before-mask",
    "wrong",
    name=("softmax comes before the mask", "先 softmax，后屏蔽"),
    story=(
        "softmax over the experts that are left gives larger weights than softmax over all: every output is too large",
        "只对剩余专家做 softmax，权重会大于对全部专家做 softmax：每个输出都偏大",
    ),
    advice=("score all experts, mask only for the choice", "对全部专家打分，屏蔽只用于选择"),
    references=("InternLM/lmdeploy#3030",),
)
def softmax_before_mask(gate: Gate) -> None:
    config = gate.config
    if config.scoring_func != "softmax" or config.score_after_topk or not config.limits_groups:
        raise NotApplicable("it has no softmax under a group limit", "它没有带分组限制的 softmax")
    if config.topk_group == config.n_group:
        raise NotApplicable("all groups are kept", "保留了全部组")
    bias = random_bias(config, scale=0.02)
    expect_definition(gate, clear_logits(config, bias, spread=1.0), bias)


@probe(
    "scaled-once",
    "wrong",
    name=("the scaling factor is applied once", "缩放系数只乘一次"),
    story=(
        "routed_scaling_factor is applied in the gate and again after the experts, or in neither: 2.5 becomes 6.25 or "
        "1, and accuracy falls from 0.965 to 0.745",
        "routed_scaling_factor 在门控和专家之后各乘一次，或都没乘：2.5 变成 6.25 或 1，准确率从 0.965 掉到 0.745",
    ),
    advice=("multiply in one place", "只在一处相乘"),
    references=("sgl-project/sglang#8511", "sgl-project/sglang#35152", "sgl-project/sglang#12998"),
)
def scaled_once(gate: Gate) -> None:
    bias = random_bias(gate.config)
    logits = clear_logits(gate.config, bias)
    scale = gate.config.routed_scaling_factor
    if scale != 1.0:
        expect_ratio(gate.answer(logits, bias), logits, bias, gate)
    one, four = (gate.changed(routed_scaling_factor=factor).answer(logits, bias) for factor in (1.0, 4.0))
    same = torch.equal(one.ids, four.ids)
    if not same or not torch.equal(4.0 * one.weights, four.weights):  # a power of two: exact in every float
        row = 0 if not same else int((4.0 * one.weights != four.weights).any(-1).nonzero()[0, 0])
        before, after = one.weights[row, 0].item(), four.weights[row, 0].item()
        raise Fault(
            f"row {row}: routed_scaling_factor=4 takes the weight {before:.6g} to {after:.6g}",
            f"第 {row} 行：routed_scaling_factor=4 使权重从 {before:.6g} 变为 {after:.6g}",
            row=row, got=after, expected=4 * before,
        )  # fmt: skip


def expect_ratio(answer: Answer, logits: torch.Tensor, bias: torch.Tensor | None, gate: Gate) -> None:
    """Fault that says how many times the factor was applied, where it was not once."""
    decision = decide(logits[0].tolist(), as_list(bias), gate.config)
    expert = decision.experts[0]
    place = answer.ids[0].tolist().index(expert) if expert in answer.ids[0].tolist() else None
    if place is None:
        raise NotApplicable("it chose other experts: see the probe 'definition'", "选出的专家不同：见 definition 探针")
    scale, ratio = gate.config.routed_scaling_factor, answer.weights[0, place].item() / decision.weights[expert]
    times = 1 + math.log(ratio) / math.log(scale) if ratio > 0 else math.nan
    if not abs(ratio - 1) <= WEIGHT_TOLERANCE and math.isfinite(times) and abs(times - round(times)) < 1e-4:
        got, expected = answer.weights[0, place].item(), decision.weights[expert]
        raise Fault(
            f"the factor {scale:g} is applied {round(times)} times: expert {expert} of row 0 weighs {got:.6g}, not "
            f"{expected:.6g}",
            f"系数 {scale:g} 乘了 {round(times)} 次：第 0 行专家 {expert} 的权重是 {got:.6g}，应为 {expected:.6g}",
            row=0, expert=expert, got=got, expected=expected,
        )  # fmt: skip


@probe(
    "weight-sum",
    "wrong",
    name=("weights sum as the rule says", "权重之和符合规则"),
    story=(
        "normalised weights that do not sum to the factor, or raw ones that were normalised: every layer's output has "
        "the wrong size",
        "该归一化的没归一化，或不该归一化的被归一化：每一层输出的大小都不对",
    ),
    advice=("follow norm_topk_prob of the model's config", "遵守模型配置里的 norm_topk_prob"),
    references=("sgl-project/sglang#8511",),
)
def weight_sum(gate: Gate) -> None:
    config, bias = gate.config, random_bias(gate.config)
    logits = clear_logits(config, bias)
    answer = gate.answer(logits, bias)
    for row, values in enumerate(logits.tolist()):
        decision = decide(values, as_list(bias), config)
        got, expected = answer.weights[row].double().sum().item(), math.fsum(decision.weights.values())
        if not abs(got - expected) <= WEIGHT_TOLERANCE * expected:
            norm = config.norm_topk_prob
            raise Fault(
                f"row {row}: weights sum to {got:.6g}, not {expected:.6g} (norm_topk_prob={norm})",
                f"第 {row} 行：权重之和是 {got:.6g}，应为 {expected:.6g}（norm_topk_prob={norm}）",
                row=row, got=got, expected=expected,
            )  # fmt: skip


@probe(
    "single-expert",
    "wrong",
    name=("K = 1 weighs as its rule says", "K = 1 时权重符合规则"),
    story=(
        "official codes differ: transformers normalises a single weight to the factor, DeepSeek's code leaves the raw "
        "score; the wrong one changes every output and takes the gradient from the router, or gives it one",
        "官方实现不一致：transformers 把唯一的权重归一化为系数，DeepSeek 的代码保留原始分数；"
        "用错会改变输出和路由器的梯度",
    ),
    advice=("set norm_single_expert to what the model was trained with", "norm_single_expert 要与训练时一致"),
    references=(),
)
def single_expert(gate: Gate) -> None:
    gate = gate.changed(num_experts_per_tok=1) if gate.config.num_experts_per_tok > 1 else gate
    bias = random_bias(gate.config)
    with told_as("with K = 1", "K = 1 时"):
        expect_definition(gate, clear_logits(gate.config, bias), bias)


@probe(
    "underflow",
    "fragile",
    name=("weights are finite where all scores underflow", "分数全部下溢时权重仍有限"),
    story=(
        "all K scores are 0 and the normalisation divides 0 by 0: one NaN token, and with it the whole sequence",
        "K 个分数全为 0，归一化变成 0/0：一个 token 变 NaN，整条序列随之变 NaN",
    ),
    advice=("add 1e-20 to the sum, in float32", "在 float32 里给分母加 1e-20"),
    references=(),
)
def underflow(gate: Gate) -> None:
    config = gate.config
    bias = random_bias(config)
    for level in (-150.0, -90.0, 90.0):
        logits = level + torch.linspace(-1.0, 1.0, config.n_routed_experts).repeat(2, 1)
        expect_finite(gate.answer(logits, bias), f"logits around {level:g}", f"logits 约 {level:g}", config)


def expect_finite(answer: Answer, en: str, zh: str, config: MoEConfig) -> None:
    weights = answer.weights.double()
    most = 1.001 * config.routed_scaling_factor if config.norm_topk_prob else math.inf
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights.sum(-1) <= most).all()):
        row = weights[0].tolist()
        raise Fault(
            f"{en}: weights {[float(f'{w:.3g}') for w in row]}",
            f"{zh}：权重 {[float(f'{w:.3g}') for w in row]}",
            row=0, got=row,
        )  # fmt: skip


@probe(
    "underflow-fp16",
    "fragile",
    name=("the denominator survives float16", "float16 下分母不为 0"),
    story=(
        "in float16 the 1e-20 of the denominator is 0 and sigmoids below 6e-8 are 0: weights become NaN as soon as "
        "somebody serves the model in float16",
        "float16 里分母的 1e-20 就是 0，低于 6e-8 的 sigmoid 也是 0：一旦用 float16 部署，权重就变 NaN",
    ),
    advice=("compute scores and weights in float32", "分数和权重用 float32 计算"),
    references=(),
)
def underflow_fp16(gate: Gate) -> None:
    holder, config = need_module(gate), gate.config
    ready = holder.ready(-20.0 + torch.linspace(-1.0, 1.0, config.n_routed_experts).repeat(2, 1))
    assert ready.module is not None
    with torch.no_grad(), gate_code():
        answer = holder.run(ready.module.half(), ready.inputs.detach().half())
    expect_finite(answer, "float16, logits around -20", "float16，logits 约 -20", config)
