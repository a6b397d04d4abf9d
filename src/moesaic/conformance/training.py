"""Probes: what training does to a gate, and a gate to training."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moesaic.config import MoEConfig
from moesaic.conformance.asking import (
    as_list,
    clear_logits,
    expect_same,
    need_module,
    numbers,
    random_bias,
    short,
    some_bias,
    some_logits,
)
from moesaic.conformance.definition import decide, weigh
from moesaic.conformance.definition import score as score_of
from moesaic.conformance.gates import Gate, ModuleGate, Ready
from moesaic.conformance.parts import Answer, slot_of, tensor_of
from moesaic.conformance.precision import own_bias
from moesaic.conformance.verdict import Fault, NotApplicable, gate_code, probe

STEP = 1e-5  # of the finite differences, in float64


@probe(
    "gradient",
    "wrong",
    name=("weights carry the definition's gradient", "权重带有定义所给的梯度"),
    story=(
        "a detached score or denominator leaves the router without its gradient, or with half of it: it never learns, "
        "and no error says so",
        "分数或分母被 detach，路由器收不到梯度或只收到一部分：它学不会，也没有任何报错",
    ),
    advice=("detach the choice, never the weights", "只 detach 选择，不要 detach 权重"),
    references=("NVIDIA-NeMo/Automodel#2995",),
)
def gradient(gate: Gate) -> None:
    config = gate.config
    bias = random_bias(config)
    logits = clear_logits(config, bias, rows=3, spread=1.0)
    worth = torch.randn(config.n_routed_experts, generator=numbers(13))
    rounding = 1e-6 * float(worth.abs().max()) * config.routed_scaling_factor  # all slopes of one expert are 0
    ready = gate.ready(logits, bias)
    answer = ready.run(ready.inputs)
    if answer.weights.requires_grad:
        worth_of_answer = (answer.weights * worth[answer.ids.clamp(0, len(worth) - 1)]).sum()
        with gate_code():
            worth_of_answer.backward()
    got = ready.logits_gradient()
    got = torch.zeros_like(logits) if got is None else got
    for row, values in enumerate(logits.tolist()):
        chosen = decide(values, as_list(bias), config).experts
        left = next((e for e in range(len(values)) if e not in chosen), chosen[0])
        scale = max(abs(slope(values, e, chosen, worth.tolist(), config)) for e in (*chosen, left))
        for expert in (*chosen[:3], left):
            expected = slope(values, expert, chosen, worth.tolist(), config)
            if not abs(got[row, expert].item() - expected) <= 1e-3 * scale + rounding:
                raise Fault(
                    f"row {row}: d/d logit of expert {expert} is {got[row, expert].item():.4g}, the definition's is "
                    f"{expected:.4g}",
                    f"第 {row} 行：对专家 {expert} 的 logit 的导数是 {got[row, expert].item():.4g}，按定义应为 "
                    f"{expected:.4g}",
                    row=row, expert=expert, got=got[row, expert].item(), expected=expected,
                )  # fmt: skip
    if isinstance(gate, ModuleGate) and ready.module is not None:
        expect_weight_gradient(gate.weight_gradient(ready.module), got.T @ ready.inputs.detach())


def expect_weight_gradient(got: Tensor | None, expected: Tensor) -> None:
    """Fault where the router's weight did not get what arrived at the logits."""
    got = torch.zeros_like(expected) if got is None else got
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-6):
        worst = (got - expected).abs().max().item()
        raise Fault(
            f"the router's weight misses up to {worst:.4g} of the gradient that its logits got",
            f"路由器的权重少得了 logits 所得梯度中的 {worst:.4g}",
            difference=worst,
        )


def slope(logits: list[float], expert: int, chosen: list[int], worth: list[float], config: MoEConfig) -> float:
    """The derivative of the worth of a token's weights, by central differences on the definition."""

    def value(step: float) -> float:
        moved = [z + step * (e == expert) for e, z in enumerate(logits)]
        scores = moved if config.score_after_topk else score_of(moved, config.scoring_func)
        return sum(worth[e] * weight for e, weight in weigh(scores, chosen, config).items())

    return (value(STEP) - value(-STEP)) / (2 * STEP)


