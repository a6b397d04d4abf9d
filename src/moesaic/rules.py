"""The mathematics of routing as pure functions: logits -> scores -> chosen experts -> weights.

There is one `weigh` for all rules and it never sees the bias: the bias can steer a choice, it cannot reach a weight.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.types import Routing


def route(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, " E"] | None,
    config: MoEConfig,
    *,
    token_ids: Int[Tensor, " T"] | None = None,
    replay: Int[Tensor, "..."] | None = None,
) -> Routing:
    """Decide experts and weights of every token (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2).

    `replay` [T, K] gives the expert ids instead of selecting them, 0 to E, E being "no expert"; weights still come from
    the live logits, so gradients flow. Its shape is checked, its values are not (that would wait for the device).
    `token_ids` is for selections that read the vocabulary id (hash routing); those in this room ignore it.

    A NaN in a token stays in its row: ids are K distinct experts inside kept groups, weights are NaN.
    """
    del token_ids
    scores = score(logits, config)
    if replay is None:
        choice = scores.detach() if bias is None else scores.detach() + bias
        expert_ids = select(choice, config)
    else:
        expected = (len(logits), config.num_experts_per_tok)
        if replay.shape != expected:
            raise ValueError(f"replay has shape {tuple(replay.shape)}, not [T, K] = {expected}: give one row a token")
        expert_ids = replay.long()
    return Routing(logits, weigh(scores, expert_ids, config), expert_ids)


def score(logits: Float[Tensor, "T E"], config: MoEConfig) -> Float[Tensor, "T E"]:
    """Affinity of every token to every expert, in float32 (or wider) unless `score_dtype` is "model".

    Where scoring comes after top-k the logits themselves are ranked, and `weigh` scores the K kept ones.
    """
    if config.score_dtype == "float32":
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if config.score_after_topk else SCORING[config.scoring_func](logits)


SCORING = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=-1),
    # DeepSeek-V4. Kept off zero, where the slope of the root would turn the gradient to NaN (logits below -104).
    "sqrtsoftplus": lambda logits: F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt(),
}


def select(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K experts of every token, best first, by biased scores. Ties go to the lower index on every device."""
    return SELECTION[config.topk_method](choice, config)


def weigh(scores: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"], config: MoEConfig) -> Float[Tensor, "T K"]:
    """Combine weights of the chosen experts: gather unbiased scores, normalise, then scale.

    The sentinel id E weighs 0 and takes no part in the sum.
    """
    n_experts = scores.shape[-1]
    absent = expert_ids >= n_experts
    weights = scores.gather(-1, expert_ids.clamp(max=n_experts - 1))
    if config.score_after_topk:
        weights = SCORING[config.scoring_func](weights.masked_fill(absent, torch.finfo(weights.dtype).min))
    weights = torch.where(absent, 0.0, weights)
    if config.norm_topk_prob and (expert_ids.shape[-1] > 1 or config.norm_single_expert):
        total = weights.sum(dim=-1, keepdim=True) + config.norm_eps
        nobody = absent.all(dim=-1, keepdim=True)  # 0 / 0 where the eps is none, or rounds to none
        weights = weights / total.masked_fill(nobody, 1.0)
    return weights * config.routed_scaling_factor


def greedy_topk(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K best experts, wherever they are."""
    return largest(choice, config.num_experts_per_tok)


def group_limited_topk(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K best experts inside the M best groups: node-limited routing. With one group, the plain top-k."""
    if config.n_group > 1:
        open_to_token = expand_groups(kept_groups(group_scores(choice, config), config), config)
        choice = choice.masked_fill(~open_to_token, config.mask_fill)
    return largest(choice, config.num_experts_per_tok)


def balanced_topk(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """Forced balance: experts are dealt out in turn, whatever the scores. A speed baseline, never for training."""
    n_tokens, n_experts = choice.shape
    k = config.num_experts_per_tok
    return torch.arange(n_tokens * k, device=choice.device).view(n_tokens, k) % n_experts


SELECTION = {
    "noaux_tc": group_limited_topk,
    "group_limited_greedy": group_limited_topk,
    "greedy": greedy_topk,
    "balanced": balanced_topk,
}


def group_scores(choice: Float[Tensor, "T E"], config: MoEConfig) -> Float[Tensor, "T G"]:
    """How good a group is for a token: the sum of its best biased scores.

    Two of them in DeepSeek-V3's code, the best one in V2, K/M of them in the V3 paper and in Megatron-Core.
    """
    by_group = choice.unflatten(-1, (config.n_group, config.experts_per_group))
    counted = {"max": 1, "top2_sum": 2, "k_over_m_sum": config.num_experts_per_tok // config.topk_group}
    return by_group.topk(counted[config.group_score_rule], dim=-1).values.sum(dim=-1)


def kept_groups(scores: Float[Tensor, "T G"], config: MoEConfig) -> Bool[Tensor, "T G"]:
    """True for the M best groups of every token; ties go to the lower group."""
    kept = largest(scores, config.topk_group)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


def expand_groups(kept: Bool[Tensor, "T G"], config: MoEConfig) -> Bool[Tensor, "T E"]:
    """The mask of groups as a mask of experts: expert e is in group e // (E/G)."""
    return kept.repeat_interleave(config.experts_per_group, dim=-1)


def largest(values: Float[Tensor, "T n"], k: int) -> Int[Tensor, "T k"]:
    """Indices of the k largest values of each row, best first; equal values go to the lower index, NaN counts as +inf.

    `torch.topk` leaves the order of ties open, and a stable sort costs 4x. So each float32 becomes an int64 whose
    high half orders like the float and whose low half counts down over the index: then no two are equal.
    """
    values = values.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if values.dtype == torch.float64:
        return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which must tie with it
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards as integers: flip their bits
    n = values.shape[-1]
    tie_break = torch.arange(n - 1, -1, -1, device=values.device)
    return ((ordered.long() << 32) | tie_break).topk(k, dim=-1).indices
