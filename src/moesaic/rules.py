"""The mathematics of routing as pure functions: logits -> scores -> chosen experts -> weights.

There is one `weigh` for all rules and it never sees the bias: the bias can steer a choice, it cannot reach a weight.
"""

from functools import reduce

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
    replay: Int[Tensor, "..."] | None = None,
) -> Routing:
    """Decide experts and weights of every token (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2).

    `replay` [T, K] gives the expert ids instead of selecting them, 0 to E, E being "no expert"; weights still come from
    the live logits, so gradients flow. Its shape is checked, its values are not (that would wait for the device).
    Hash routing, whose experts are fixed for each id of the vocabulary, is `replay=table[token_ids]`.

    A NaN in a token stays in its row: ids are K distinct experts inside kept groups, weights are NaN.
    """
    scores = score(logits, config)
    if replay is None:
        choice = scores.detach() if bias is None else scores.detach() + bias
        expert_ids = select(choice, config)
    else:
        expected = (logits.shape[0], config.num_experts_per_tok)
        if replay.shape != expected:
            raise ValueError(f"replay has shape {tuple(replay.shape)}, not [T, K] = {expected}: give one row a token")
        expert_ids = replay.long()
    weights = weigh(scores, expert_ids, config, sentinels=replay is not None)
    return Routing(logits, weights, expert_ids)


def score(logits: Float[Tensor, "T E"], config: MoEConfig) -> Float[Tensor, "T E"]:
    """Affinity of every token to every expert, in float32 (or wider) unless `score_dtype` is "model".

    Where scoring comes after top-k the logits themselves are ranked, and `weigh` scores the K kept ones.
    """
    if config.score_dtype == "float32" and logits.dtype.itemsize < 4:
        logits = logits.float()
    return logits if config.score_after_topk else SCORING[config.scoring_func](logits)


SCORING = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sqrtsoftplus": lambda logits: F.softplus(logits).clamp_min(_over_zero(logits.dtype)).sqrt(),  # DeepSeek-V4
}


def _over_zero(dtype: torch.dtype) -> float:
    """What softplus is kept at, off zero, where the slope of the root would turn the gradient to NaN (float32: logits
    below -104). In float16 the smallest number there is: below its smallest normal one are logits from -9.7 on."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def select(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K experts of every token, best first, by biased scores. Ties go to the lower index on every device.

    ValueError for topk_method="unknown", of which only the sizes are known.
    """
    if not config.rule_is_known:
        raise ValueError("topk_method='unknown' cannot be routed: the rule of this layer is not known, only its sizes")
    return SELECTION[config.topk_method](choice, config)


def weigh(
    scores: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"], config: MoEConfig, *, sentinels: bool = True
) -> Float[Tensor, "T K"]:
    """Combine weights of the chosen experts: gather unbiased scores, normalise, then scale.

    The sentinel id E weighs 0 and takes no part in the sum. sentinels=False says that there is none, as after `select`,
    and saves the operations that look for it: half of the time of a single token.
    """
    n_experts = scores.shape[-1]
    absent = expert_ids >= n_experts if sentinels else None
    weights = scores.gather(-1, expert_ids if absent is None else expert_ids.clamp(max=n_experts - 1))
    if config.score_after_topk:
        if absent is not None:
            weights = weights.masked_fill(absent, torch.finfo(weights.dtype).min)
        weights = SCORING[config.scoring_func](weights)
    if absent is not None:
        weights = torch.where(absent, 0.0, weights)
    if config.normalises:
        total = weights.sum(dim=-1, keepdim=True)
        if config.norm_eps:
            total = total + config.norm_eps
        if absent is not None:  # nobody present: 0 / 0 where the eps is none, or rounds to none
            total = total.masked_fill(absent.all(dim=-1, keepdim=True), 1.0)
        weights = weights / total
    return weights if config.routed_scaling_factor == 1.0 else weights * config.routed_scaling_factor


