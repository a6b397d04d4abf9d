"""What a question about another rule asks for: the changed config, the biases, the groups; each is checked."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.trace.store import Trace

Bias = bool | Tensor | Mapping[int, float] | None  # False = none, {expert: delta}, None = as recorded


def changed(
    config: MoEConfig,
    k: int | None,
    n_group: int | None,
    topk_group: int | None,
    group_score: str | None,
    group_mask: str | None,
    gets_bias: bool,
) -> MoEConfig:
    """The config with the changed rule; MoEConfig refuses what cannot be routed."""
    groups = {"n_group": n_group, "topk_group": topk_group, "group_score": group_score, "group_mask": group_mask}
    fields: dict[str, Any] = {name: value for name, value in groups.items() if value is not None}
    if n_group == 1:
        fields.setdefault("topk_group", 1)
    if config.topk_method == "greedy":  # it ignores groups: now it gets some, or goes on without
        wanted = n_group or (config.n_group if topk_group is not None else 1)
        if wanted > 1:
            fields |= {"topk_method": "group_limited_greedy", "n_group": wanted}
        elif gets_bias:
            fields.setdefault("n_group", 1)
            fields.setdefault("topk_group", 1)
    if k is not None:
        fields["num_experts_per_tok"] = k
    if gets_bias:
        fields.setdefault("group_score", config.group_score_rule)
        fields["topk_method"] = "noaux_tc"
    return replace(config, **fields)


def dropped(trace: Trace, drop_experts: Iterable[int]) -> list[int]:
    """The experts to leave out, in order, each once."""
    experts = sorted({int(expert) for expert in drop_experts})
    _check_experts(experts, trace.n_experts)
    return experts


def _check_experts(experts: Iterable[int], n_experts: int) -> None:
    if wrong := [expert for expert in experts if not 0 <= expert < n_experts]:
        raise ValueError(f"expert {wrong[0]} is not there: use 0 to {n_experts - 1}")


def biases(trace: Trace, bias: Bias, dropped: list[int]) -> Tensor | None:
    """The bias of every layer, [L, E], minus infinity for a dropped expert; None where there is none of either."""
    shape = (trace.n_layers, trace.n_experts)
    out, zeros = trace.bias, torch.zeros(shape, dtype=torch.float32, device="cpu")
    if isinstance(bias, Tensor):
        if bias.shape not in (shape, shape[1:]):
            raise ValueError(f"bias has shape {list(bias.shape)}: give [E] = [{shape[1]}] or [L, E] = {list(shape)}")
        out = bias.detach().cpu().float().expand(shape)
    elif isinstance(bias, Mapping):
        _check_experts(bias, trace.n_experts)
        out = zeros if out is None else out.clone()
        for expert, delta in bias.items():
            if not (shift := torch.tensor(float(delta), dtype=torch.float32, device="cpu")).isfinite():
                raise ValueError(
                    f"bias={{{expert}: {delta}}} is not finite: give a number, or drop_experts (--drop) for an expert "
                    "that is never chosen"
                )
            out[:, expert] += shift
    elif bias is False:
        if out is None:
            raise ValueError("this trace has no correction bias to leave out")
        out = zeros
    elif bias is not None:
        raise ValueError(f"bias={bias!r} is not understood: use False, a tensor [E] or [L, E], or {{expert: delta}}")
    if out is not None and (out.isnan() | out.isposinf()).any():
        raise ValueError("bias holds NaN or infinity: give numbers, or -inf for an expert that is never chosen")
    if dropped:
        out = (zeros if out is None else out).index_fill(-1, torch.tensor(dropped, device="cpu"), -torch.inf)
    return out


def groups(before: MoEConfig, after: MoEConfig) -> np.ndarray | None:
    """The group of every expert, [E], by the recorded rule, or by the new one where that alone has groups."""
    grouped = next((config for config in (before, after) if config.limits_groups), None)
    return None if grouped is None else np.arange(before.n_routed_experts) // grouped.experts_per_group


def plain_bias(bias: Bias) -> Any:
    """The bias that was asked for, as JSON has it."""
    if isinstance(bias, Tensor):
        return bias.tolist()
    return {str(expert): float(delta) for expert, delta in bias.items()} if isinstance(bias, Mapping) else bias