@probe(
    "bias-gradient",
    "wrong",
    name=("the bias gets no gradient", "偏置没有梯度"),
    story=(
        "the bias is moved by the optimizer and by the balancing rule at once: the two fight, and the bias ends in the "
        "weights",
        "偏置同时被优化器和均衡规则修改：两者互相对抗，偏置也随之进入权重",
    ),
    advice=("a buffer; use it in the choice alone, detached", "用 buffer；只在选择时使用，且 detach"),
    references=("AI-Hypercomputer/maxtext#2494",),
)
def bias_gradient(gate: Gate) -> None:
    bias = some_bias(gate)
    given = bias.clone().requires_grad_()
    logits = clear_logits(gate.config, bias, rows=3)
    ready = gate.ready(logits, given)
    watched = [given]
    if isinstance(gate, ModuleGate) and ready.module is not None and gate.bias_name is not None:
        watched.append(slot_of(ready.module, gate.bias_name).requires_grad_())
    weights = ready.run(ready.inputs).weights
    if weights.requires_grad:
        with gate_code():
            weights.square().sum().backward()
    for tensor in watched:
        if tensor.grad is not None and tensor.grad.any():
            largest = tensor.grad.abs().max().item()
            raise Fault(
                f"its gradient is up to {largest:.3g}", f"它的梯度最大为 {largest:.3g}", got=largest, expected=0.0
            )


@probe(
    "bias-parameter",
    "fragile",
    name=("the bias is no parameter", "偏置不是参数"),
    story=(
        "an nn.Parameter without a gradient: weight decay pulls it to 0, DDP waits for its gradient, FSDP shards and "
        "casts it",
        "没有梯度的 nn.Parameter：权重衰减把它拉向 0，DDP 等它的梯度，FSDP 会切分并转换它",
    ),
    advice=("register_buffer", "改用 register_buffer"),
    references=("AI-Hypercomputer/maxtext#2494",),
)
def bias_parameter(gate: Gate) -> None:
    holder, name = own_bias(gate)
    if name in dict(holder.module.named_parameters()):
        raise Fault(f"{name} is an nn.Parameter", f"{name} 是 nn.Parameter", got=name)


@probe(
    "train-eval",
    "wrong",
    name=("training and evaluation choose alike", "训练与推理的选择一致"),
    story=(
        "noise, another rule or an assert in training mode: the experts that were trained are not those that serve",
        "训练模式下加噪声、换规则或断言失败：训练的专家不是推理用的专家",
    ),
    advice=("one code for both; noise only where the config asks for it", "两种模式同一段代码；只有配置要求时才加噪声"),
    references=("NVIDIA/Megatron-LM#4168",),
)
def train_eval(gate: Gate) -> None:
    module, ready = in_training(gate)
    with torch.no_grad(), gate_code():
        module.eval()
        evaluated = ready.run(ready.inputs.detach())
        module.train()
        trained = ready.run(ready.inputs.detach())
    expect_same(trained, evaluated, "in training, in evaluation", "（训练），推理为")


def in_training(gate: Gate) -> tuple[torch.nn.Module, Ready]:
    need_module(gate)
    if gate.config.router_jitter_noise:
        raise NotApplicable("its config asks for noise in training", "它的配置要求训练时加噪声")
    ready = gate.ready(some_logits(gate, seed=14), random_bias(gate.config))
    assert ready.module is not None
    with gate_code():
        return ready.module.train(), ready


