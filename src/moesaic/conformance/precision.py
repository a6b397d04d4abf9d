"""Probes: what casts, autocast and low precision do to a gate. They ask modules: a function holds no tensors."""

import contextlib
import math

import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.conformance.asking import as_list, need_module, numbers, random_bias, short, some_bias
from moesaic.conformance.definition import Decision, best, decide
from moesaic.conformance.gates import F32, Gate, ModuleGate
from moesaic.conformance.parts import tensor_of
from moesaic.conformance.verdict import Fault, NotApplicable, gate_code, probe

CASTS = {
    ".bfloat16()": lambda m: m.bfloat16(),
    ".half()": lambda m: m.half(),
    ".to(torch.bfloat16)": lambda m: m.to(torch.bfloat16),
}
IN_BFLOAT16 = ("sgl-project/sglang#31213", "sgl-project/sglang#37133", "vllm-project/vllm#50761")


def own_bias(gate: Gate) -> tuple[ModuleGate, str]:
    """The gate and the name of its correction bias, where it keeps one itself."""
    some_bias(gate)
    holder = need_module(gate)
    if holder.bias_name is None:
        raise NotApplicable("its bias is handed to it from outside", "它的偏置由外部传入")
    return holder, holder.bias_name


@probe(
    "bias-cast",
    "fragile",
    name=("the bias stays float32 through casts", "类型转换后偏置仍是 float32"),
    story=(
        "model.bfloat16() rounds the bias to 8 bits: of 238 distinct values 8 are left, and 98.5 % of the tokens of a "
        "released model are re-routed",
        "model.bfloat16() 把偏置舍入到 8 位：238 个不同的值只剩 8 个，98.5% 的 token 被改道",
    ),
    advice=("take it out of `_apply`, or cast and put the values back", "不让 `_apply` 转换它，或转换后恢复原值"),
    references=(*IN_BFLOAT16, "NVIDIA/Megatron-LM#1482"),
)
def bias_cast(gate: Gate) -> None:
    holder, name = own_bias(gate)
    wanted = 5.0 + 1e-4 * torch.arange(1.0, gate.config.n_routed_experts + 1)
    for how, cast in CASTS.items():
        with gate_code():
            module = cast(holder.prepared(holder.no_weight(), wanted))
        expect_kept(tensor_of(module, name).flatten(), wanted, how)


@probe(
    "bias-load",
    "fragile",
    name=("the bias stays float32 through loading", "加载后偏置仍是 float32"),
    story=(
        "a checkpoint that was saved in bfloat16 is loaded with assign=True: the bias is bfloat16 from then on, and "
        "training steps of 0.001 vanish in it",
        "用 assign=True 加载 bfloat16 存档：此后偏置就是 bfloat16，0.001 的训练步长消失",
    ),
    advice=("widen it in a load_state_dict pre-hook", "在 load_state_dict 前置钩子里转回 float32"),
    references=IN_BFLOAT16,
)
def bias_load(gate: Gate) -> None:
    holder, name = own_bias(gate)
    module = holder.prepared(holder.no_weight())
    saved = {key: t.bfloat16() if t.is_floating_point() else t for key, t in module.state_dict().items()}
    if name not in saved:
        raise Fault("the bias is not in the state dict", "偏置不在 state dict 里")
    with gate_code():
        module.load_state_dict(saved, assign=True)
    dtype = tensor_of(module, name).dtype
    if dtype != F32:
        raise Fault(f"after loading it is {dtype}", f"加载后是 {dtype}", got=str(dtype))


def expect_kept(got: Tensor, wanted: Tensor, how: str) -> None:
    if got.dtype == F32 and torch.equal(got, wanted):
        return
    left = len(got.unique())
    raise Fault(
        f"{how}: {wanted[0].item():.4f} becomes {got[0].item():.4f} ({got.dtype}); {len(wanted)} distinct values "
        f"become {left}",
        f"{how}：{wanted[0].item():.4f} 变成 {got[0].item():.4f}（{got.dtype}）；"
        f"{len(wanted)} 个不同的值变成 {left} 个",
        got=got[0].item(), expected=wanted[0].item(), distinct_before=len(wanted), distinct_after=left,
    )  # fmt: skip


