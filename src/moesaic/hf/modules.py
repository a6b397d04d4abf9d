"""Where the MoE layers of a model are: Hugging Face 5.x models, our own layers, and bare gates, found by one rule."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.config import MoEConfig
from moesaic.layer.router import Router

ROUTER_NAMES = ("gate", "router")  # what families call the router beside their `experts`


class MoELayer(NamedTuple):
    """One MoE layer inside a model.

    name: path of the block in the model ("" where the model itself is the block).
    router: returns (logits, weights, expert_ids).  experts: takes (tokens, expert_ids, weights); None for a bare gate.
    """

    name: str
    router: nn.Module
    experts: nn.Module | None
    config: MoEConfig


def moe_layers(model: nn.Module, config: MoEConfig | None = None) -> list[MoELayer]:
    """The MoE layers of `model` in forward order.

    A bare Router is a layer without experts. `config` stands in for families whose config.json does not say how they
    route. Raises ValueError where there is no such layer.
    """
    if isinstance(model, Router):
        return [MoELayer("gate", model, None, model.config)]
    layers = [
        MoELayer(name, router, experts, config or _config_of(model.get_submodule(name), model))
        for name, router, experts in routed_blocks(model)
    ]
    if not layers:
        raise ValueError(
            f"not an MoE model: {type(model).__name__} has no module with a gate and fused experts: "
            "give a transformers>=5 MoE model or a moesaic layer"
        )
    return layers


def routed_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, router, experts) of every block that holds `experts` that are one module (fused weights, as all of
    transformers 5) beside a `gate` or `router`, in forward order."""
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        router = next((r for n in ROUTER_NAMES if isinstance(r := getattr(block, n, None), nn.Module)), None)
        if router is not None and isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
            yield name, router, experts


def correction_bias(router: nn.Module) -> torch.Tensor | None:
    """The selection bias of a router, [E], where it has one."""
    return getattr(router, "e_score_correction_bias", None)


def is_router(module: nn.Module) -> bool:
    """A router holds one [E, D] weight itself; an experts module holds stacks of matrices, [E, ., .]."""
    weight = getattr(module, "weight", None)
    return isinstance(module, Router) or (isinstance(weight, torch.Tensor) and weight.dim() == 2)


def is_recompute() -> bool:
    """True inside the second forward of activation checkpointing, which runs within a backward.

    The forward ran before and was seen then: whoever counts must not count it twice.
    """
    return torch._C._current_graph_task_id() >= 0


def _config_of(block: nn.Module, model: Any) -> MoEConfig:
    """Ours where the block is ours; else read from the nearest Hugging Face config."""
    for owner in (block, getattr(block, "experts", None), model):
        config = getattr(owner, "config", None)
        if isinstance(config, MoEConfig):
            return config
        if config is not None:
            return MoEConfig.from_hf(config)
    raise ValueError(f"{type(block).__name__} has no config: give moe_layers(model, config=MoEConfig(...))")
