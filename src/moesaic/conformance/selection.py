"""Probes: which experts are chosen."""

import torch

from moesaic.conformance.asking import (
    ROWS,
    as_list,
    as_pairs,
    clear_logits,
    expect_definition,
    expect_same,
    need_groups,
    numbers,
    random_bias,
    short,
    some_bias,
    some_logits,
    told_as,
)
from moesaic.conformance.definition import decide
from moesaic.conformance.gates import Gate
from moesaic.conformance.parts import Answer
from moesaic.conformance.verdict import Fault, GateRaised, probe


@probe(
    "definition",
    "wrong",
    name=("experts and weights are the definition's", "专家和权重与定义一致"),
    story=(
        "the model was trained with one rule and is served with another; it still talks, only worse",
        "模型按一种规则训练、按另一种规则推理；它照样能输出通顺的文字，只是质量变差",
    ),
    advice=("compare with the model's own config, field by field", "与模型自己的配置逐项对照"),
    references=("NVIDIA/Megatron-LM#4168",),
)
def definition(gate: Gate) -> None:
    bias = random_bias(gate.config)
    expect_definition(gate, clear_logits(gate.config, bias), bias)
    expect_definition(gate, clear_logits(gate.config, bias, spread=6.0, seed=2), bias)


@probe(
    "bias-shift",
    "wrong",
    name=("adding a constant to all biases changes nothing", "所有偏置加同一常数，结果不变"),
    story=(
        "released V3 biases all lie above +2 and GLM's around 12: a gate that depends on their level is right at zero, "
        "where it is tested, and wrong on the released weights",
        "V3 发布的偏置都大于 +2，GLM 的约为 12：结果若取决于偏置的整体高低，在零附近测试正确，用发布的权重就错了",
    ),
    advice=("the bias may rank and nothing else", "偏置只能用于排序"),
    references=("huggingface/transformers#45441", "flashinfer-ai/flashinfer#3875"),
)
def bias_shift(gate: Gate) -> None:
    bias = some_bias(gate)
    logits = clear_logits(gate.config, bias + 12.0)  # clear at the coarser level, so at both
    plain = gate.answer(logits, bias)
    for shift in (-12.0, 12.0):
        says = (f"with all biases {shift:+g}, and without", f"（所有偏置 {shift:+g}）与不加时的")
        expect_same(gate.answer(logits, bias + shift), plain, *says)


@probe(
    "distinct",
    "wrong",
    name=("an expert is chosen once", "同一专家不会被选两次"),
    story=(
        "a token that lists an expert twice gets it twice, and another one not at all; dispatch buffers overflow",
        "同一专家在一个 token 里出现两次：该专家算两遍，另一个专家缺席，分发缓冲区溢出",
    ),
    advice=("ids of a row must be distinct for every input", "任何输入下，一行里的编号必须互不相同"),
    references=("alibaba/rtp-llm#303",),
    needs_rule=False,
)
def distinct(gate: Gate) -> None:
    n_experts = gate.config.n_routed_experts
    random = torch.randn(4, n_experts, generator=numbers(3))
    flat = torch.zeros(2, n_experts)
    steep = torch.linspace(-60.0, 60.0, n_experts).repeat(2, 1)  # most scores saturate
    for logits in (random, flat, steep, flat - 60.0, flat + 60.0):
        for shift in (0.0, -2.0, 50.0) if gate.config.has_correction_bias else (0.0,):  # -2: every score below zero
            expect_lawful(gate.answer(logits, random_bias(gate.config, shift=shift)), gate)


