"""Router: hidden states -> Routing. The gate of an MoE layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.config import MoEConfig, check_is_config
from moesaic.engine.checks import autocasts
from moesaic.engine.route_op import run_route
from moesaic.layer.balance import expert_load
from moesaic.rules import route
from moesaic.types import Routing

FLOAT32_BUFFERS = ("e_score_correction_bias", "load")


class Router(nn.Module):
    """One row of `weight` [E, D] is one expert's preference; `route` turns the logits into a decision.

    `e_score_correction_bias` [E] exists where `topk_method` is "noaux_tc". It is a float32 buffer that no cast of the
    module touches: bfloat16 keeps 8 bits, so 5.0001 would become 5.0 and steps of 1e-3 would vanish.
    Keys of the state dict are those of transformers' `DeepseekV3TopkRouter`.

    `load` [E] counts the assignments of the last forward in training mode, float32, not saved. Over several
    micro-batches add it up outside, as BiasBalance does. (torch.func transforms refuse to write it: use eval mode.)
    """

    e_score_correction_bias: Tensor | None
    load: Tensor

    def __init__(self, config: MoEConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_is_config(config)
        self.config = config
        n_experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(n_experts, config.hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_experts, device=device, dtype=dtype)) if config.router_bias else None
        correction = torch.empty(n_experts, device=device, dtype=torch.float32) if config.has_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.register_buffer("load", torch.empty(n_experts, device=device, dtype=torch.float32), persistent=False)
        self.register_load_state_dict_pre_hook(_before_load)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in ±1/sqrt(D), as the article's gate; biases and load zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        for zero in (self.bias, self.e_score_correction_bias, self.load):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        *,
        replay: Int[Tensor, "..."] | None = None,
    ) -> Routing:
        """Route every token of `x`; the Routing is flat, [T, ...], batch-major.

        `replay` [T, K] forces the experts and leaves the weights to the live logits; hash routing, whose experts are
        fixed for each id of the vocabulary, is `replay=table[token_ids]`.
        """
        if x.shape[-1] != self.config.hidden_size:  # before a matmul says it in terms of matrices
            raise ValueError(
                f"x has width {x.shape[-1]} and hidden_size={self.config.hidden_size}: "
                f"give [..., {self.config.hidden_size}], or another hidden_size"
            )
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        if self.training and self.config.router_jitter_noise:
            tokens = jitter(tokens, self.config.router_jitter_noise)
        logits = self._logits(tokens)
        routing = (run_route if logits.is_cuda else route)(
            logits,
            self.e_score_correction_bias,
            self.config,
            replay=replay,
        )
        if self.training:
            # overwrite, never add: the recomputation of activation checkpointing runs this again
            self.load.copy_(expert_load(routing.expert_ids, self.config.n_routed_experts))
        if self.config.weights_dtype == "model":
            # not by _replace, whose result dynamo of torch 2.11 cannot return
            routing = Routing(routing.logits, routing.weights.to(x.dtype), routing.expert_ids)
        return routing

    def _logits(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        weight, bias = self.weight, self.bias
        if self.config.router_dtype == "float32":  # promoted rather than cast, so that float64 stays exact
            wide = torch.promote_types(tokens.dtype, torch.float32)
            tokens, weight, bias = tokens.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
            if autocasts(tokens):  # asking takes 0.5 us, the context 5
                with torch.autocast(tokens.device.type, enabled=False):
                    return F.linear(tokens, weight, bias)
        return F.linear(tokens, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Let casts and moves reach everything but the values and dtype of the float32 buffers: those only move."""
        before = {name: buffer for name in FLOAT32_BUFFERS if (buffer := self._buffers[name]) is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            device = self.get_buffer(name).device
            born = value.is_meta and device.type != "meta"  # there never was a value
            self._buffers[name] = torch.zeros_like(value, device=device) if born else value.to(device)
        return self

    def extra_repr(self) -> str:
        c = self.config
        groups = f", groups={c.n_group} (keep {c.topk_group})" if c.limits_groups else ""
        sizes = f"{c.hidden_size} -> top {c.num_experts_per_tok} of {c.n_routed_experts}"
        return f"{sizes}{groups}, {c.scoring_func}, {c.topk_method}"


def _before_load(router: Router, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the bias from a checkpoint of any dtype, also under `assign=True`, and keep it float32.

    `load`, which no checkpoint has, goes where the weight comes from: under `assign=True` it would stay on meta.
    """
    weight = state_dict.get(prefix + "weight")
    if router.load.is_meta and weight is not None and not weight.is_meta:
        router.load = torch.zeros_like(router.load, device=weight.device)
    key = prefix + "e_score_correction_bias"
    if key in state_dict:
        state_dict[key] = state_dict[key].detach().to(torch.float32)


def jitter(tokens: Float[Tensor, "T D"], noise: float) -> Float[Tensor, "T D"]:
    """Input jitter of Switch Transformers (arXiv 2101.03961): each value times U(1 ± noise), in a new tensor."""
    return tokens * torch.empty_like(tokens).uniform_(1.0 - noise, 1.0 + noise)