@probe(
    "bias-as-loaded",
    "fragile",
    name=("the model's own bias is float32", "模型自带的偏置是 float32"),
    story=(
        "the model was loaded, saved or cast in a way that rounded its bias: what is served is not what was trained",
        "加载、保存或转换时偏置被舍入：部署的不是训练出来的模型",
    ),
    advice=("load the bias in float32 from the original checkpoint", "从原始存档以 float32 加载偏置"),
    references=IN_BFLOAT16,
)
def bias_as_loaded(gate: Gate) -> None:
    holder, name = own_bias(gate)
    dtype = tensor_of(holder.module, name).dtype
    if dtype.itemsize < 4:
        raise Fault(f"it is {dtype}", f"它是 {dtype}", got=str(dtype))


@probe(
    "linear",
    "wrong",
    name=("hidden states reach the logits in the right precision", "从隐藏状态到 logits 的精度正确"),
    story=(
        "the gate's matmul or its scores run in bfloat16 where the rule says float32: a few per cent of the tokens go "
        "to other experts than in training",
        "规则要求 float32，而门控的矩阵乘或分数用了 bfloat16：百分之几的 token 去了与训练时不同的专家",
    ),
    advice=("cast both operands to float32 before the linear", "线性层之前把两个操作数都转成 float32"),
    references=("vllm-project/vllm#14027", "sgl-project/sglang#38719"),
)
def linear(gate: Gate) -> None:
    expect_exact_ids(gate, F32)
    stored = torch.bfloat16 if gate.config.router_dtype == "model" else F32
    with contextlib.suppress(NotApplicable):  # where rounding the logits to bfloat16 leaves no row that tells
        expect_exact_ids(gate, torch.bfloat16, stored)


@probe(
    "linear-cast",
    "fragile",
    name=("a weight in bfloat16 does not narrow the linear", "权重为 bfloat16 时线性层仍用 float32"),
    story=(
        "the gate relies on its weight being stored in float32: as soon as the model is loaded or cast in bfloat16 its "
        "logits are rounded to 8 bits, or the dtypes do not fit and it raises",
        "门控依赖权重以 float32 保存：一旦模型以 bfloat16 加载或转换，logits 就被舍入到 8 位，或因类型不符而报错",
    ),
    advice=("cast both operands to float32 in forward", "在 forward 里把两个操作数都转成 float32"),
    references=("vllm-project/vllm#14027", "sgl-project/sglang#38719"),
)
def linear_cast(gate: Gate) -> None:
    need_module(gate)
    need_float32(gate)
    expect_exact_ids(gate, torch.bfloat16, torch.bfloat16)


def need_float32(gate: Gate) -> None:
    if gate.config.router_dtype == "model":
        raise NotApplicable("its linear runs in the model's dtype by its rule", "按规则它的线性层就用模型的类型")


@probe(
    "autocast",
    "fragile",
    name=("autocast does not reach the gate", "autocast 不影响门控"),
    story=(
        "under torch.autocast a linear on float32 operands still runs in bfloat16: the cast to float32 in the gate's "
        "code does nothing, and mixed-precision training routes otherwise than inference",
        "在 torch.autocast 下，float32 操作数的线性层仍用 bfloat16 计算：代码里的 float32 转换无效，"
        "混合精度训练与推理的路由不同",
    ),
    advice=("switch autocast off around the gate's linear", "在门控的线性层外关闭 autocast"),
    references=("huggingface/transformers#43828", "huggingface/transformers#43839"),
)
def autocast(gate: Gate) -> None:
    need_module(gate)
    need_float32(gate)
    expect_exact_ids(gate, F32, autocast=True)