def expect_lawful(answer: Answer, gate: Gate) -> None:
    """Fault where a row has an id twice, or one that is no expert. The id E, "no expert", may repeat."""
    n_experts = gate.config.n_routed_experts
    for row in range(len(answer.ids)):
        ids = answer.ids[row].tolist()
        strange = [e for e in ids if not 0 <= e <= n_experts]
        if strange:
            raise Fault(
                f"row {row}: id {strange[0]} of {n_experts} experts",
                f"第 {row} 行：编号 {strange[0]}，而专家只有 {n_experts} 个",
                row=row, got=ids,
            )  # fmt: skip
        real = [e for e in ids if e < n_experts]
        twice = sorted({e for e in real if real.count(e) > 1})
        if twice:
            raise Fault(
                f"row {row}: expert {twice[0]} was chosen {real.count(twice[0])} times in {short(ids)}",
                f"第 {row} 行：专家 {twice[0]} 在 {short(ids)} 中被选了 {real.count(twice[0])} 次",
                row=row, got=ids,
            )  # fmt: skip


@probe(
    "ties-experts",
    "fragile",
    name=("tied experts go to the lowest id", "专家分数相同时取最小编号"),
    story=(
        "two engines, or CPU and GPU, break ties differently: the same prompt takes other experts, and a diff of the "
        "two blames a bug that is not there. bfloat16 scores tie often",
        "两个引擎（或 CPU 与 GPU）对并列的处理不同：同一输入走不同专家，对比时像是有缺陷。bfloat16 分数经常并列",
    ),
    advice=("rank by (score, -id): torch.topk leaves ties open", "按（分数，-编号）排序：torch.topk 不规定并列的顺序"),
    references=("vllm-project/vllm#32058", "sgl-project/sglang#29922"),
)
def ties_experts(gate: Gate) -> None:
    config = gate.config
    bias = random_bias(config, scale=0.0)
    flat = torch.zeros(3, config.n_routed_experts)
    with told_as("all scores equal", "所有分数相同"):
        expect_lowest(gate, flat, bias)
    alternate = flat.clone()
    alternate[:, 1::2] = 1.0  # the odd ids tie above the even ones
    with told_as("every second score equal", "每隔一个分数相同"):
        expect_lowest(gate, alternate, bias)


