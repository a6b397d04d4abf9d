"""The matmuls of a cell and nothing else, each in the form that is fastest here: what any engine is bound by.

No gather, no activation, no combine; rows come from a buffer that is already there. Which form is fastest is measured
in the same run, per number of rows, on the cell's own weights.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.ceiling import can_run
from moesaic.bench.problem import Problem
from moesaic.engine.matmul_forms import (
    converted,
    onednn_form,
    onednn_linear,
    rows_form,
    slabs_form,
    turned_form,
    vector_form,
    widening,
)
from moesaic.engine.memory import Workspace, new_gradient
from moesaic.engine.op import below_autograd
from moesaic.engine.outer import ALIASED, PADDING, outer_by_rows

BLOCKS = (1 << 19, 1 << 20)  # elements of a weight widened at a time: 2 MB of float32 fit one core's own cache
LEAST, MOST, ENOUGH = 4, 20, 0.02  # runs of a form, each on another expert; seconds after which LEAST will do
SAMPLES = 8  # gradients that a form of theirs is tried on in turn: more than stay in a cache
HOPELESS = 2.0  # a form this much slower than another in its first two runs is not run again


class Rows(NamedTuple):
    """Activations [n, K] in the weights' dtype and in float32 (the same tensor where that is the dtype)."""

    own: Tensor
    wide: Tensor

    def first(self, n: int) -> "Rows":
        return Rows(self.own[:n], self.wide[:n])


# x [n, K] @ w [K, N], as of the engine; where the result lies is free: in `out`, or in what is returned
Multiply = Callable[[Tensor, Tensor, Tensor, Workspace], Tensor | None]


class Form(NamedTuple):
    """wide: of x in float32, for which it widens w.  turned: of an out that is column-major."""

    multiply: Multiply
    wide: bool = False
    turned: bool = False

    def call(self, rows: Rows, w: Tensor, work: Workspace) -> "partial[Tensor | None]":
        """Its product of these rows, in memory that all forms of a dtype use in turn."""
        x = rows.wide if self.wide else rows.own
        n, columns = len(x), w.shape[1]
        out = work.take(f"result {x.dtype}", *((columns, n) if self.turned else (n, columns)), x.dtype)
        return partial(self.multiply, x, w, out.mT if self.turned else out, work)


def _onednn(x: Tensor, w: Tensor, _out: Tensor, _work: Workspace) -> Tensor:
    return onednn_linear(x, w.mT)  # in memory of its own


def _widened(multiply: Multiply) -> Multiply:
    """Of a w of another dtype, whole and however small: `widening` has another form for those."""
    return lambda x, w, out, work: multiply(x, converted(w, x.dtype, work), out, work)


STRAIGHT, TURNED, SLABS, ONEDNN = "x @ W", "W' @ x'", "slabs of W", "oneDNN"
WHOLE: dict[str, Multiply] = {STRAIGHT: rows_form, TURNED: turned_form, SLABS: slabs_form, ONEDNN: _onednn}
IN_BLOCKS = {STRAIGHT: rows_form, TURNED: turned_form, ONEDNN: onednn_form}
OWN = {
    **{name: Form(multiply, turned=name == TURNED) for name, multiply in WHOLE.items()},
    "W' @ each x": Form(vector_form),
    **{f"{STRAIGHT} by {n}": Form(widening(n, rows_form)) for n in BLOCKS},
}
WIDE = {f"wide {name}": Form(_widened(multiply), True, name == TURNED) for name, multiply in WHOLE.items()}
for _n in BLOCKS:
    for _name, _multiply in IN_BLOCKS.items():
        WIDE[f"wide {_name} by {_n}"] = Form(widening(_n, _multiply), True, _name == TURNED)


def forms_for(dtype: torch.dtype) -> dict[str, Form]:
    """Slabs in float32 alone: torch's batches of 16-bit matmuls run element by element without the instructions, for
    minutes."""
    return OWN if dtype == torch.float32 else {name: form for name, form in (OWN | WIDE).items() if name != SLABS}


# a weight's gradient [K, N] = left' @ right, over n rows: written into `grad`, or added where it accumulates
GradForm = Callable[[Rows, Rows, Tensor, Workspace, bool], object]


def _grad_own(left: Rows, right: Rows, grad: Tensor, _work: Workspace, adds: bool) -> None:
    outer_by_rows(grad, left.own, right.own, beta=float(adds))


def _grad_onednn(left: Rows, right: Rows, grad: Tensor, _work: Workspace, adds: bool) -> None:
    result = onednn_linear(left.own.T, right.own.T)
    grad.add_(result) if adds else grad.copy_(result)