def expect_exact_ids(gate: Gate, dtype: torch.dtype, stored: torch.dtype = F32, *, autocast: bool = False) -> None:
    """Fault where ids of random hidden states differ from float64 and rounding in the gate's dtype cannot excuse it."""
    holder, config = need_module(gate), gate.config
    n_tokens = min(max(2**15 // config.n_routed_experts, 256), 2048)  # with few experts few rows are close calls
    hidden = torch.randn(n_tokens, config.hidden_size, generator=numbers(9)).to(dtype)
    spread = 2 / math.sqrt(config.hidden_size)
    weight = (spread * torch.randn(config.n_routed_experts, config.hidden_size, generator=numbers(10))).to(dtype)
    linear_bias = None
    if config.router_bias:
        linear_bias = torch.randn(config.n_routed_experts, generator=numbers(11)).to(dtype)
    bias = random_bias(config, scale=0.1)
    given = None if linear_bias is None else linear_bias.to(stored)
    module = holder.prepared(weight.to(stored), bias, given)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), context:
        ids = holder.run(module, hidden, bias).ids.tolist()
    logits, slack = exact_logits(hidden, weight, linear_bias, config)
    expect_ids(ids, logits, slack, bias, config, str(dtype) if not autocast else "autocast")


def exact_logits(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, config: MoEConfig
) -> tuple[Tensor, Tensor]:
    """Logits in float64 [T, E], and how far rounding may take them, [T]."""
    x, w = hidden.double(), weight.double()
    logits = x @ w.T + (0.0 if linear_bias is None else linear_bias.double())
    sums = (x.abs() @ w.abs().T).amax(-1)
    slack = (8 + math.log2(config.hidden_size)) * 2.0**-24 * sums  # of a blocked float32 sum
    if config.router_dtype == "model":
        slack = slack + torch.finfo(hidden.dtype).eps / 2 * logits.abs().amax(-1)
    return logits, slack


def expect_ids(
    ids: list[list[int]], logits: Tensor, slack: Tensor, bias: Tensor | None, config: MoEConfig, how: str
) -> None:
    """Fault where the ids of a row differ although its choice has a margin that rounding cannot close."""
    judged, wrong, first = 0, 0, None
    bias_list = as_list(bias)
    for row, (values, moved) in enumerate(zip(logits.tolist(), slack.tolist(), strict=True)):
        decision = decide(values, bias_list, config)
        if within_rounding(decision, values, moved, config):
            continue
        judged += 1
        if sorted(ids[row]) != sorted(decision.experts):
            wrong += 1
            first = first or (row, sorted(ids[row]), sorted(decision.experts), decision.margin)
    if not judged:
        raise NotApplicable("every row ties within rounding", "每一行在舍入误差内都是并列")
    if first:
        row, got, expected, margin = first
        raise Fault(
            f"{how}: other experts than float64 in {wrong} of the {judged} rows whose choice rounding cannot change; "
            f"row {row} {short(got)} for {short(expected)}, decided by {margin:.2g}",
            f"{how}：{judged} 行的选择不受舍入左右，其中 {wrong} 行与 float64 选的专家不同；"
            f"第 {row} 行 {short(got)}，应为 {short(expected)}，差距 {margin:.2g}",
            row=row, got=got, expected=expected, margin=margin, rows_wrong=wrong, rows_judged=judged,
        )  # fmt: skip


def within_rounding(decision: Decision, logits: list[float], moved: float, config: MoEConfig) -> bool:
    """Whether the choice could be another one where every logit moves by up to `moved` and scores by their rounding."""
    largest = max(abs(value) for value in decision.ranked_by)
    rounding = 8 * 2.0**-24 * largest
    if config.has_correction_bias or config.limits_groups:
        slope = {"sigmoid": 0.25, "sqrtsoftplus": 0.5}.get(config.scoring_func)
        change = slope * moved if slope is not None else largest * math.expm1(2 * moved)
        return decision.margin <= 4 * change + rounding  # two experts, or two sums of two
    in_logits = best(logits, config.num_experts_per_tok)[1]  # scores rank as their logits do
    return in_logits <= 2 * moved or decision.margin <= rounding


@probe(
    "own-weights",
    "wrong",
    name=("with its own weight and bias it follows the definition", "用自身的权重和偏置时符合定义"),
    story=(
        "what holds for made-up numbers fails for the released ones: biases of one sign, large or tiny scores",
        "对构造的数值正确，对发布的权重却不对：偏置同号、分数过大或过小",
    ),
    advice=("compare with the model's own code on these weights", "在这些权重上与模型自己的代码对照"),
    references=("huggingface/transformers#45441", "flashinfer-ai/flashinfer#3875"),
)
def own_weights(gate: Gate) -> None:
    holder, config = need_module(gate), gate.config
    weight = holder.weight.float()
    if not weight.any():
        raise NotApplicable("its weight is all zero", "它的权重全是 0")
    bias = None if holder.bias_name is None else tensor_of(holder.module, holder.bias_name).cpu().float().flatten()
    hidden = torch.randn(64, config.hidden_size, generator=numbers(12))
    with torch.no_grad():
        ids = holder.run(holder.prepared(weight, bias), hidden, bias).ids.tolist()
    expect_ids(ids, *exact_logits(hidden, weight, None, config), bias, config, "float32")
