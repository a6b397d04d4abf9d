"""The router of a layer against transformers': selection alone, all of it, and its share of the layer."""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.bench.contenders import our_engines
from moesaic.bench.problem import make_problem
from moesaic.bench.runner import Result, Row
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.bench.timing import MANY, Entrant, interleave
from moesaic.config import MoEConfig
from moesaic.layer.router import Router
from moesaic.rules import route
from moesaic.types import ExpertWeights

FAMILY = "deepseek_v3"
EXPERTS = "ours: experts"
SAME = 1e-5  # of weights, relative
MAY_DIFFER = 0.002  # of the rows: where the k-th and the next biased score (almost) tie either may be taken


def refuses_router(cell: Cell) -> str:
    """Why a router cell is not measured, or nothing."""
    return "" if SHAPES[cell.shape].family == FAMILY else f"routers are compared for {FAMILY} shapes only"


def run_router_cell(cell: Cell, experts: ExpertWeights, engine: str, *, rounds: int) -> Result:
    """Rows: selection (logits to ids and weights) and the whole router, ours and transformers'; and our experts."""
    start = time.perf_counter()
    problem = make_problem(cell, experts)
    tokens = problem.tokens.detach()
    ours = _our_router(problem.config, tokens.dtype)
    theirs = Theirs(ours)
    call = our_engines([engine], cell.dtype)[0].build(problem)
    with torch.no_grad(), theirs.answering():
        logits = ours(tokens).logits
        assert logits is not None
        runs: dict[str, Callable[[], Any]] = {
            "ours: selection": lambda: route(logits, ours.e_score_correction_bias, problem.config),
            "transformers selection": lambda: theirs.selection(logits),
            "ours: router": lambda: ours(tokens),
            "transformers router": lambda: theirs.router(tokens),
            EXPERTS: lambda: call(tokens, problem.expert_ids, problem.weights.detach()),
        }
        result = Result(cell, [Row(name, "ours" if "ours" in name else "peer") for name in runs])
        n_experts = problem.config.n_routed_experts
        error = max(
            rows_that_differ(runs[f"ours: {what}"]()[1:], runs[f"transformers {what}"]()[1:], n_experts)
            for what in ("selection", "router")
        )
        for row in result.rows:
            row.errors = {} if row.name == EXPERTS else {"rows_that_differ": error}
            row.note = "wrong" if error > MAY_DIFFER else ""
            runs[row.name]()
        planned = {name: rounds if name == EXPERTS else MANY * rounds for name in runs}
        if error <= MAY_DIFFER:
            entrants = [Entrant(name, lambda: None, run) for name, run in runs.items()]
            _fill(result, interleave(entrants, planned))
    result.seconds = time.perf_counter() - start
    return result


def _fill(result: Result, seconds: dict[str, list[float]]) -> None:
    for row in result.rows:
        row.timed(seconds[row.name])
    times = {row.name: row.median_ms for row in result.rows if row.median_ms is not None}
    for what in ("selection", "router"):
        row = result.row(f"ours: {what}")
        assert row is not None
        row.best_peer = f"transformers {what}"
        row.ratio = times[row.best_peer] / times[row.name]
        row.of_layer = times[row.name] / (times["ours: router"] + times[EXPERTS])


class Theirs:
    """transformers' router, and its selection: its own code with its one matmul answered by given logits."""

    def __init__(self, ours: Router) -> None:
        self._source = importlib.import_module(f"transformers.models.{FAMILY}.modeling_{FAMILY}")
        self.router = self._module(ours)
        self._selection = self._module(ours)
        self._selection.weight = nn.Parameter(ours.weight.detach().float())  # or it would be widened in every call
        self._hidden_size = ours.config.hidden_size
        self._logits: Tensor | None = None

    def selection(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._logits = logits
        no_tokens = logits.new_empty(len(logits), 1).expand(-1, self._hidden_size)
        try:
            return self._selection(no_tokens)
        finally:
            self._logits = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While this is entered `selection` works."""
        with mock.patch.object(self._source, "F", SimpleNamespace(linear=self._linear)):
            yield

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if self._logits is None else self._logits

    def _module(self, ours: Router) -> nn.Module:
        import transformers

        names = ("hidden_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob")
        fields = {name: getattr(ours.config, name) for name in (*names, "routed_scaling_factor")}
        module = self._source.DeepseekV3TopkRouter(transformers.DeepseekV3Config(**fields)).eval()
        module.weight, module.e_score_correction_bias = ours.weight, ours.e_score_correction_bias
        return module


def _our_router(config: MoEConfig, dtype: torch.dtype) -> Router:
    """With a bias that matters."""
    router = Router(config, dtype=dtype).eval()
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return router


def rows_that_differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], n_experts: int) -> float:
    """Share of rows whose weights, laid out by expert, are not the same. Each is (weights, expert_ids)."""

    def dense(weights: Tensor, ids: Tensor) -> Tensor:
        return weights.new_zeros(len(ids), n_experts, dtype=torch.float64).scatter(1, ids, weights.double())

    truth = dense(*expected)
    same = (dense(*found) - truth).abs().amax(1) <= SAME * truth.amax(1)  # not where there is a NaN
    return float((~same).double().mean())
