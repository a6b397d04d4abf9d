"""Routing as one opaque operator, `moesaic::route`, for devices that have a kernel for it.

Its kernel is imported when it first runs: nothing of Triton is needed to import this.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.engine import triton as gpu
from moesaic.engine.surroundings import is_transformed
from moesaic.types import Routing


class RouteSpec(NamedTuple):
    """What a routing kernel knows of a config, in the order in which an operator takes it; names as in MoEConfig.

    n_group is 1 where groups do not limit the choice. counted: how many scores of a group make its own.
    """

    k: int
    scoring_func: str
    score_after_topk: bool
    n_group: int
    topk_group: int
    counted: int
    zero_mask: bool
    norm: bool
    eps: float
    scale: float

    @classmethod
    def of(cls, config: MoEConfig) -> "RouteSpec":
        limited = config.limits_groups
        return cls(
            k=config.num_experts_per_tok,
            scoring_func=config.scoring_func,
            score_after_topk=config.score_after_topk,
            n_group=config.n_group if limited else 1,
            topk_group=config.topk_group if limited else 1,
            counted=config.scores_of_group if limited else 1,
            zero_mask=config.group_mask == "zero",
            norm=config.normalises,
            eps=config.norm_eps,
            scale=config.routed_scaling_factor,
        )

    def config(self, n_experts: int) -> MoEConfig:
        """A config that weighs by these rules, for `rules.route` with given ids."""
        return MoEConfig(
            hidden_size=1,
            n_routed_experts=n_experts,
            num_experts_per_tok=self.k,
            scoring_func=self.scoring_func,
            score_after_topk=self.score_after_topk,
            norm_topk_prob=self.norm,
            norm_eps=self.eps,
            routed_scaling_factor=self.scale,
        )


_SPEC = (
    "int k, str scoring_func, bool score_after_topk, int n_group, int topk_group, int counted, bool zero_mask,"
    " bool norm, float eps, float scale"
)
torch.library.define(
    "moesaic::route", f"(Tensor logits, Tensor? bias, Tensor? replay, {_SPEC}) -> (Tensor weights, Tensor expert_ids)"
)
torch.library.define(
    "moesaic::route_backward", f"(Tensor grad_weights, Tensor logits, Tensor expert_ids, {_SPEC}) -> Tensor"
)


def run_route(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, " E"] | None,
    config: MoEConfig,
    *,
    replay: Int[Tensor, "..."] | None = None,
) -> Routing:
    """`rules.route` by the operator where that serves, else by `rules.route` itself."""
    if not serves(logits, bias, config, replay):
        return rules.route(logits, bias, config, replay=replay)
    weights, expert_ids = torch.ops.moesaic.route(logits, bias, replay, *RouteSpec.of(config))
    return Routing(logits, weights, expert_ids)


def serves(logits: Tensor, bias: Tensor | None, config: MoEConfig, replay: Tensor | None) -> bool:
    """Whether the operator computes this; decided without a look at values, so a graph may hold the decision.

    It scores in float32 and knows no forced balance, no tensor subclass and no transform of torch.func. What is refused
    is left to `rules.route`, which says so in words.
    """
    widened = config.score_dtype == "float32" and logits.dtype in (torch.bfloat16, torch.float16)
    return (
        not gpu.why_not("cuda", index=logits.device.index)
        and (widened or logits.dtype == torch.float32)
        and (bias is None or _fits_bias(bias, logits))
        and (replay is None or _fits(replay, logits, config.num_experts_per_tok))
        and config.topk_method not in ("balanced", "unknown")
        and type(logits) is Tensor
        and not is_transformed()
    )


def _fits_bias(bias: Tensor, logits: Tensor) -> bool:
    return bias.shape == logits.shape[1:] and bias.device == logits.device and bias.dtype != torch.float64


def _fits(replay: Tensor, logits: Tensor, k: int) -> bool:
    return replay.shape == (logits.shape[0], k) and replay.device == logits.device


def _route_cuda(logits: Tensor, bias: Tensor | None, replay: Tensor | None, *spec: Any) -> tuple[Tensor, Tensor]:
    from moesaic.engine.triton.route import forward

    return forward(logits, bias, replay, RouteSpec(*spec))


def _route_backward_cuda(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, *spec: Any) -> Tensor:
    from moesaic.engine.triton.route import backward

    return backward(grad_weights, logits, expert_ids, RouteSpec(*spec))


def _fake_route(logits: Tensor, bias: Tensor | None, replay: Tensor | None, *spec: Any) -> tuple[Tensor, Tensor]:
    del bias, replay
    shape = logits.shape[0], RouteSpec(*spec).k
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _fake_route_backward(grad_weights: Tensor, logits: Tensor, *_: Any) -> Tensor:
    del grad_weights
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _bias, _replay, *spec = inputs
    _weights, expert_ids = output
    ctx.spec = RouteSpec(*spec)
    ctx.save_for_backward(logits, expert_ids)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_weights: Tensor | None, _grad_ids: None) -> tuple[Tensor | None, ...]:
    logits, expert_ids = ctx.saved_tensors
    grad = None
    if grad_weights is not None:
        if torch.is_grad_enabled():  # create_graph: the gradient is to have a gradient, so plain torch operations
            grad = _differentiable_backward(grad_weights, logits, expert_ids, ctx.spec)
        else:
            grad = torch.ops.moesaic.route_backward(grad_weights, logits, expert_ids, *ctx.spec)
    return (grad,) + (None,) * (2 + len(ctx.spec))


def _differentiable_backward(grad_weights: Tensor, logits: Tensor, expert_ids: Tensor, spec: RouteSpec) -> Tensor:
    logits = logits.view_as(logits)  # so that hooks on the logits themselves run once, later
    weights = rules.route(logits, None, spec.config(logits.shape[1]), replay=expert_ids).weights
    return torch.autograd.grad(weights, logits, grad_weights, create_graph=True)[0]


torch.library.impl("moesaic::route", "CUDA", _route_cuda)
torch.library.impl("moesaic::route_backward", "CUDA", _route_backward_cuda)
torch.library.register_fake("moesaic::route", _fake_route)
torch.library.register_fake("moesaic::route_backward", _fake_route_backward)
torch.library.register_autograd("moesaic::route", _backward, setup_context=_setup_context)
