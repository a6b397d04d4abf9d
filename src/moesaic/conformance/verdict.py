"""What a probe is and what it says: registered by `probe`, run by `check`, asserted by `assert_conforms`."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moesaic.trace.shown import visible

if TYPE_CHECKING:
    from moesaic.conformance.gates import Gate

LEVELS = ("wrong", "fragile")


class Both(NamedTuple):
    """One text in both languages."""

    en: str
    zh: str

    def __str__(self) -> str:
        return self.en


class Fault(Exception):
    """A gate failed a probe. `says` is one sentence with the numbers, `numbers` the same for a program."""

    def __init__(self, en: str, zh: str, **numbers: Any) -> None:
        super().__init__(en)
        self.says, self.numbers = Both(en, zh), {name: strict(value) for name, value in numbers.items()}


def strict(value: Any) -> Any:
    """The value for a strict JSON document: NaN and infinities become None."""
    if isinstance(value, list):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class NotApplicable(Exception):
    """A probe has nothing to judge in this gate, and why."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en)
        self.says = Both(en, zh)


class GateRaised(Exception):
    """The gate's own code raised while it was asked."""

    def __init__(self, error: Exception | SystemExit) -> None:
        self.error = error
        super().__init__(in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """The kind and the words of a foreign error, whole but for its length, safe for a terminal."""
    told = " ".join(str(error).split())
    return visible(type(error).__name__ + (f": {told}" if told else ""), most=300)


@contextmanager
def gate_code() -> Iterator[None]:
    """Whatever the gate's own code raises in here is GateRaised, a finding, and no mistake of the suite."""
    try:
        yield
    except (Fault, NotApplicable, GateRaised):
        raise
    except (Exception, SystemExit) as error:
        raise GateRaised(error) from error


@contextmanager
def plain_torch() -> Iterator[None]:
    """Gradients, no inference mode, no autocast, float32 tensors on the CPU: what the caller has set is no finding."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


class Result(NamedTuple):
    """What one probe found: outcome "pass", "fail" or "not applicable", and what there is to say about it."""

    probe: "Probe"
    outcome: str
    says: Both = Both("", "")
    numbers: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, never written)

    def __str__(self) -> str:
        return f"{self.probe.id} ({self.probe.level}): {self.outcome}{': ' if self.says.en else ''}{self.says}"


@dataclass(frozen=True)
class Probe:
    """One known trap.

    level: "wrong" (the result differs from the definition on lawful input) or "fragile" (right until something usual
    happens).  story: what goes wrong in production.  advice: what to do.  references: public reports of the trap.
    needs_rule: the gate's rule must be known, not only its sizes.
    """

    id: str
    level: str
    name: Both
    story: Both
    advice: Both
    references: tuple[str, ...]
    ask: Callable[["Gate"], None] = field(repr=False, compare=False)
    needs_rule: bool = True

    def __str__(self) -> str:
        return self.id

    @plain_torch()
    def judge(self, gate: "Gate") -> Result:
        """Ask the gate. Anything its code raises on lawful input is a failure too."""
        if self.needs_rule and not gate.config.rule_is_known:
            return Result(self, "not applicable", Both("the rule of this gate is not known", "不知道这个门控的规则"))
        try:
            self.ask(gate)
        except Fault as fault:
            return Result(self, "fail", fault.says, fault.numbers)
        except NotApplicable as reason:
            return Result(self, "not applicable", reason.says)
        except GateRaised as error:
            return Result(self, "fail", Both(f"the gate raised {error}", f"门控抛出 {error}"), {"raised": str(error)})
        return Result(self, "pass")


PROBES: dict[str, Probe] = {}  # filled by the decorator, in the order of the topics


def probe(
    id: str,
    level: str,
    *,
    name: tuple[str, str],
    story: tuple[str, str],
    advice: tuple[str, str],
    references: tuple[str, ...],
    needs_rule: bool = True,
) -> Callable[[Callable[["Gate"], None]], Callable[["Gate"], None]]:
    """Register a function as the probe `id`; texts are (en, zh)."""
    assert level in LEVELS
    assert id not in PROBES

    def register(ask: Callable[["Gate"], None]) -> Callable[["Gate"], None]:
        PROBES[id] = Probe(id, level, Both(*name), Both(*story), Both(*advice), references, ask, needs_rule)
        return ask

    return register


class Report(NamedTuple):
    """What all probes found in one gate."""

    gate: "Gate"
    results: tuple[Result, ...]

    def failed(self, level: str | None = None) -> list[Result]:
        """The failures, of one level or of both."""
        return [r for r in self.results if r.outcome == "fail" and level in (None, r.probe.level)]

    @property
    def judged(self) -> bool:
        """The gate was held against its definition, as one whose rule is not known cannot be."""
        return any(r.probe.id == "definition" and r.outcome != "not applicable" for r in self.results)

    @property
    def conforms(self) -> bool | None:
        """No probe of the level "wrong" failed; None where none did in a gate that was not judged."""
        return False if self.failed("wrong") else True if self.judged else None
