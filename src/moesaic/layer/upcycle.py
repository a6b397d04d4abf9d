"""Upcycling: a dense MLP as the experts of an MoE layer that computes what the MLP did. Pure functions.

Copied whole (arXiv 2212.05055), or cut into slices of its width, every slice an expert (arXiv 2410.07524).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.rules import score, weigh


class DenseMLP(NamedTuple):
    """A dense MLP as `nn.Linear` holds it; without a gate `gate_proj` is None, without biases these are."""

    up_proj: Float[Tensor, "I D"]
    down_proj: Float[Tensor, "O I"]
    gate_proj: Float[Tensor, "I D"] | None = None
    up_bias: Float[Tensor, " I"] | None = None
    down_bias: Float[Tensor, " O"] | None = None
    gate_bias: Float[Tensor, " I"] | None = None


def upcycled(
    mlp: DenseMLP,
    config: MoEConfig,
    *,
    granularity: int = 1,
    router_std: float = 0.02,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The state dict of an `MoE(config)` that computes what `mlp` does, in the per-expert spelling.

    Expert e is slice e % granularity of copy e // granularity. The slices of a copy share one row of the router, drawn
    from N(0, router_std²), so their logits are equal, and the top K = c * granularity are all slices of the c best
    copies: every slice c times. Its weights then add up to S / granularity, S being what all K add up to, and
    `down_proj` is multiplied by granularity / S. All of the factor lies there because the MLP is linear in it and in
    nothing else: split over gate, up and down it would not be exact.

    Equal weights of two copies are no harm where ties go to the lower index, as in `rules.py`: copies lie whole.

    noise: that share of the width of every expert is drawn anew, normal with mean and deviation of its matrix
    (arXiv 2502.19261). Experts differ from the start, and the output is no longer that of `mlp`.

    Raises ValueError for sizes that do not fit, and for a rule whose weights add up to another sum for every token.
    """
    check_upcycling(mlp, config, granularity)
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise} is no share: use a number from 0 to 1")
    if not 0 <= router_std < math.inf:
        raise ValueError(f"router_std={router_std} is no deviation: use 0 or a positive number such as 0.02")
    scale = granularity / weight_sum(config, router_std=router_std)
    copies = config.n_routed_experts // granularity

    def drawn(*shape: int) -> Tensor:  # on the CPU, whatever the device: one seed, one router
        values = torch.empty(shape, device="cpu", dtype=torch.float32).normal_(0.0, router_std, generator=generator)
        return values.repeat_interleave(granularity, dim=0).to(mlp.up_proj)

    state = {"gate.weight": drawn(copies, config.hidden_size)}
    if config.router_bias:
        state["gate.bias"] = drawn(copies).zero_()
    if config.has_correction_bias:
        state["gate.e_score_correction_bias"] = mlp.up_proj.new_zeros(config.n_routed_experts, dtype=torch.float32)
    slices = sliced(mlp, granularity, scale)
    for expert in range(config.n_routed_experts):
        part = slices[expert % granularity]
        if noise:
            part = redrawn(part, noise, generator)
        for name, value in part._asdict().items():
            matrix, kind = name.rsplit("_", 1)
            key = f"{matrix}_proj.bias" if kind == "bias" else f"{name}.weight"
            if value is not None:
                state[f"experts.{expert}.{key}"] = value
    return state


def sliced(mlp: DenseMLP, granularity: int, scale: float = 1.0) -> list[DenseMLP]:
    """The MLP cut along its width: parts whose outputs add up to `scale` times its own. Up projections are views."""
    width = mlp.up_proj.shape[0] // granularity
    down = mlp.down_proj if scale == 1.0 else mlp.down_proj * scale
    down_bias = None if mlp.down_bias is None else mlp.down_bias * (scale / granularity)

    def rows(value: Tensor | None, at: int) -> Tensor | None:
        return None if value is None else value[at : at + width]

    return [
        DenseMLP(
            mlp.up_proj[at : at + width],
            down[:, at : at + width],
            rows(mlp.gate_proj, at),
            rows(mlp.up_bias, at),
            down_bias,
            rows(mlp.gate_bias, at),
        )
        for at in range(0, mlp.up_proj.shape[0], width)
    ]


