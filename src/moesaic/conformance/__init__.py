"""The gate conformance suite: known ways to get an MoE gate wrong, each as a named probe.

    from moesaic.conformance import PROBES, as_gate, assert_conforms, check

`check` runs all probes and reports, `assert_conforms` raises for pytest, `PROBES` can be parametrized over. What is
judged is anything that `as_gate` takes. Probes have two levels: "wrong" (the result differs from the definition on
lawful input) and "fragile" (right until something usual happens).
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from moesaic.config import MoEConfig
from moesaic.conformance import groups, precision, selection, tensors, training, weighing  # they register their probes
from moesaic.conformance.asking import numbers, random_bias
from moesaic.conformance.gates import Gate, ModuleGate
from moesaic.conformance.parts import NoTuple
from moesaic.conformance.targets import as_gate
from moesaic.conformance.verdict import LEVELS, Fault, GateRaised, Probe, Report, Result, plain_torch
from moesaic.conformance.verdict import PROBES as _REGISTERED

__all__ = ["LEVELS", "PROBES", "Probe", "Report", "Result", "as_gate", "assert_conforms", "check"]

_TOPICS = (selection, groups, weighing, tensors, precision, training)
PROBES: tuple[Probe, ...] = tuple(
    sorted(_REGISTERED.values(), key=lambda p: [t.__name__ for t in _TOPICS].index(p.ask.__module__))
)


def check(
    target: Any,
    config: MoEConfig | None = None,
    *,
    level: str = "fragile",
    before: Callable[[Probe], None] = lambda _: None,
) -> Report:
    """Judge a gate: a Router, a layer or model that holds one, a module, a class, or a function.

    `config` is the rule that it should follow; modules of ours and of transformers carry their own. level="wrong" runs
    the probes of that level alone; `before` is told each probe before it is asked. ValueError where there is no gate,
    or no rule to judge it by.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown: use one of {', '.join(LEVELS)}")
    gate = as_gate(target, config)
    if gate.config.topk_method == "balanced":
        raise ValueError(f"{gate.name} deals tokens out in turn (topk_method='balanced'): that is no gate to judge")
    _try(gate)
    results = []
    for probe in PROBES:
        if level in ("fragile", probe.level):
            before(probe)
            results.append(probe.judge(gate))
    return Report(gate, tuple(results))


@plain_torch()
def _try(gate: Gate) -> None:
    """ValueError where the gate answers nothing at all, or its logits cannot be set."""
    try:
        gate.answer(torch.randn(4, gate.config.n_routed_experts, generator=numbers(0)), random_bias(gate.config))
        if isinstance(gate, ModuleGate) and gate.config.rule_is_known:
            gate.check_logits()
    except GateRaised as raised:
        if isinstance(raised.error, NoTuple):
            raise ValueError(f"{gate.name} is no gate: {raised.error}: give its router") from None
        raise ValueError(f"{gate.name} cannot be asked: on plain logits it raised {raised}") from None
    except Fault:
        return  # an answer, if a bad one: the probes will say


def assert_conforms(
    target: Any, config: MoEConfig | None = None, *, level: str = "wrong", allowed: Collection[str] = ()
) -> None:
    """AssertionError with the numbers of every failed probe that is not in `allowed`. level="fragile" asks for both.

    ValueError where none failed in a gate whose rule is not known: that is no verdict.
    """
    if unknown := set(allowed) - {p.id for p in PROBES}:
        raise ValueError(f"allowed={min(unknown)!r} is no probe: use ids of moesaic.conformance.PROBES")
    __tracebackhide__ = True  # pytest shows the line of the test, not this one
    report = check(target, config, level=level)
    failed = [r for r in report.failed() if r.probe.id not in allowed]
    if failed:  # no assert statement, which `python -O` would leave out
        raise AssertionError("\n".join([f"{report.gate.name} does not conform:", *map(str, failed)]))
    if not report.judged:
        why = next(r.says for r in report.results if r.probe.id == "definition")
        raise ValueError(f"{report.gate.name} cannot be judged ({why}): give the MoEConfig of its rule")
