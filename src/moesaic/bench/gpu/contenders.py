"""Who competes on a GPU: our engines, and peers, by name. In a smoke run the kernels are interpreted on the CPU."""

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.bench.contenders import PEERS, Call, Contender, our_engine
from moesaic.bench.gpu.cells import GROUPED, INVARIANT, LIGER, OURS
from moesaic.bench.problem import Problem
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.engine.op import Gradients
from moesaic.engine.select import ENGINES
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


def contenders_named(names: tuple[str, ...]) -> list[Contender]:
    """In that order."""
    return [CONTENDERS[name] for name in names]


class Interpreted(torch.autograd.Function):
    """The GPU engine's forward and backward on CPU tensors, where Triton runs them on numpy; the operator would take
    the CPU engine there."""

    @staticmethod
    def forward(
        ctx: Any, spec: ExpertSpec, options: dict, tokens: Tensor, ids: Tensor, weights: Tensor, *experts: Any
    ) -> Tensor:
        from moesaic.engine.triton.experts import forward

        out, *saved = forward(tokens, ids, weights, ExpertWeights(*experts), spec, **options)
        ctx.spec = spec
        ctx.save_for_backward(tokens, weights, *experts, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        from moesaic.engine.triton.experts import backward

        tokens, weights, *matrices, hidden, assignments, counts = ctx.saved_tensors
        experts = ExpertWeights(*matrices)
        wanted = Gradients(*(t is not None for t in (tokens, weights, *experts)))
        grads = backward(grad_out, tokens, weights, experts, hidden, assignments, counts, ctx.spec, wanted)
        return None, None, grads.tokens, None, *grads[1:]


def _triton(problem: Problem, *, invariant: bool) -> Call:
    experts, spec = problem.experts, problem.spec
    if problem.tokens.is_cuda:
        engine = partial(ENGINES["triton"], batch_invariant=invariant)
        return lambda tokens, ids, weights: engine(tokens, ids, weights, experts, spec)

    def interpreted(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        options = {"keep": "hidden" if torch.is_grad_enabled() else "nothing", "batch_invariant": invariant}
        return Interpreted.apply(spec, options, tokens, ids, weights, *experts)

    return interpreted


def _liger(problem: Problem) -> Call:
    """Liger's fused experts. It searches for tiles at its first call of a shape, which is in `build_ms` and no time."""
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    up, down = problem.experts.up, problem.experts.down
    return lambda tokens, ids, weights: function.apply(tokens, up, down, ids.int(), weights)


def _no_liger(cell: Cell) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install --no-deps liger-kernel==0.8.5"
    return "no biases, no clamped activation" if SHAPES[cell.shape].config().expert_bias else None


CONTENDERS = {
    OURS: Contender(OURS, "ours", partial(_triton, invariant=False)),
    INVARIANT: Contender(INVARIANT, "variant", partial(_triton, invariant=True)),
    GROUPED: Contender(GROUPED, "variant", our_engine("grouped").build),
    **{peer.name: peer for peer in PEERS.values()},
    LIGER: Contender(LIGER, "peer", _liger, _no_liger),
}
