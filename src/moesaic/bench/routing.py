"""Which experts the tokens of a benchmark go to: the same ids and weights for everybody."""

from collections.abc import Callable

import torch
from torch import Tensor


def balanced(tokens: int, n_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """K distinct experts a token, every set of K equally likely."""
    return torch.rand(tokens, n_experts, generator=generator).topk(k).indices


def zipf(tokens: int, n_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """K distinct experts a token, drawn one after the other with probability ~ 1/rank; who has which rank is random.

    Gumbel noise on the logarithm of the probabilities and top-k draw without replacement.
    """
    rank = torch.randperm(n_experts, generator=generator) + 1
    exponential = torch.empty(tokens, n_experts).exponential_(generator=generator)
    return (-exponential.log() - rank.log()).topk(k).indices


def all_to_k(tokens: int, n_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """Every token to the same K experts: the worst skew."""
    return torch.randperm(n_experts, generator=generator)[:k].repeat(tokens, 1)


DRAWS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "balanced": balanced,
    "zipf": zipf,
    "all-to-k": all_to_k,
}
