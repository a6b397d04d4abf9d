"""Probes: shapes, dtypes and strides of what goes in and comes out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.conformance.asking import expect_same, random_bias, some_logits
from moesaic.conformance.gates import Gate, Ready
from moesaic.conformance.parts import Answer
from moesaic.conformance.verdict import Fault, GateRaised, probe


@probe(
    "shapes",
    "wrong",
    name=("ids and weights are [T, K]", "编号和权重的形状是 [T, K]"),
    story=(
        "whoever dispatches reads rows of K pairs: another shape or an id beyond E reads somebody else's memory",
        "分发按每行 K 对读取：形状不同或编号超出 E，会读到别处的内存",
    ),
    advice=(
        "return integer ids in [0, E) and floating weights, both [T, K]",
        "返回 [0, E) 的整数编号和浮点权重，均为 [T, K]",
    ),
    references=(),
    needs_rule=False,
)
def shapes(gate: Gate) -> None:
    n_experts = gate.config.n_routed_experts
    falling = torch.linspace(4.0, -4.0, n_experts)  # takes the first expert, and its mirror the last one
    logits = torch.cat([some_logits(gate), falling[None], falling.flip(-1)[None]])
    answer = gate.answer(logits, random_bias(gate.config, scale=0.0))
    if answer.ids.min() < 0 or answer.ids.max() >= n_experts:
        ids = sorted(set(answer.ids.flatten().tolist()))
        raise Fault(
            f"ids reach from {ids[0]} to {ids[-1]} with {n_experts} experts",
            f"专家共 {n_experts} 个，编号却从 {ids[0]} 到 {ids[-1]}",
            got=[ids[0], ids[-1]],
        )


@probe(
    "ids-int64",
    "fragile",
    name=("ids are int64", "编号是 int64"),
    story=(
        "gather, scatter and index_add take int64 alone: other integers work with one experts implementation and raise "
        "with the next",
        "gather、scatter、index_add 只接受 int64：其他整数类型换一种专家实现就会报错",
    ),
    advice=("return int64", "返回 int64"),
    references=(),
    needs_rule=False,
)
def ids_int64(gate: Gate) -> None:
    dtype = gate.answer(some_logits(gate), random_bias(gate.config)).ids.dtype
    if dtype != torch.int64:
        raise Fault(f"ids are {dtype}", f"编号是 {dtype}", got=str(dtype))


def views(x: Tensor, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """The same values [T, D] with other strides; `whole` adds [B, S, D], which only modules take."""
    n_tokens, width = x.shape
    wide = torch.zeros(n_tokens, 2 * width)
    wide[:, ::2] = x
    yield "columns of a wider tensor", wide[:, ::2]
    yield "transposed", x.T.contiguous().T
    tall = torch.zeros(2 * n_tokens, width)
    tall[::2] = x
    yield "every second row", tall[::2]
    yield "offset by one", torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    if whole and n_tokens % 2 == 0:
        yield "[S, B, D] seen as [B, S, D]", x.view(-1, 2, width).transpose(0, 1)


def through_views(gate: Gate) -> Iterator[tuple[str, Answer | GateRaised, Answer]]:
    """(kind of view, what the gate answers to it, what it answers to a contiguous copy)."""
    ready: Ready = gate.ready(some_logits(gate), random_bias(gate.config))
    x = ready.inputs.detach()
    with torch.no_grad():
        plain = ready.run(x.clone())
        for kind, view in [*views(x, whole=gate.module is not None), ("one row expanded", x[:1].expand(4, -1))]:
            try:
                expected = ready.run(view.clone(memory_format=torch.contiguous_format))
            except GateRaised:
                continue  # it takes [T, D] alone
            if view.dim() == 3 and not torch.equal(expected.ids, plain.ids[order_of(view)]):
                continue  # it was not made for [B, S, D]
            try:
                yield kind, ready.run(view), expected
            except GateRaised as error:
                yield kind, error, expected


def order_of(view: Tensor) -> Tensor:
    """Which row of x each row of the flattened [B, S, D] view is."""
    return torch.arange(view.shape[0] * view.shape[1]).view(view.shape[1], view.shape[0]).T.flatten()


@probe(
    "strides",
    "wrong",
    name=("a view gives what its copy gives", "视图与其拷贝结果相同"),
    story=(
        "the kernel reads memory as if it were contiguous: sliced or transposed hidden states give wrong experts, in "
        "silence",
        "核函数按连续内存读取：切片或转置的隐藏状态会静默地得到错误的专家",
    ),
    advice=("respect strides, or make the input contiguous", "遵守步长，或先变连续"),
    references=("vllm-project/vllm#57167", "sgl-project/sglang#13896", "pytorch/pytorch#62940"),
    needs_rule=False,
)
def strides(gate: Gate) -> None:
    for kind, answer, expected in through_views(gate):
        if isinstance(answer, Answer):
            expect_same(answer, expected, f"({kind}) instead of", f"（{kind}），应为")


@probe(
    "strides-refused",
    "fragile",
    name=("every view is accepted", "接受任何视图"),
    story=(
        "`view` on transposed hidden states raises: the gate works until somebody changes the layout before it",
        "对转置的隐藏状态用 view 会报错：只要有人改了前面的布局就会失败",
    ),
    advice=("use reshape", "用 reshape"),
    references=("pytorch/pytorch#62940",),
    needs_rule=False,
)
def strides_refused(gate: Gate) -> None:
    for kind, answer, _ in through_views(gate):
        if isinstance(answer, GateRaised):
            raise Fault(f"{kind}: {answer}", f"{kind}：{answer}", view=kind, raised=str(answer))


@probe(
    "no-tokens",
    "wrong",
    name=("zero tokens give an empty answer", "零个 token 得到空结果"),
    story=(
        "under expert or data parallelism a rank may hold no token: a gate that raises there hangs all other ranks",
        "并行时某个 rank 可能没有 token：门控在那里报错，会让所有其他 rank 挂起",
    ),
    advice=("return [0, K]", "返回 [0, K]"),
    references=("NVIDIA/Megatron-LM#1877", "NVIDIA/Megatron-LM#3626", "NVIDIA/Megatron-LM#4851"),
    needs_rule=False,
)
def no_tokens(gate: Gate) -> None:
    gate.answer(some_logits(gate)[:0], random_bias(gate.config))


@probe(
    "one-token",
    "wrong",
    name=("a token alone gets what it gets in a batch", "单个 token 与批中结果相同"),
    story=(
        "decoding takes another path than prefill, and routes otherwise: a cached prompt and a fresh one disagree",
        "解码与预填充走不同路径、选不同专家：有缓存与无缓存的结果不一致",
    ),
    advice=("one code for every number of rows", "任何行数用同一段代码"),
    references=(),
    needs_rule=False,
)
def one_token(gate: Gate) -> None:
    logits, bias = some_logits(gate), random_bias(gate.config)
    together = gate.answer(logits, bias)
    for row in range(len(logits)):
        alone = gate.answer(logits[row : row + 1], bias)
        rows = Answer(together.ids[row : row + 1], together.weights[row : row + 1])
        expect_same(alone, rows, f"for row {row} alone, in the batch", f"（第 {row} 行单独时），批中为")
