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
from moesaic.engine import gemm
from moesaic.engine.gemm import Workspace

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens of one expert
OUT, IN = 1536, 2048  # the up projection of one Qwen3-30B-A3B expert
SQUARE = 1024
ROUNDS = 7
ENGINE = "engine"


# W is the weight as it is stored, [OUT, IN]
STRAIGHT, TURNED, VECTOR, ONEDNN = "x @ W.T", "W @ x.T", "W @ x[0]", "oneDNN"
WHOLE, BLOCKS = "widen W", f"widen {gemm.BLOCK} rows"
OWN = {STRAIGHT: gemm.rows_form, TURNED: gemm.columns_form, VECTOR: gemm.vector_form, ONEDNN: gemm.onednn_form}
WIDE = {WHOLE: gemm.as_a_whole, BLOCKS: gemm.by_blocks}  # 16-bit weights for x in float32


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


def square_flops(dtype: torch.dtype) -> float:
    """Operations per second of a plain square matmul."""
    a = torch.randn(SQUARE, SQUARE).to(dtype)
    return 2.0 * SQUARE**3 / best_seconds(lambda: a @ a.T)


def time_forms(dtype: torch.dtype, row_counts: tuple[int, ...] = ROWS) -> list[FormTimes]:
    """Every form for every number of rows. Each run takes another weight, so that none is in a cache."""
    weights = _weights(dtype)
    return [_time_rows(rows, dtype, weights) for rows in row_counts]


def engine_form(x: Tensor, w: Tensor) -> str:
    """The label of what the cpu engine does with x [m, IN] and w [IN, OUT], seen from the matmuls it runs."""
    with _Matmuls() as seen:
        take_engine_form(x, w, x.new_empty(len(x), w.shape[1]), Workspace())
    name, left = seen.calls[0]
    if len(seen.calls) > 1:
        return BLOCKS
    if name == "mv":
        return VECTOR
    if left.dtype != w.dtype:
        return WHOLE
    return ONEDNN if name == "_linear_pointwise" else STRAIGHT if left.shape == x.shape else TURNED


def take_engine_form(x: Tensor, w: Tensor, out: Tensor, work: Workspace) -> None:
    gemm.form_for(gemm.table_for(x.dtype, w), len(x))(x, w, out, work)


class _Matmuls(TorchDispatchMode):
    """Notes the name and the left factor of every matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        if name in ("mm", "mv", "_linear_pointwise"):
            self.calls.append((name, args[0]))
        return func(*args, **(kwargs or {}))


def _weights(dtype: torch.dtype) -> Tensor:
    """Matrices [n, IN, OUT] that fill the last-level cache twice, or a quarter of the free memory if that is less."""
    room = (available_bytes() or 4 << 30) // 4
    count = max(2, min(2 * l3_bytes(), room) // (OUT * IN * dtype.itemsize) + 1)
    return torch.randn(OUT, IN).to(dtype).expand(count, OUT, IN).contiguous().mT


def _time_rows(rows: int, dtype: torch.dtype, weights: Tensor) -> FormTimes:
    own, work = torch.randn(rows, IN).to(dtype), Workspace()
    wide, multiplied = own.float(), own.to(gemm.matmul_dtype(dtype))
    forms: dict[str, tuple[gemm.Form, Tensor]] = {label: (form, own) for label, form in OWN.items()}
    if rows > 1:
        del forms[VECTOR]
    if dtype.itemsize < 4:
        forms |= {label: (form, wide) for label, form in WIDE.items()}
    forms[ENGINE] = (take_engine_form, multiplied)
    runs: dict[str, Callable[[Tensor], None]] = {}
    for label, (form, x) in forms.items():
        out = x.new_empty(rows, OUT)
        try:
            form(x, weights[-1], out, work)  # the one whose turn comes last
        except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch has not got it
            continue
        runs[label] = lambda w, form=form, x=x, out=out: form(x, w, out, work)
    seconds = _best_of_rounds(runs, weights)
    engine_seconds = seconds.pop(ENGINE)
    return FormTimes(
        str(dtype).removeprefix("torch."), rows, seconds, engine_seconds, engine_form(multiplied, weights[-1])
    )


def _best_of_rounds(runs: dict[str, Callable[[Tensor], None]], weights: Tensor) -> dict[str, float]:
    best, order, next_weight = dict.fromkeys(runs, math.inf), random.Random(0), cycle(weights)
    for _ in range(ROUNDS):
        for label in order.sample(list(runs), len(runs)):  # in no order, since each leaves its own things in the cache
            weight = next(next_weight)
            start = time.perf_counter()
            runs[label](weight)
            best[label] = min(best[label], time.perf_counter() - start)
    return best
