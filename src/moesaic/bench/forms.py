"""How fast this machine multiplies: per dtype, and per form of one expert's matmul beside what the cpu engine does."""

import math
import random
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.bench.ceiling import best_seconds, l3_bytes
from moesaic.bench.machine import available_bytes
from moesaic.engine import matmul_forms
from moesaic.engine.batches import batches
from moesaic.engine.memory import Workspace
from moesaic.engine.multiply import Multiply
from moesaic.engine.processor import machine

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens of one expert
OUT, IN = 1536, 2048  # the up projection of one Qwen3-30B-A3B expert
SQUARE = 1024
FEW = 16  # more rows are never best one by one
ROUNDS = 7
ENGINE = "engine"


# W is the weight as it is stored, [OUT, IN]
STRAIGHT, PARTS, SLABS, TURNED = "x @ W.T", "by parts of W", "slabs of W", "W @ x.T"
VECTOR, ONEDNN = "W @ each x", "oneDNN"
WHOLE, BLOCKS = "widen W", "widen parts of W"
OWN = {
    STRAIGHT: matmul_forms.rows_form,
    PARTS: matmul_forms.blocks_form,
    SLABS: matmul_forms.slabs_form,
    TURNED: matmul_forms.columns_form,
    VECTOR: matmul_forms.vector_form,
    ONEDNN: matmul_forms.onednn_form,
}
NAMED = {"mv": VECTOR, "bmm": SLABS, "_linear_pointwise": ONEDNN}  # by torch's name, where that says it


class FormTimes(NamedTuple):
    """The best of a few runs of each form, by label, for x [rows, IN]; and what the engine does, timed and named."""

    dtype: str
    rows: int
    seconds: dict[str, float]
    engine_seconds: float
    engine_form: str

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=lambda label: self.seconds[label])

    @property
    def slower(self) -> float:
        """How many times the fastest form's time the engine takes."""
        return self.engine_seconds / self.seconds[self.fastest]

    def to_dict(self) -> dict[str, Any]:
        """With times in microseconds."""
        times = {label: 1e6 * seconds for label, seconds in self.seconds.items()}
        engine = {"engine": self.engine_form, "engine_us": 1e6 * self.engine_seconds, "slower": self.slower}
        return {"dtype": self.dtype, "rows": self.rows, "us": times, "fastest": self.fastest, **engine}


def wide_forms() -> dict[str, matmul_forms.Form]:
    """Of 16-bit weights for x in float32, which then are multiplied as this machine does it best."""
    inner = {"amd": matmul_forms.onednn_form, "amd-avx2": matmul_forms.slabs_form}.get(
        machine(), matmul_forms.rows_form
    )
    elements = 1 << 20 if inner is matmul_forms.onednn_form else matmul_forms.BLOCK
    return {WHOLE: matmul_forms.widening(matmul_forms.ANY, inner), BLOCKS: matmul_forms.widening(elements, inner)}


def square_flops(dtype: torch.dtype) -> float:
    """Operations per second of a plain square matmul."""
    a = torch.randn(SQUARE, SQUARE).to(dtype)
    return 2.0 * SQUARE**3 / best_seconds(lambda: a @ a.T)


def time_forms(dtype: torch.dtype, row_counts: tuple[int, ...] = ROWS) -> list[FormTimes]:
    """Every form for every number of rows. Each run takes another weight, so that none is in a cache."""
    weights = _weights(dtype)
    return [_time_rows(rows, dtype, weights) for rows in row_counts]


def engine_run(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What the cpu engine does with the rows x [m, IN] of one expert, as a function of its w [IN, OUT]; row-major
    as from the forms beside it, where AMX leaves it column-major."""
    multiply = Multiply(x.dtype)
    (batch,) = batches([len(x)], torch.arange(len(x)))
    return lambda w: multiply(batch, x, w[None], "engine").contiguous()


def engine_form(x: Tensor, w: Tensor) -> str:
    """The label of that, seen from the matmuls it runs."""
    run = engine_run(x)
    with _Matmuls() as seen:
        run(w)
    name, left = seen.calls[0]
    whole = sum(name == other for other, _ in seen.calls) == 1  # what slabs leave over is an mm beside their bmm
    if left.dtype != w.dtype:
        return WHOLE if whole else BLOCKS
    if name in NAMED:
        return NAMED[name]
    return TURNED if len(left) == w.shape[1] else STRAIGHT if whole else PARTS


class _Matmuls(TorchDispatchMode):
    """Notes the name and the left factor of every matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        if name == "mm" or name in NAMED:
            self.calls.append((name, args[0]))
        return func(*args, **(kwargs or {}))


def _weights(dtype: torch.dtype) -> Tensor:
    """Matrices [n, IN, OUT] that fill the last-level cache twice, or a quarter of the free memory if that is less."""
    room = (available_bytes() or 4 << 30) // 4
    count = max(2, min(2 * l3_bytes(), room) // (OUT * IN * dtype.itemsize) + 1)
    return torch.randn(OUT, IN).to(dtype).expand(count, OUT, IN).contiguous().mT


def _time_rows(rows: int, dtype: torch.dtype, weights: Tensor) -> FormTimes:
    own, work = torch.randn(rows, IN).to(dtype), Workspace()
    candidates: dict[str, tuple[matmul_forms.Form, Tensor]] = {label: (form, own) for label, form in OWN.items()}
    if rows > FEW:
        del candidates[VECTOR]
    if dtype.itemsize < 4:
        del candidates[SLABS]  # torch's batches of 16-bit matmuls run element by element without the instructions
        candidates |= {label: (form, own.float()) for label, form in wide_forms().items()}
    runs: dict[str, Callable[[Tensor], object]] = {ENGINE: engine_run(own)}
    for label, (form, x) in candidates.items():
        out = x.new_empty(rows, OUT)
        try:
            form(x, weights[-1], out, work)  # the one whose turn comes last
        except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch has not got it
            continue
        runs[label] = lambda w, form=form, x=x, out=out: form(x, w, out, work)
    seconds = _best_of_rounds(runs, weights)
    engine_seconds = seconds.pop(ENGINE)
    return FormTimes(str(dtype).removeprefix("torch."), rows, seconds, engine_seconds, engine_form(own, weights[-1]))


def _best_of_rounds(runs: dict[str, Callable[[Tensor], object]], weights: Tensor) -> dict[str, float]:
    best, order, next_weight = dict.fromkeys(runs, math.inf), random.Random(0), cycle(weights)
    for _ in range(ROUNDS):
        for label in order.sample(list(runs), len(runs)):  # in no order, since each leaves its own things in the cache
            weight = next(next_weight)
            start = time.perf_counter()
            runs[label](weight)
            best[label] = min(best[label], time.perf_counter() - start)
    return best
