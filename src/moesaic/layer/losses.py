"""Balancing losses under one convention: pure functions of a Routing, each 1 at perfect balance, without alpha.

All have the form sum_i f_i P_i: f_i is how often expert i was chosen, 1 at perfect balance, a count without gradient;
P_i is its mean score, of scores that sum to 1 for every token, and alone has a gradient. Only the z-loss is of another
kind: it holds logits small and has no balanced value.

`mask` [T] is False for padding, which takes no part. Without tokens a loss is 0. float32, or float64 for such logits.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.layer.balance import expert_load
from moesaic.rules import SCORING, largest
from moesaic.types import Routing

Mask = Bool[Tensor, " T"] | None


def switch_loss(routing: Routing, config: MoEConfig, *, mask: Mask = None) -> Float[Tensor, ""]:
    """The loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) and GShard, for any K, over the tokens of one call.

    f_i = E / (K T) * sum_t [t was sent to i],  P_i = 1/T * sum_t p_it, both of these tokens.
    """
    p = mean_score(routing, config, mask)
    return (chosen_share(routing, config, mask).to(p) * p).sum()


def sequence_loss(
    routing: Routing,
    config: MoEConfig,
    *,
    mask: Mask = None,
    sequences: Int[Tensor, " T"] | None = None,
) -> Float[Tensor, ""]:
    """The sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20): f and P of each sequence, then their mean.

    f counts the K largest *unbiased* scores, whatever groups and bias made of them: the ids in `routing` are not read.
    sequences: which one each token is in, numbers from 0 to T-1; all are one unless given. A sequence of nothing but
    padding is left out of the mean.
    """
    p = probabilities(routing, config, mask)
    n_tokens, n_experts = p.shape
    sequences = torch.zeros(n_tokens, dtype=torch.int64, device=p.device) if sequences is None else sequences
    is_token = p.new_ones(n_tokens) if mask is None else mask.to(p.dtype)
    chosen = torch.zeros_like(p).scatter(1, largest(p, config.num_experts_per_tok), 1.0) * is_token.unsqueeze(-1)

    def by_sequence(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add(0, sequences, values)

    length = by_sequence(is_token)
    divisor = length.clamp_min(1).unsqueeze(-1)
    f = by_sequence(chosen) * n_experts / (config.num_experts_per_tok * divisor)
    per_sequence = (f * by_sequence(p) / divisor).sum(-1)
    return per_sequence.sum() / (length > 0).sum().clamp_min(1)


def global_batch_loss(
    routing: Routing, config: MoEConfig, *, load: Num[Tensor, " E"], mask: Mask = None
) -> Float[Tensor, ""]:
    """The global-batch loss (arXiv 2501.11873): f of all that was routed anywhere in the step, P of these tokens.

    load: assignments per expert over all ranks and micro-batches. The mean over parts of equal size is the Switch loss
    of the whole batch, value and gradient; experts may specialise within a part.
    """
    p = mean_score(routing, config, mask)
    mean = load.double().mean()
    f = load.double() / torch.where(mean > 0, mean, 1.0)  # nothing was routed: 0, not NaN
    return (f.to(p) * p).sum()


def device_loss(
    routing: Routing, config: MoEConfig, *, mask: Mask = None, n_devices: int | None = None
) -> Float[Tensor, ""]:
    """The device-level loss of DeepSeek-V2 (arXiv 2405.04434, eq. 26-28): balance of devices, not of their experts.

    f of a device is the mean f of its experts, P the sum of their P. n_devices: D, each with E/D consecutive experts;
    the config's n_group unless given.
    """
    d = devices(config, n_devices)
    p = mean_score(routing, config, mask).unflatten(0, (d, -1)).sum(-1)
    f = chosen_share(routing, config, mask).unflatten(0, (d, -1)).mean(-1)
    return (f.to(p) * p).sum()


def communication_loss(
    routing: Routing,
    config: MoEConfig,
    *,
    mask: Mask = None,
    n_devices: int | None = None,
    max_devices: int | None = None,
) -> Float[Tensor, ""]:
    """The communication loss of DeepSeek-V2 (arXiv 2405.04434, eq. 29-31): no device gets more tokens than others.

    f_d = D / (M T) * sum_t [t was sent to d]: a token counts once, however many of the experts there it chose.
    n_devices: D, the config's n_group unless given; max_devices: M, how many a token may reach, see `reachable`. 1 at
    perfect balance of tokens that reach M devices each; where they reach fewer it is smaller.
    """
    p = probabilities(routing, config, mask)
    d, n_tokens = devices(config, n_devices), token_count(p, mask)
    m = reachable(config, d, max_devices)
    where = masked_ids(routing, config, mask) // (config.n_routed_experts // d)
    reached = p.new_zeros(len(p), d + 1).scatter(1, where, 1.0)[:, :d].sum(0)  # "no expert" lies on no device
    f = reached * d / (m * n_tokens)
    return (f * (p.sum(0) / n_tokens).unflatten(0, (d, -1)).sum(-1)).sum()


def z_loss(routing: Routing, config: MoEConfig, *, mask: Mask = None) -> Float[Tensor, ""]:
    """The router z-loss of ST-MoE (arXiv 2202.08906, eq. 5): the mean of logsumexp(logits) squared.

    It keeps logits small and balances nothing: there is no balanced value (all logits 0 give (log E)^2).
    """
    del config
    logits = wide_logits(routing, mask)
    squares = logits.logsumexp(-1).square()
    squares = squares if mask is None else squares.masked_fill(~mask, 0.0)
    return squares.sum() / token_count(logits, mask)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "switch": switch_loss,
    "sequence": sequence_loss,
    "global_batch": global_batch_loss,
    "device": device_loss,
    "communication": communication_loss,
    "z": z_loss,
}


# what they are made of


def probabilities(routing: Routing, config: MoEConfig, mask: Mask = None) -> Float[Tensor, "T E"]:
    """Scores of every token for all experts, which sum to 1 (sigmoid scores are divided by their sum); 0 for padding.

    With scoring after top-k too it is all experts that are scored.
    """
    scores = SCORING[config.scoring_func](wide_logits(routing, mask))
    if config.scoring_func != "softmax":
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(-1), 0.0)


def mean_score(routing: Routing, config: MoEConfig, mask: Mask = None) -> Float[Tensor, " E"]:
    """P: the mean of `probabilities` over tokens. The only way by which a gradient reaches the router."""
    p = probabilities(routing, config, mask)
    return p.sum(0) / token_count(p, mask)


def chosen_share(routing: Routing, config: MoEConfig, mask: Mask = None) -> Float[Tensor, " E"]:
    """f: assignments per expert over those at perfect balance, from the ids that were used; float64, as counts are."""
    ids = masked_ids(routing, config, mask)
    load = expert_load(ids, config.n_routed_experts).double()
    return load * config.n_routed_experts / (ids.shape[-1] * token_count(ids, mask))


def wide_logits(routing: Routing, mask: Mask) -> Float[Tensor, "T E"]:
    """Logits in float32 or wider. Those of padding become 0, since a NaN there would reach the sums."""
    if routing.logits is None:
        raise ValueError("routing.logits is None, and a balancing loss is made of them: record with detail='scores'")
    logits = routing.logits.to(torch.promote_types(routing.logits.dtype, torch.float32))
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(-1), 0.0)


def masked_ids(routing: Routing, config: MoEConfig, mask: Mask) -> Int[Tensor, "T K"]:
    """Ids in which padding chose "no expert"."""
    ids = routing.expert_ids.long()
    return ids if mask is None else ids.masked_fill(~mask.unsqueeze(-1), config.n_routed_experts)


def token_count(like: Num[Tensor, "T *any"], mask: Mask) -> Num[Tensor, ""]:  # noqa: F821 (an axis)
    """How many tokens there are, at least 1, so that nothing divides by 0. Without a mask the rows of `like`."""
    n = like.new_full((), len(like)) if mask is None else mask.sum().to(like.dtype)
    return n.clamp_min(1)


def devices(config: MoEConfig, n_devices: int | None) -> int:
    """D, which has to divide E."""
    d = config.n_group if n_devices is None else n_devices
    if d < 1 or config.n_routed_experts % d:
        raise ValueError(
            f"n_devices={d} does not divide n_routed_experts={config.n_routed_experts}: use a number of devices with "
            "equally many experts each"
        )
    return d


def reachable(config: MoEConfig, d: int, max_devices: int | None) -> int:
    """M: unless given, topk_group where the D devices are groups that the rule limits, else as many as K experts can
    lie on."""
    if max_devices is None:
        return config.topk_group if config.limits_groups and d == config.n_group else min(config.num_experts_per_tok, d)
    if not 1 <= max_devices <= d:
        raise ValueError(f"max_devices={max_devices} of {d} devices cannot be: use 1 to {d}, or leave it out")
    return max_devices


# other libraries' scales

PER_LAYER = ("megatron", "deepspeed", "olmo-core", "deepseek-v2", "nemo")
LIBRARIES = (*PER_LAYER, "transformers", "megablocks")


def to_library(value: Tensor | float, library: str, *, k: int, n_layers: int = 1) -> Tensor | float:
    """The Switch loss of one layer as a library would give it, before its coefficient.

    "megatron", "deepspeed" (topkgating), "olmo-core", "deepseek-v2" and "nemo" have this scale themselves: 1 at perfect
    balance, layer by layer. "megablocks" divides by the number of layers: this is the layer's part. "transformers"
    counts c/T instead of c/(KT), so it is K at balance, and multiplies f and P of all layers *pooled*: with n_layers
    over 1 no function of the layers' own values gives it, and it is refused. Concatenate the layers' tokens into one
    Routing and take that for a layer. A library's coefficient becomes alpha times to_library(1.0, ...).
    """
    if library not in LIBRARIES:
        raise ValueError(f"library={library!r} has no known scale: use one of {', '.join(LIBRARIES)}")
    if library == "transformers" and n_layers > 1:
        raise ValueError(
            f"n_layers={n_layers}: transformers pools f and P over layers before their product, which the layers' own "
            "values do not determine: concatenate the tokens of all layers and convert that loss with n_layers=1"
        )
    return value * k if library == "transformers" else value / n_layers if library == "megablocks" else value