def greedy_topk(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K best experts, wherever they are."""
    return largest(choice, config.num_experts_per_tok)


def group_limited_topk(choice: Float[Tensor, "T E"], config: MoEConfig) -> Int[Tensor, "T K"]:
    """The K best experts inside the M best groups: node-limited routing. With one group, the plain top-k."""
    k = config.num_experts_per_tok
    if config.n_group == 1:
        return largest(choice, k)
    scores = group_scores(choice, config)
    if config.group_mask == "zero":  # the old bug: an expert outside the kept groups can still win
        return largest(choice.masked_fill(~expand_groups(kept_groups(scores, config), config), 0.0), k)
    groups = largest(scores, config.topk_group).sort(dim=-1).values  # ascending: ties between groups go to the lower
    size = config.experts_per_group
    by_group = choice.unflatten(-1, (config.n_group, size))
    candidates = by_group.gather(-2, groups.unsqueeze(-1).expand(-1, -1, size)).flatten(-2)  # [T, M * size]
    place = largest(candidates, k)
    return groups.gather(-1, place // size) * size + place % size


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
    by_group = choice.reshape(choice.shape[0], config.n_group, config.experts_per_group)
    return sum_of_best(by_group, config.scores_of_group)


def sum_of_best(values: Float[Tensor, "*rows n"], count: int) -> Float[Tensor, "*rows"]:
    """The sum of the `count` largest values of each row, added best first however many rows there are.

    The largest is taken out `count` - 1 times: for two of 32, `topk` takes 4x as long on a CPU.
    """
    if few(values):
        best = list(values.topk(count, dim=-1).values.unbind(-1))
    else:
        best = []
        for _ in range(count - 1):
            largest_value, where = values.max(dim=-1, keepdim=True)
            best.append(largest_value.squeeze(-1))
            values = without(values, where)
        best.append(values.amax(dim=-1))
    return reduce(torch.add, best)


def without(values: Float[Tensor, "*rows n"], where: Int[Tensor, "*rows 1"]) -> Float[Tensor, "*rows n"]:
    """`values` with -inf at one place of each row."""
    if torch.compiler.is_compiling():  # inductor of torch 2.11 can lose what is scattered into, and picks other groups
        return values.masked_fill(torch.arange(values.shape[-1], device=values.device) == where, -torch.inf)
    return values.scatter(-1, where, -torch.inf)


def kept_groups(scores: Float[Tensor, "T G"], config: MoEConfig) -> Bool[Tensor, "T G"]:
    """True for the M best groups of every token; ties go to the lower group."""
    kept = largest(scores, config.topk_group)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


def expand_groups(kept: Bool[Tensor, "T G"], config: MoEConfig) -> Bool[Tensor, "T E"]:
    """The mask of groups as a mask of experts: expert e is in group e // (E/G)."""
    return kept.repeat_interleave(config.experts_per_group, dim=-1)


def largest(values: Float[Tensor, "T n"], k: int) -> Int[Tensor, "T k"]:
    """Indices of the k largest values of each row, best first; equal values go to the lower index, NaN counts as +inf.

    `torch.topk` leaves the order of ties open, and a stable sort costs 5x as soon as there is more than a handful of
    rows. So each float32 becomes an int64 whose high half orders like the float and whose low half counts down over the
    index: then no two are equal. A compiled graph takes one way for every number of rows.
    """
    values = values.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    n = values.shape[-1]
    if values.dtype == torch.float64 or few(values):
        return values.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k)
    bits = values.float().add_(0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which must tie with it
    flip = (bits >> 31).bitwise_and_(0x7FFFFFFF)  # negative floats order backwards as integers: flip their bits
    tie_break = torch.arange(n - 1, -1, -1, device=values.device)
    keys = flip.bitwise_xor_(bits).long().bitwise_left_shift_(32).bitwise_or_(tie_break)
    return keys.topk(k, dim=-1).indices


def few(values: Tensor) -> bool:
    """So few values on a CPU that the number of operations decides, not what they do.

    Up to about 2048 one sort is as quick as the ten small operations that make keys and rank them (two cores, torch
    2.13). Never in a compiled graph, which would be tied to a number of tokens.
    """
    return not torch.compiler.is_compiling() and values.is_cpu and values.numel() <= 2048
