"""How probes ask: logits whose answer is beyond doubt, and the comparison with the definition."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.conformance.definition import Decision, decide
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


def random_bias(config: MoEConfig, *, scale: float = 0.3, shift: float = 0.0) -> Tensor | None:
    """A correction bias [E], or None where the rule has none."""
    if not config.has_correction_bias:
        return None
    return shift + scale * torch.randn(config.n_routed_experts, generator=numbers(1))


def some_bias(gate: Gate, *, scale: float = 0.3, shift: float = 0.0) -> Tensor:
    """A correction bias [E]; NotApplicable where the rule has none."""
    bias = random_bias(gate.config, scale=scale, shift=shift)
    if bias is None:
        raise NotApplicable("it has no correction bias", "它没有选择偏置")
    return bias


def need_groups(gate: Gate) -> None:
    if not gate.config.limits_groups:
        raise NotApplicable("it has no group limit", "它没有分组限制")


def need_module(gate: Gate) -> ModuleGate:
    if isinstance(gate, FunctionGate):
        raise NotApplicable("a function holds no tensors", "函数自身不保存张量")
    return gate


def as_list(bias: Tensor | None) -> list[float] | None:
    return None if bias is None else bias.double().tolist()


def expect_definition(gate: Gate, logits: Tensor, bias: Tensor | None = None) -> None:
    """Ask, and raise Fault at the first row where the answer is not the definition's."""
    answer, biases = gate.answer(logits, bias), as_list(bias)
    decisions = [decide(values, biases, gate.config) for values in logits.tolist()]
    try:
        expect_pairs(answer, [each.weights for each in decisions], "where the definition says", "，按定义应为")
    except Fault as fault:
        if "expert" in fault.numbers:  # the right one, and its weight is wrong
            raise
        margin = decisions[fault.numbers["row"]].margin
        en, zh = f"{fault.says.en} (decided by a gap of {margin:.2g})", f"{fault.says.zh}（差距 {margin:.2g}）"
        raise Fault(en, zh, **fault.numbers, margin=margin) from None


def expect_same(answer: Answer, other: Answer, en: str, zh: str) -> None:
    """Fault where two answers differ in experts, or in weights by more than rounding."""
    expect_pairs(answer, [as_pairs(other, row) for row in range(len(other.ids))], en, zh)


def expect_pairs(answer: Answer, expected: Sequence[dict[int, float]], en: str, zh: str) -> None:
    """Fault at the first row whose experts or weights are not those expected. en, zh: what is said between the two."""
    for row, wanted in enumerate(expected):
        got = as_pairs(answer, row)
        if got.keys() != wanted.keys():
            ids, due = sorted(answer.ids[row].tolist()), sorted(wanted)
            raise Fault(
                f"row {row}: experts {short(ids)} {en} {short(due)}",
                f"第 {row} 行：专家 {short(ids)}{zh} {short(due)}",
                row=row, got=ids, expected=due,
            )  # fmt: skip
        for expert, weight in got.items():
            if not abs(weight - wanted[expert]) <= WEIGHT_TOLERANCE * abs(wanted[expert]):
                raise Fault(
                    f"row {row}, expert {expert}: weight {weight:.6g} {en} {wanted[expert]:.6g}",
                    f"第 {row} 行，专家 {expert}：权重 {weight:.6g}{zh} {wanted[expert]:.6g}",
                    row=row, expert=expert, got=weight, expected=wanted[expert],
                )  # fmt: skip


def short(ids: list[int], most: int = 8) -> str:
    """At most `most` ids of a list."""
    return f"{ids}" if len(ids) <= most else f"[{', '.join(map(str, ids[:most]))}, … {len(ids)} in all]"


def as_pairs(answer: Answer, row: int) -> dict[int, float]:
    """The weight of each chosen expert of a row: slot order differs between gates and means nothing."""
    return dict(zip(answer.ids[row].tolist(), answer.weights[row].tolist(), strict=True))


def some_logits(gate: Gate, rows: int = 6, *, seed: int = 8) -> Tensor:
    """Clear logits where the rule is known, random ones where it is not."""
    if gate.config.rule_is_known:
        return clear_logits(gate.config, random_bias(gate.config), rows=rows)
    return 2 * torch.randn(rows, gate.config.n_routed_experts, generator=numbers(seed))


@contextmanager
def told_as(en: str, zh: str) -> Iterator[None]:
    """Say before the numbers of a fault what it shows."""
    try:
        yield
    except Fault as fault:
        raise Fault(f"{en}: {fault.says.en}", f"{zh}：{fault.says.zh}", **fault.numbers) from None
