"""Expert weights in the spelling that Hugging Face writes to disk: one key per expert and matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.config import MoEConfig


def split_experts(state_dict: Mapping[str, Tensor], config: MoEConfig, prefix: str = "experts.") -> dict[str, Tensor]:
    """The state dict with `{prefix}7.gate_proj.weight`, ... in place of the fused keys; the inverse of `fuse_experts`.

    `prefix` is where the experts lie: "experts." in a layer, "model.layers.3.mlp.experts." in a model. All other keys
    stay. Every tensor of an expert is a copy, so that the result can be written with safetensors. Raises ValueError
    where a fused key is missing or has not one matrix per expert.
    """
    out: dict[str, Any] = dict(state_dict)
    up_name = "gate_up_proj" if config.gated else "up_proj"
    for suffix in ("", "_bias") if config.expert_bias else ("",):
        up = _take(out, prefix + up_name + suffix, config)
        down = _take(out, prefix + "down_proj" + suffix, config)
        if config.transposed and not suffix:
            up, down = up.mT, down.mT
        parts = {"down_proj": down}
        if not config.gated:
            parts["up_proj"] = up
        elif config.interleaved:
            parts["gate_proj"], parts["up_proj"] = up[:, ::2], up[:, 1::2]
        else:
            parts["gate_proj"], parts["up_proj"] = up.chunk(2, dim=1)
        kind = "bias" if suffix else "weight"
        for name, stack in parts.items():
            for expert, matrix in enumerate(stack):
                out[f"{prefix}{expert}.{name}.{kind}"] = matrix.clone(memory_format=torch.contiguous_format)
    return out


def _take(state_dict: dict[str, Any], key: str, config: MoEConfig) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"{key} is not in the state dict: give the fused one, or another prefix")
    stack = state_dict.pop(key)
    if len(stack) != config.n_routed_experts:
        raise ValueError(
            f"{key} holds {len(stack)} experts and n_routed_experts={config.n_routed_experts}: they differ"
        )
    return stack
