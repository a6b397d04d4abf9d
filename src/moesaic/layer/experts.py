"""Experts: stacked weights of all routed experts; (tokens, expert_ids, weights) -> weighted sum per token."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.config import MoEConfig, check_is_config
from moesaic.engine.select import check_engine, select_engine
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights

# gated or not -> the matrices of one expert as they are called on disk: gate, up, down; w1, w3, w2 are Mixtral's
SPELLINGS = {True: (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")), False: (("up_proj", "down_proj"),)}


class Experts(nn.Module):
    """E expert MLPs in Hugging Face's fused layout: `gate_up_proj` [E, 2I, D] (`up_proj` [E, I, D] where not gated)
    and `down_proj` [E, O, I]; with biases `..._proj_bias`; [E, in, out] where the config says transposed.

    `engine` names how they are computed; "auto" takes what serves the device and dtype best (`moesaic doctor`).
    `batch_invariant`: a token's result in forward does not depend on the tokens beside it, bit for bit. `recompute`:
    training keeps no up projection for the backward and computes it again.

    `load_state_dict` also takes the per-expert spellings found on disk, `7.gate_proj.weight` and Mixtral's
    `7.w1.weight`: all experts or none.
    """

    # told the ids and weights of every call, and gives back the ids to use; put there by trace.watch
    watcher: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        config: MoEConfig,
        *,
        engine: str = "auto",
        batch_invariant: bool = False,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_is_config(config)
        if config.moe_intermediate_size is None:
            raise ValueError("moe_intermediate_size=None makes a gate without experts: give the width of an expert")
        self.config = config
        self.engine = check_engine(engine, batch_invariant=batch_invariant, recompute=recompute)
        self.batch_invariant, self.recompute = batch_invariant, recompute
        self.watcher = None  # on the instance, where a compiled graph looks whether it is still so
        self.spec = ExpertSpec.of(config)
        n, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        u, o = (2 * i if config.gated else i), config.output_size or d

        def weights(rows: int, columns: int) -> nn.Parameter:
            shape = (n, columns, rows) if config.transposed else (n, rows, columns)
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def biases(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(n, rows, device=device, dtype=dtype)) if config.expert_bias else None

        self._up_name = "gate_up_proj" if config.gated else "up_proj"
        self.register_parameter(self._up_name, weights(u, d))
        self.down_proj = weights(o, i)
        self.register_parameter(self._up_name + "_bias", biases(u))
        self.down_proj_bias = biases(o)
        self.register_load_state_dict_pre_hook(_fuse_on_load)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(fan in), as nn.Linear."""
        up, down, up_bias, down_bias = self.weights
        for weight, bias in ((up, up_bias), (down, down_bias)):
            bound = 1 / math.sqrt(weight.shape[-2 if self.spec.transposed else -1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @property
    def weights(self) -> ExpertWeights:
        up = self._up_name
        return ExpertWeights(getattr(self, up), self.down_proj, getattr(self, up + "_bias"), self.down_proj_bias)

    def forward(
        self, tokens: Float[Tensor, "T D"], expert_ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
    ) -> Float[Tensor, "T O"]:
        """Weighted sum of the chosen experts per token. The id E is skipped, its weight ignored."""
        if (watcher := self.watcher) is not None:  # read once: a record in another thread may end meanwhile
            expert_ids = watcher(self, expert_ids, weights)
        engine = select_engine(
            self.engine,
            tokens.device,
            tokens.dtype,
            batch_invariant=self.batch_invariant,
            recompute=self.recompute,
        )
        return engine(tokens, expert_ids, weights, self.weights, self.spec)

    def extra_repr(self) -> str:
        c = self.config
        width = f"{c.hidden_size} -> {c.moe_intermediate_size} -> {c.output_size or c.hidden_size}"
        return f"{c.n_routed_experts} x ({width}), {c.hidden_act}{', gated' if c.gated else ''}, engine={self.engine!r}"


def _fuse_on_load(module: Experts, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    fuse_experts(state_dict, prefix, module.config)


def fuse_experts(state_dict: dict[str, Any], prefix: str, config: MoEConfig) -> None:
    """Replace the keys of single experts, `{prefix}7.gate_proj.weight` or `{prefix}7.w1.weight`, by the fused ones, in
    place; a state dict that is fused stays.

    Where an expert or one of its matrices is missing, or a fused key is there as well, the per-expert keys stay and
    strict loading names them.
    """
    kinds = ("weight", "bias") if config.expert_bias else ("weight",)
    for names in SPELLINGS[config.gated]:
        wanted = [f"{prefix}{e}.{n}.{k}" for n in names for k in kinds for e in range(config.n_routed_experts)]
        if all(key in state_dict for key in wanted):
            break
    else:
        return
    up_name = prefix + ("gate_up_proj" if config.gated else "up_proj")
    fused_names = [name + suffix for name in (up_name, f"{prefix}down_proj") for suffix in ("", "_bias")]
    if any(name in state_dict for name in fused_names):
        return
    for kind in kinds:
        stacks = {
            name: torch.stack([state_dict.pop(f"{prefix}{e}.{name}.{kind}") for e in range(config.n_routed_experts)])
            for name in names
        }
        up, down = [stacks[name] for name in names[:-1]], stacks[names[-1]]
        interleaved = config.gated and config.interleaved
        fused = torch.stack(up, dim=2).flatten(1, 2) if interleaved else torch.cat(up, dim=1)
        if kind == "weight" and config.transposed:
            fused, down = fused.mT.contiguous(), down.mT.contiguous()
        suffix = "" if kind == "weight" else "_bias"
        state_dict[up_name + suffix] = fused
        state_dict[f"{prefix}down_proj{suffix}"] = down