def _grad_in_parts(
    left: Rows, right: Rows, grad: Tensor, work: Workspace, adds: bool, *, onednn: bool, elements: int = 1 << 62
) -> None:
    """In float32, and then rounded or added; where that needs it, what is there is widened first."""
    parts, columns = max(1, grad.numel() // elements), grad.shape[1]
    x = F.pad(right.wide, (0, PADDING)) if columns % ALIASED == 0 else right.wide
    widens = adds and grad.dtype != torch.float32
    for some, rows in zip(grad.tensor_split(parts), left.wide.tensor_split(parts, 1), strict=True):
        product = work.take("product", len(some), x.shape[1], torch.float32)
        if widens:
            product[:, :columns] = some
        if not onednn:
            outer_by_rows(product, rows, x, beta=float(widens))
        elif widens:
            product = onednn_linear(rows.T, x.T).add_(product)
        else:
            product = onednn_linear(rows.T, x.T)
        result = product[:, :columns]
        some.add_(result) if adds and not widens else some.copy_(result)


GRADS: dict[str, GradForm] = {"own": _grad_own, "oneDNN": _grad_onednn, "wide": partial(_grad_in_parts, onednn=False)}
for _elements in BLOCKS:
    GRADS[f"wide by {_elements}"] = partial(_grad_in_parts, onednn=False, elements=_elements)
    GRADS[f"wide oneDNN by {_elements}"] = partial(_grad_in_parts, onednn=True, elements=_elements)


class Matmuls:
    """Runs all matmuls of a problem in the fastest forms. `chosen` says which, after construction."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        up, down = (w.detach() for w in problem.experts[:2])
        turned = problem.spec.transposed
        self.stored = {"up": up, "down": down}
        # as [E, in, out], whatever the layout
        self.weights = {name: w if turned else w.mT for name, w in self.stored.items()}
        self.loads = [(e, n) for e, n in enumerate(problem.counts) if n]
        most = max(n for _, n in self.loads)
        self.dtype = up.dtype
        sizes = {w.shape[dim] for w in self.weights.values() for dim in (1, 2)}
        self.rows = {size: self._draw(most, size) for size in sizes}
        self.work = Workspace()
        for dtype in (self.dtype, torch.float32):  # the most at once, or what was taken before would lie elsewhere
            self.work.take(f"result {dtype}", most, max(sizes), dtype)
        self.adds = problem.cell.accumulates
        self.chosen: dict[tuple[str, int], str] = {}
        self._choose_all()
        self._forward = [self._multiply(name, e, n, backward=False) for e, n in self.loads for name in ("up", "down")]
        self._back = {
            name: [(self._multiply(name, e, n, backward=True), e, *self._gradient(name, n)) for e, n in self.loads]
            for name in (("down", "up") if problem.cell.trains else ())
        }

    @below_autograd
    def __call__(self) -> list[Tensor]:
        """The gradients, fresh or added to; nothing where the cell does not train."""
        for multiply in self._forward:
            multiply()
        return [self._backward(name) for name in self._back]

    def _backward(self, name: str) -> Tensor:
        grad = self._grad(name)
        for multiply, expert, form, left, right in self._back[name]:
            multiply()
            form(left, right, grad[expert], self.work, self.adds)
        return grad

    def _grad(self, name: str) -> Tensor:
        if not self.adds:
            # a new one, as everybody's, its pages asked for as ours: page faults are part of the mode
            return new_gradient(self.stored[name])
        parameter = getattr(self.problem.experts, name)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _multiply(self, name: str, expert: int, n: int, *, backward: bool) -> Callable[[], object]:
        weight = self.weights[name][expert]
        weight = weight.T if backward else weight
        form = forms_for(self.dtype)[self.chosen[name + " backward" * backward, bucket(n)]]
        return form.call(self.rows[weight.shape[0]].first(n), weight, self.work)

    def _gradient(self, name: str, n: int) -> tuple[GradForm, Rows, Rows]:
        _, rows, columns = self.stored[name].shape
        form = GRADS[self.chosen[name + " gradient", bucket(n)]]
        return form, self.rows[rows].first(n), self.rows[columns].first(n)

    def _draw(self, n: int, size: int) -> Rows:
        wide = torch.randn(n, size)
        return Rows(wide.to(self.dtype), wide)

    @below_autograd
    def _choose_all(self) -> None:
        for _, n in self.loads:
            if ("up", bucket(n)) in self.chosen:
                continue
            for name, weights in self.weights.items():
                forms = forms_for(self.dtype)
                self.chosen[name, bucket(n)] = self._fastest(forms, weights, n)
                if self.problem.cell.trains:
                    self.chosen[name + " backward", bucket(n)] = self._fastest(forms, weights.mT, n)
                    self.chosen[name + " gradient", bucket(n)] = self._fastest_gradient(name, n)

    def _fastest(self, forms: dict[str, Form], weights: Tensor, n: int) -> str:
        rows = self.rows[weights.shape[1]].first(n)
        return fastest(
            {
                name: lambda sample, form=form: form.call(rows, weights[sample % len(weights)], self.work)()
                for name, form in forms.items()
            }
        )

    def _fastest_gradient(self, name: str, n: int) -> str:
        grads = torch.zeros(SAMPLES, *self.stored[name].shape[1:], dtype=self.dtype)
        left, right = (self.rows[size].first(n) for size in grads.shape[1:])
        return fastest(
            {
                key: lambda sample, form=form: form(left, right, grads[sample % SAMPLES], self.work, self.adds)
                for key, form in GRADS.items()
            }
        )


def bucket(n: int) -> int:
    """Numbers of rows that share a form: all up to 8, then four to a doubling."""
    if n <= 8:
        return n
    step = 1 << (n.bit_length() - 3)
    return n // step * step


def fastest(forms: dict[str, Callable[[int], object]]) -> str:
    """The name of the form whose median run is the best. Forms that cannot do it drop out."""
    seconds: dict[str, list[float]] = {name: [] for name, form in forms.items() if can_run(lambda form=form: form(0))}
    for sample in range(MOST):
        best = min((min(took) for took in seconds.values() if took), default=float("inf"))
        for number, (name, took) in enumerate(seconds.items(), start=1):
            if (sample > 1 and min(took) > HOPELESS * best) or (sample >= LEAST and sum(took) > ENOUGH):
                continue
            start = time.perf_counter()
            forms[name](1 + sample * len(seconds) + number)
            took.append(time.perf_counter() - start)
    return min(seconds, key=lambda name: statistics.median(seconds[name]))
