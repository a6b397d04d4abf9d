"""Definitions that are obviously right and share no code with what they judge."""

import math

import numpy as np
import torch
from torch import Tensor


def pick(values: list[float], k: int) -> list[int]:
    """Indices of the k largest, ties to the lower index, by Python's own stable sort."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def route_one(
    scores: list[float],
    bias: list[float],
    *,
    k: int,
    n_group: int,
    topk_group: int,
    counted: int,
    scale: float,
    norm: bool,
) -> dict[int, float]:
    """One token of a group-limited gate in plain Python: {expert: weight}. `counted` scores make a group's score."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // n_group
    groups = [sorted(biased[g * size : (g + 1) * size], reverse=True)[:counted] for g in range(n_group)]
    kept = pick([math.fsum(best) for best in groups], topk_group)
    candidates = [e for e in range(len(scores)) if e // size in kept]
    chosen = [candidates[i] for i in pick([biased[e] for e in candidates], k)]
    total = math.fsum(scores[e] for e in chosen) if norm else 1.0
    return {e: scale * scores[e] / total for e in chosen}


def gated_mlp(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """One SwiGLU expert on one token, numpy float64."""
    projected = gate_up @ x
    gate, up = np.split(projected, 2)
    return down @ (gate / (1 + np.exp(-gate)) * up)


def moe_by_token(tokens: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> np.ndarray:
    """Every token, every chosen expert, one expert each; the id E is skipped. numpy float64, [T, O]."""
    x, w, up, dn = (t.detach().double().numpy() for t in (tokens, weights, gate_up, down))
    out = np.zeros((len(x), dn.shape[1]))
    for t in range(len(x)):
        for k, e in enumerate(ids[t].tolist()):
            if e < len(up):
                out[t] += w[t, k] * gated_mlp(x[t], up[e], dn[e])
    return out


def densify(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E] map of weights; slot order, which differs between implementations, disappears."""
    return torch.zeros(len(ids), num_experts, dtype=weights.dtype).scatter(1, ids, weights)


def tied_rows(choice: Tensor, k: int, n_group: int = 1, topk_group: int = 1) -> Tensor:
    """True where the last kept and the first lost expert, or group, tie exactly: the order is then anybody's guess."""
    tied = torch.zeros(len(choice), dtype=torch.bool)
    if n_group > 1:
        by_group = choice.unflatten(1, (n_group, -1))
        group = by_group.topk(2, dim=-1).values.sum(-1)
        ranked = group.sort(dim=1, descending=True).values
        if topk_group < n_group:
            tied |= ranked[:, topk_group - 1] == ranked[:, topk_group]
        kept = torch.zeros_like(group, dtype=torch.bool).scatter(1, group.topk(topk_group, dim=1).indices, True)
        choice = by_group.masked_fill(~kept[..., None], -math.inf).flatten(1)
    ranked = choice.sort(dim=1, descending=True).values
    if k < choice.shape[1]:
        tied |= ranked[:, k - 1] == ranked[:, k]
    return tied
