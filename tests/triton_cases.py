"""Inputs for kernels, on a GPU where there is one, else on the CPU, where Triton interprets them with numpy (slowly:
some 4 ms for every 16 x 16 x 16 step, so sizes stay small)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moesaic.engine.op import ACCUMULATING, FORWARD, kernels
from moesaic.engine.plan import group_by_expert
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.triton import twins
from moesaic.engine.triton.blocks import Blocks
from moesaic.engine.triton.layout import Layout
from moesaic.types import ExpertWeights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = Blocks(16, 16, 16)
GPT_OSS = ExpertSpec(limit=0.6, alpha=1.702, up_offset=1.0, interleaved=True, transposed=True)
SPECS = {
    "silu": (ExpertSpec(), False),
    "gpt-oss": (GPT_OSS, True),
    "biases": (ExpertSpec("gelu_pytorch_tanh"), True),
    "transposed": (ExpertSpec("gelu", transposed=True), False),
    "not-gated": (ExpertSpec("relu2", gated=False), True),
    "relu": (ExpertSpec("relu", interleaved=True), False),
    "softcapped": (ExpertSpec(alpha=1.5, up_offset=0.25, gate_softcap=0.7, up_softcap=1.5), False),
}
# how tokens choose among E experts: T x K ids
ROUTINGS = ("spread", "sentinels", "one-expert", "empty-experts", "one-token")


class Problem(NamedTuple):
    tokens: Tensor
    expert_ids: Tensor
    weights: Tensor
    experts: ExpertWeights
    spec: ExpertSpec
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers; ids stay."""
        experts = ExpertWeights(*(None if t is None else t.to(dtype) for t in self.experts))
        return self._replace(
            tokens=self.tokens.to(dtype), weights=self.weights.to(dtype), experts=experts, grad=self.grad.to(dtype)
        )

    @property
    def k(self) -> int:
        return self.expert_ids.shape[1]

    def layout(self, block_rows: int = BLOCKS.rows) -> Layout:
        """By the twins, so that each kernel is judged alone."""
        there = twins.layout(group_by_expert(self.expert_ids.cpu(), len(self.experts.up)), self.k, block_rows)
        return Layout(*(t.to(DEVICE) for t in there))


def problem(
    name: str = "silu", routing: str = "spread", *, t: int = 19, e: int = 5, k: int = 3, d: int = 37, i: int = 21
):
    spec, with_bias = SPECS[name]
    if routing == "one-token":
        t = 1
    ids = choose(routing, t, e, k)
    u, o = (2 * i if spec.gated else i), d + 2

    def matrix(rows: int, columns: int) -> Tensor:
        shape = (e, columns, rows) if spec.transposed else (e, rows, columns)
        return torch.randn(shape, device=DEVICE) / columns**0.5

    experts = ExpertWeights(
        matrix(u, d),
        matrix(o, i),
        torch.randn(e, u, device=DEVICE) if with_bias else None,
        torch.randn(e, o, device=DEVICE) if with_bias else None,
    )
    weights = torch.rand(t, k, device=DEVICE)
    weights[ids >= e] = torch.nan  # nobody may look at the weight of nobody
    return Problem(torch.randn(t, d, device=DEVICE), ids, weights, experts, spec, torch.randn(t, o, device=DEVICE))


def rows_like(p: Problem, width: int) -> Tensor:
    return torch.randn(p.expert_ids.numel(), width, device=DEVICE)


def choose(routing: str, t: int, e: int, k: int) -> Tensor:
    if routing == "one-expert":
        ids = torch.full((t, k), e)
        ids[:, 0] = 3
    elif routing == "empty-experts":
        ids = torch.rand(t, e - 2).argsort(1)[:, :k] + 1  # neither the first nor the last
    elif routing == "sentinels":
        ids = torch.rand(t, e + 2).argsort(1)[:, :k].clamp(max=e)
    else:
        ids = torch.rand(t, e).argsort(1)[:, :k]
    return ids.to(DEVICE)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is full of NaN, and of an id that is no expert's, until somebody writes it."""

    def filled(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else -7)

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest expected value, in the expected shape; NaN only where NaN is expected."""
    assert got.shape == expected.shape
    expected = expected.to(got.device, torch.float64)
    scale = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * max(scale, 1e-30), equal_nan=True)


def written(rows: Tensor, layout: Layout) -> Tensor:
    """The rows that belong to an expert."""
    return rows[: int(layout.ends[-1])]


@contextmanager
def interpreted_operator() -> Iterator[None]:
    """`moesaic::experts` computed by the GPU engine's kernels, on the CPU too."""
    if DEVICE == "cuda":
        yield
        return
    from moesaic.engine.triton import experts

    made = kernels(experts.forward, experts.backward)
    forward, adding = FORWARD["cpu"], ACCUMULATING["cpu"]
    with torch.library._scoped_library("moesaic", "IMPL") as library:
        with warnings.catch_warnings():  # that a kernel is replaced, which is meant
            warnings.simplefilter("ignore")
            library.impl("experts", made.experts, "CPU", allow_override=True)
            library.impl("experts_backward", made.experts_backward, "CPU", allow_override=True)
        FORWARD["cpu"], ACCUMULATING["cpu"] = made.forward, made.accumulating
        try:
            yield
        finally:
            FORWARD["cpu"], ACCUMULATING["cpu"] = forward, adding
