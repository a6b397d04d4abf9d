"""How probes ask: logits whose answer is beyond doubt, and the comparison with the definition."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.conformance.definition import Decision, decide, is_group_limited
from moesaic.conformance.gates import FunctionGate, Gate, ModuleGate
from moesaic.conformance.parts import Answer
from moesaic.conformance.verdict import Fault, NotApplicable

CLEAR = 1e-5  # a gap this large, relative to the largest score, is 80 units of float32: no rounding closes it
WEIGHT_TOLERANCE = 1e-5  # relative, each weight by itself: sigmoid and exp are right to about 1e-6
ROWS = 12


def numbers(seed: int) -> torch.Generator:
    """Its own generator: a probe asks the same whatever ran before."""
    return torch.Generator().manual_seed(seed)


def clear_logits(
    config: MoEConfig,
    bias: Tensor | None = None,
    *,
    rows: int = ROWS,
    spread: float = 2.0,
    shift: float = 0.0,
    seed: int = 0,
    wanted: Callable[[list[float], Decision], bool] = lambda _logits, _decision: True,
) -> Tensor:
    """Random logits [rows, E] whose choice no rounding can change, and which are as `wanted`.

    NotApplicable where there are hardly any among the first 400.
    """
    generator, found = numbers(seed), []
    bias_list = as_list(bias)
    for _ in range(400):
        row = shift + spread * torch.randn(config.n_routed_experts, generator=generator)
        decision = decide(row.tolist(), bias_list, config)
        largest = max(abs(value) for value in decision.ranked_by)
        if decision.margin > CLEAR * largest and wanted(row.tolist(), decision):
            found.append(row)
            if len(found) == rows:
                break
    if not found:
        raise NotApplicable("these sizes leave no row that would tell", "在这些尺寸下没有能区分的行")
    return torch.stack(found)


def random_bias(config: MoEConfig, *, scale: float = 0.3, shift: float = 0.0, seed: int = 1) -> Tensor | None:
    """A correction bias [E], or None where the rule has none."""
    if not config.has_correction_bias:
        return None
    return shift + scale * torch.randn(config.n_routed_experts, generator=numbers(seed))


def some_bias(gate: Gate, *, scale: float = 0.3, shift: float = 0.0) -> Tensor:
    """A correction bias [E]; NotApplicable where the rule has none."""
    bias = random_bias(gate.config, scale=scale, shift=shift)
    if bias is None:
        raise NotApplicable("it has no correction bias", "它没有选择偏置")
    return bias


def need_groups(gate: Gate) -> None:
    if not is_group_limited(gate.config):
        raise NotApplicable("it has no group limit", "它没有分组限制")


def need_module(gate: Gate) -> ModuleGate:
    if isinstance(gate, FunctionGate):
        raise NotApplicable("a function holds no tensors", "函数自身不保存张量")
    return gate


def as_list(bias: Tensor | None) -> list[float] | None:
    return None if bias is None else bias.double().tolist()


def expect_definition(gate: Gate, logits: Tensor, bias: Tensor | None = None) -> Answer:
    """Ask, and raise Fault with the numbers of the first row where the answer is not the definition's."""
    answer = gate.answer(logits, bias)
    compare(answer, logits, bias, gate.config)
    return answer


def compare(answer: Answer, logits: Tensor, bias: Tensor | None, config: MoEConfig) -> None:
    """Fault at the first row whose experts or weights are not the definition's."""
    bias_list = as_list(bias)
    for row, values in enumerate(logits.tolist()):
        decision = decide(values, bias_list, config)
        expect_experts(row, answer.ids[row].tolist(), decision)
        expect_weights(row, answer.ids[row].tolist(), answer.weights[row].tolist(), decision)


def expect_experts(row: int, ids: list[int], decision: Decision) -> None:
    if sorted(ids) == sorted(decision.experts):
        return
    got, expected = sorted(ids), sorted(decision.experts)
    raise Fault(
        f"row {row}: chose {short(got)}, the definition {short(expected)} (decided by a gap of {decision.margin:.2g})",
        f"第 {row} 行：选了 {short(got)}，按定义应为 {short(expected)}（差距 {decision.margin:.2g}）",
        row=row,
        got=got,
        expected=expected,
        margin=decision.margin,
    )


def expect_weights(row: int, ids: list[int], weights: list[float], decision: Decision) -> None:
    for expert, weight in zip(ids, weights, strict=True):
        expected = decision.weights[expert]
        if not abs(weight - expected) <= WEIGHT_TOLERANCE * abs(expected):
            raise wrong_weight(row, expert, weight, expected)


def wrong_weight(row: int, expert: int, weight: float, expected: float) -> Fault:
    return Fault(
        f"row {row}: expert {expert} weighs {weight:.6g}, the definition gives {expected:.6g}",
        f"第 {row} 行：专家 {expert} 的权重是 {weight:.6g}，按定义应为 {expected:.6g}",
        row=row,
        expert=expert,
        got=weight,
        expected=expected,
    )


def short(ids: list[int], most: int = 8) -> str:
    """At most `most` ids of a list."""
    return f"{ids}" if len(ids) <= most else f"[{', '.join(map(str, ids[:most]))}, … {len(ids)} in all]"


def as_pairs(answer: Answer, row: int) -> dict[int, float]:
    """The weight of each chosen expert of a row: slot order differs between gates and means nothing."""
    return dict(zip(answer.ids[row].tolist(), answer.weights[row].tolist(), strict=True))


def expect_same(answer: Answer, other: Answer, en: str, zh: str) -> None:
    """Fault where two answers differ in experts, or in weights by more than rounding."""
    for row in range(len(other.ids)):
        first, second = as_pairs(answer, row), as_pairs(other, row)
        if first.keys() != second.keys():
            raise Fault(
                f"row {row}: {short(sorted(first))} {en} {short(sorted(second))}",
                f"第 {row} 行：{short(sorted(first))} {zh} {short(sorted(second))}",
                row=row,
                got=sorted(first),
                expected=sorted(second),
            )
        for expert, weight in first.items():
            if not abs(weight - second[expert]) <= WEIGHT_TOLERANCE * abs(second[expert]):
                raise Fault(
                    f"row {row}, expert {expert}: {weight:.6g} {en} {second[expert]:.6g}",
                    f"第 {row} 行，专家 {expert}：{weight:.6g} {zh} {second[expert]:.6g}",
                    row=row,
                    expert=expert,
                    got=weight,
                    expected=second[expert],
                )


@contextmanager
def told_as(en: str, zh: str) -> Iterator[None]:
    """Say before the numbers of a fault what it shows."""
    try:
        yield
    except Fault as fault:
        raise Fault(f"{en}: {fault.says.en}", f"{zh}：{fault.says.zh}", **fault.numbers) from None