def expect_lowest(gate: Gate, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Fault where ties do not go to the lowest ids, as in the definition."""
    answer = gate.answer(logits, bias)
    for row, values in enumerate(logits.tolist()):
        expected = sorted(decide(values, as_list(bias), gate.config).experts)
        got = sorted(answer.ids[row].tolist())
        if got != expected:
            raise Fault(
                f"chose {short(got)}, the lowest ids are {short(expected)}",
                f"选了 {short(got)}，最小编号是 {short(expected)}",
                row=row, got=got, expected=expected,
            )  # fmt: skip


@probe(
    "ties-groups",
    "fragile",
    name=("tied groups go to the lowest id", "组分数相同时取最小编号"),
    story=(
        "as with experts: which groups a tied token visits depends on the device and the number of rows",
        "与专家相同：并列时 token 去哪些组取决于设备和行数",
    ),
    advice=("rank groups by (score, -id) too", "组也按（分数，-编号）排序"),
    references=("sgl-project/sglang#29922",),
)
def ties_groups(gate: Gate) -> None:
    need_groups(gate)
    config = gate.config
    # within a group all scores differ, between groups they are the same
    one = torch.linspace(1.0, 2.0, config.experts_per_group)
    logits = one.repeat(3, config.n_group)
    answer = gate.answer(logits, random_bias(config, scale=0.0))
    allowed = config.topk_group * config.experts_per_group
    for row in range(len(logits)):
        outside = [e for e in answer.ids[row].tolist() if e >= allowed]
        if outside:
            got = sorted({e // config.experts_per_group for e in answer.ids[row].tolist()})
            raise Fault(
                f"all groups equal: took groups {got}, the lowest ids are {list(range(config.topk_group))}",
                f"所有组相同：选了组 {got}，最小编号是 {list(range(config.topk_group))}",
                row=row, got=got,
            )  # fmt: skip


BAD = {
    "all NaN": lambda row: torch.full_like(row, torch.nan),
    "one NaN": lambda row: row.index_fill(0, torch.tensor([len(row) - 1]), torch.nan),
    "+inf": lambda row: row.index_fill(0, torch.tensor([0, len(row) - 1]), torch.inf),
    "all -inf": lambda row: torch.full_like(row, -torch.inf),
}


@probe(
    "bad-rows",
    "fragile",
    name=("NaN and Inf give lawful ids", "NaN、Inf 行的编号仍合法"),
    story=(
        "one overflowing token yields ids that repeat or do not exist; the dispatch writes out of bounds and the whole "
        "server falls, far from the cause",
        "一个溢出的 token 产生重复或不存在的编号；分发越界写入，整个服务崩溃，现场离原因很远",
    ),
    advice=("raise, or give distinct ids inside the kept groups", "抛出错误，或给出保留组内互不相同的编号"),
    references=("vllm-project/vllm#39391", "vllm-project/vllm#39244", "ROCm/aiter#4530"),
    needs_rule=False,
)
def bad_rows(gate: Gate) -> None:
    config = gate.config
    bias = random_bias(config)
    for kind, spoil in BAD.items():
        logits = torch.randn(4, config.n_routed_experts, generator=numbers(4))
        logits[2] = spoil(logits[2])
        try:
            answer = gate.answer(logits, bias)
        except GateRaised:
            continue  # refusing is a policy
        with told_as(kind, kind):
            expect_lawful(answer, gate)
            groups = {e // config.experts_per_group for e in answer.ids[2].tolist() if e < config.n_routed_experts}
            if config.limits_groups and len(groups) > config.topk_group:
                raise Fault(
                    f"the bad row reaches {len(groups)} groups, {config.topk_group} are allowed",
                    f"坏行到达 {len(groups)} 个组，只允许 {config.topk_group} 个",
                    got=sorted(groups),
                )


@probe(
    "bad-neighbours",
    "wrong",
    name=("a NaN row leaves the other rows alone", "NaN 行不影响其他行"),
    story=(
        "one user's overflow changes the answers of everybody in the batch",
        "一个用户的溢出改变了同一批里所有人的结果",
    ),
    advice=("no reduction over tokens inside the gate", "门控内部不要跨 token 归约"),
    references=("vllm-project/vllm#39391",),
    needs_rule=False,
)
def bad_neighbours(gate: Gate) -> None:
    config = gate.config
    bias = random_bias(config)
    good = torch.randn(5, config.n_routed_experts, generator=numbers(5))
    others = [0, 1, 3, 4]
    expected = gate.answer(good, bias)
    for kind, spoil in BAD.items():
        logits = good.clone()
        logits[2] = spoil(logits[2])
        try:
            answer = gate.answer(logits, bias)
        except GateRaised:
            continue  # refusing is a policy
        for row in others:
            if not torch.equal(answer.ids[row], expected.ids[row]) or not torch.equal(
                answer.weights[row], expected.weights[row]
            ):
                raise Fault(
                    f"{kind} in row 2 changes row {row}: {as_pairs(answer, row)} instead of {as_pairs(expected, row)}",
                    f"第 2 行 {kind} 改变了第 {row} 行：{as_pairs(answer, row)}，原为 {as_pairs(expected, row)}",
                    row=row,
                )


@probe(
    "permuted-tokens",
    "wrong",
    name=("permuting tokens permutes the results", "打乱 token，结果随之打乱"),
    story=(
        "what a token gets depends on its place in the batch: results change with batching and cannot be reproduced",
        "token 的结果取决于它在批中的位置：随批次变化，无法复现",
    ),
    advice=("treat every row alone", "逐行独立处理"),
    references=(),
    needs_rule=False,
)
def permuted_tokens(gate: Gate) -> None:
    bias, logits = random_bias(gate.config), some_logits(gate, ROWS, seed=6)
    order = torch.randperm(len(logits), generator=numbers(7))
    first, second = gate.answer(logits, bias), gate.answer(logits[order], bias)
    says = ("after permuting the tokens, before it", "（打乱之后）与打乱之前的")
    expect_same(second, Answer(first.ids[order], first.weights[order]), *says)
