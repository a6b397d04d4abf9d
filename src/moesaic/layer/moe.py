"""The MoE layer: MoE (classic and general), and DeepseekV3MoE, its name where it is DeepSeek-V3's."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.engine.spec import ACTIVATIONS
from moesaic.families import PART_ALIASES
from moesaic.layer.experts import Experts
from moesaic.layer.router import Router


class MoE(nn.Module):
    """Routed experts behind a gate, and shared experts where the config has them.

    Tensor in, tensor out, for training and inference; no token is ever dropped. State-dict keys are those of
    transformers' DeepseekV3MoE; `load_state_dict` also takes gpt-oss's `router` and Qwen2-MoE's `shared_expert` and
    `shared_expert_gate`.
    """

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
        self.config = config
        self.gate = Router(config, device=device, dtype=dtype)
        self.experts = Experts(
            config, engine=engine, batch_invariant=batch_invariant, recompute=recompute, device=device, dtype=dtype
        )
        self.shared_experts = SharedExperts(config, device=device, dtype=dtype) if config.n_shared_experts else None
        self.register_load_state_dict_pre_hook(_rename_on_load)

    @classmethod
    def classic(
        cls,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_experts: int,
        k: int,
        *,
        activation: str = "relu",
        bias: bool = False,
        **options: Any,
    ) -> "MoE":
        """The classic MoE: top-k on the logits, softmax over the k kept, experts of two plain layers.

        `output_dim` may differ from `input_dim`. options: those of MoE.
        """
        config = MoEConfig.preset(
            "classic",
            hidden_size=input_dim,
            moe_intermediate_size=hidden_dim,
            output_size=output_dim,
            n_routed_experts=num_experts,
            num_experts_per_tok=k,
            hidden_act=activation,
            expert_bias=bias,
        )
        return cls(config, **options)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        routing = self.gate(tokens)
        out = self.experts(tokens, routing.expert_ids, routing.weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.reshape(*x.shape[:-1], out.shape[-1])  # output width may differ from D

    def num_parameters(self, *, active: bool = False) -> int:
        """Parameters of the layer; with `active`, those that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        routed = sum(p.numel() for p in self.experts.parameters())
        return total - routed + routed // self.config.n_routed_experts * self.config.num_experts_per_tok

    def extra_repr(self) -> str:
        return f"parameters={self.num_parameters():,}, active={self.num_parameters(active=True):,}"


class DeepseekV3MoE(MoE):
    """DeepSeek-V3's layer (arXiv 2412.19437, eq. 12): routed experts plus shared experts that see every token.

    N_s shared experts are one MLP of N_s times the width; `n_shared_experts=0` has none. With `shared_expert_gate`
    their output is scaled by sigmoid(w·x), as in Qwen2-MoE.
    """


class SharedExperts(nn.Module):
    """The experts that every token visits, as one gated MLP [D -> N_s*I -> O]."""

    def __init__(self, config: MoEConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        hidden, width, out = config.hidden_size, config.shared_width, config.output_size or config.hidden_size
        self.gate_proj = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, out, bias=False, device=device, dtype=dtype)
        self.gate = nn.Linear(hidden, 1, bias=False, device=device, dtype=dtype) if config.shared_expert_gate else None
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        out = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out if self.gate is None else F.sigmoid(self.gate(x)) * out


def _rename_on_load(layer: MoE, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the parts that the layer has by the names of other families too. A name of ours that is there stays, and
    strict loading names the other."""
    parts = dict(layer.named_modules())
    for theirs, ours in PART_ALIASES.items():
        if theirs in parts or ours not in parts:
            continue
        for key in [key for key in state_dict if key.startswith(f"{prefix}{theirs}.")]:
            name = f"{prefix}{ours}." + key.removeprefix(f"{prefix}{theirs}.")
            if name not in state_dict:
                state_dict[name] = state_dict.pop(key)