@probe(
    "recompute-plan",
    "fragile",
    name=("a recompute takes the same experts", "重计算选择同样的专家"),
    story=(
        "activation checkpointing runs the forward again in the backward: a gate that draws new noise or has moved its "
        "bias, routes otherwise, and the gradients belong to other experts",
        "激活重计算会在反向中再跑一次前向：若门控又抽了噪声或改了偏置，第二次路由不同，梯度就算到别的专家上",
    ),
    advice=("no state of its own and torch's own random numbers", "不保存状态，随机数用 torch 自己的"),
    references=("NVIDIA-NeMo/Automodel#2635", "pytorch/torchtitan#1117", "NVIDIA-NeMo/RL#1203"),
    needs_rule=False,
)
def recompute_plan(gate: Gate) -> None:
    for reentrant in (True, False):
        need_gradient(in_training(gate)[1])
        answers = recompute(in_training(gate)[1], reentrant)
        expect_same(answers[1], answers[0], "in the recompute, first", "（重计算），第一次为")


def need_gradient(ready: Ready) -> None:
    if not ready.run(ready.inputs).weights.requires_grad:
        raise NotApplicable("nothing to recompute: its weights carry no gradient", "没有可重计算的：权重没有梯度")


def recompute(ready: Ready, reentrant: bool) -> list[Answer]:
    """A training forward under activation checkpointing and its backward; what the gate answered each time."""
    answers: list[Answer] = []

    def forward(x: Tensor) -> Tensor:
        answer = ready.run(x)
        answers.append(Answer(answer.ids.clone(), answer.weights.detach().clone()))
        return answer.weights

    with gate_code(), set_checkpoint_early_stop(False):  # else the second forward ends by an exception inside the gate
        weights: Tensor = checkpoint(forward, ready.inputs, use_reentrant=reentrant)
    with gate_code():
        weights.square().sum().backward()
    return answers


@probe(
    "recompute-counts",
    "fragile",
    name=("a recompute counts nothing twice", "重计算不会重复计数"),
    story=(
        "the gate adds to a counter or moves its bias in forward: under activation checkpointing every token counts "
        "twice, under accumulation the bias moves once a micro-batch",
        "门控在前向里累加计数或更新偏置：激活重计算时每个 token 计两次，梯度累积时每个微批次都更新一次偏置",
    ),
    advice=("overwrite in forward, add up and step outside", "前向里只覆盖，累加和更新放在外面"),
    references=("pytorch/torchtitan#1304", "pytorch/torchtitan#4148", "NVIDIA-NeMo/Automodel#3247"),
    needs_rule=False,
)
def recompute_counts(gate: Gate) -> None:
    once, ready = in_training(gate)
    need_gradient(ready)
    twice, ready = in_training(gate)
    recompute(ready, reentrant=False)
    for (name, first), second in zip(once.named_buffers(), twice.buffers(), strict=True):
        if not torch.equal(first, second):
            raise Fault(
                f"{name} is {short_tensor(second)} after a recompute, {short_tensor(first)} without",
                f"{name} 在重计算后是 {short_tensor(second)}，没有重计算时是 {short_tensor(first)}",
                buffer=name,
            )


@probe(
    "bias-steady",
    "wrong",
    name=("evaluation leaves the bias alone", "推理不改变偏置"),
    story=(
        "every request moves the bias a little: the served model drifts, and two replicas drift apart",
        "每个请求都把偏置移动一点：部署的模型逐渐漂移，两个副本也互相偏离",
    ),
    advice=("step the bias in the training loop, once an optimizer step", "只在训练循环里更新，每个优化器步一次"),
    references=("pytorch/torchtitan#1593", "pytorch/torchtitan#3686"),
)
def bias_steady(gate: Gate) -> None:
    (holder, name), bias = own_bias(gate), some_bias(gate)
    ready = holder.ready(clear_logits(gate.config, bias), bias)
    assert ready.module is not None
    with torch.no_grad():
        ready.run(ready.inputs.detach())
    after = tensor_of(ready.module, name).flatten()
    if not torch.equal(after, bias):
        moved = (after - bias).abs().max().item()
        raise Fault(f"one forward moved it by {moved:.3g}", f"一次前向把它移动了 {moved:.3g}", got=moved, expected=0.0)


def short_tensor(values: Tensor) -> str:
    numbers_shown = [round(v, 4) for v in values.flatten().tolist()]
    return short(numbers_shown, most=4)