def redrawn(mlp: DenseMLP, share: float, generator: torch.Generator | None = None) -> DenseMLP:
    """A copy with this share of its inner units drawn anew: their rows of up and gate, their columns of down."""
    width = mlp.up_proj.shape[0]
    units = torch.randperm(width, generator=generator, device="cpu")[: round(share * width)].to(mlp.up_proj.device)

    def anew(matrix: Tensor, dim: int) -> Tensor:
        shape = [*matrix.shape]
        shape[dim] = len(units)
        values = torch.empty(shape, device="cpu", dtype=torch.float32).normal_(generator=generator).to(matrix.device)
        mean, deviation = matrix.float().mean(), matrix.float().std()
        return matrix.index_copy(dim, units, (mean + deviation * values).to(matrix.dtype))

    gate = None if mlp.gate_proj is None else anew(mlp.gate_proj, 0)
    return mlp._replace(up_proj=anew(mlp.up_proj, 0), down_proj=anew(mlp.down_proj, 1), gate_proj=gate)


def weight_sum(config: MoEConfig, *, router_std: float) -> float:
    """What the K weights of a token add up to, where that is one number for all tokens; ValueError where it is not.

    Normalised weights, and a softmax over the kept experts, add up to `routed_scaling_factor`. Others depend on the
    logits, and are constant only while the router is zero: then the sum is computed.
    """
    of_kept = config.score_after_topk and config.scoring_func == "softmax"
    if (config.normalises and config.norm_eps <= 1e-12) or of_kept:
        return config.routed_scaling_factor
    if router_std == 0:
        zeros = torch.zeros(1, config.n_routed_experts, dtype=torch.float64, device="cpu")
        ids = torch.arange(config.num_experts_per_tok, device="cpu")[None]
        return weigh(score(zeros, config), ids, config, sentinels=False).sum().item()
    if config.normalises:
        what, instead = f"norm_eps={config.norm_eps}", "norm_eps=0.0"
    elif config.norm_topk_prob:
        what, instead = "norm_single_expert=False", "norm_single_expert=True"
    else:
        what, instead = "norm_topk_prob=False", "norm_topk_prob=True"
    raise ValueError(
        f"{what} lets the weights of every token add up to another sum, so no experts give the dense output: "
        f"use {instead}, or router_std=0"
    )


def check_upcycling(mlp: DenseMLP, config: MoEConfig, granularity: int) -> None:
    """Refuse sizes and rules with which slices would be missing or taken twice."""
    width, hidden = mlp.up_proj.shape
    check_slices(width, granularity)
    for name in ("n_routed_experts", "num_experts_per_tok"):
        if (value := getattr(config, name)) % granularity:
            raise ValueError(
                f"{name}={value} is not a multiple of granularity={granularity}: "
                f"use {math.ceil(value / granularity) * granularity}, whole copies of the MLP"
            )
    sizes = {
        "hidden_size": hidden,
        "moe_intermediate_size": width // granularity,
        "output_size": mlp.down_proj.shape[0],
    }
    for name, needed in sizes.items():
        given = getattr(config, name) or (config.hidden_size if name == "output_size" else None)
        if given != needed:
            raise ValueError(f"{name}={given} does not fit the dense MLP: use {needed}")
    if config.limits_groups and config.experts_per_group % granularity:
        raise ValueError(
            f"n_group={config.n_group} parts the slices of a copy: use n_group=1, or {granularity} slices in one group"
        )
    if config.n_shared_experts:
        raise ValueError(f"n_shared_experts={config.n_shared_experts} would add to the dense output: use 0")
    if not config.rule_is_known:
        raise ValueError("topk_method='unknown' cannot be routed: give the rule of the layer")
    _check_kind(mlp, config)


def check_slices(width: int, granularity: int) -> None:
    """Refuse a granularity that does not divide the width."""
    if granularity < 1 or width % granularity:
        near = sorted((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - granularity))[:2]
        raise ValueError(
            f"granularity={granularity} does not cut the width {width} into equal slices: "
            f"use {' or '.join(map(str, sorted(near)))}"
        )


def _check_kind(mlp: DenseMLP, config: MoEConfig) -> None:
    if config.gated != (mlp.gate_proj is not None):
        has = "has no gate_proj" if config.gated else "has a gate_proj"
        raise ValueError(f"gated={config.gated} and the dense MLP {has}: use gated={not config.gated}")
    biases = [mlp.up_bias, mlp.down_bias, *([mlp.gate_bias] if config.gated else [])]
    if any((bias is not None) != config.expert_bias for bias in biases):
        has = "lacks a bias" if config.expert_bias else "has biases"
        raise ValueError(
            f"expert_bias={config.expert_bias} and the dense MLP {has}: give all of its biases with expert_bias=True, "
            "or none with False"
        )
