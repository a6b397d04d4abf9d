"""What routers return and experts are given, read by meaning: ids, weights, logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.types import Routing

PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")  # routers that return softmax of their logits


def picks_of(ids: Tensor, weights: Tensor | None) -> Routing:
    """Ids [T, K] and weights [T, K] (or None) of what experts were given.

    Switch gives a row of zeros and one 1 per token, [T, 1, E]: its place is the id, and a row without 1 is a token that
    was dropped, which is the id E.
    """
    if weights is not None and ids.dim() == weights.dim() + 1:
        n_experts = ids.shape[-1]
        ids = torch.where(ids.any(-1), ids.argmax(-1), n_experts)
    flat = None if weights is None else weights.flatten(0, -2)
    return Routing(None, flat, ids.flatten(0, -2))  # pyrefly: ignore


class RouterOutput(NamedTuple):
    """What a router returned, by meaning. place: where in its output the ids are; None where they were read off."""

    logits: Tensor | None
    weights: Tensor
    ids: Tensor
    place: int | None

    def put(self, output: Any, *, ids: Tensor | None = None, weights: Tensor | None = None) -> Any:
        """`output`, which this was read from, of its own kind and with others in their places."""
        ids = self.ids if ids is None else ids
        weights = self.weights if weights is None else weights
        items = (ids if item is self.ids else weights if item is self.weights else item for item in output)
        return type(output)(*items) if hasattr(output, "_replace") else type(output)(items)


def as_logits(router: nn.Module | None, scores: Tensor) -> Tensor:
    """What a router gives as its logits; of probabilities the logarithm, which is the logits up to a constant of each
    token. Known by its class: a few logits that are above zero and sum to one look the same."""
    return scores.log() if any(kind.__name__ in PROBABILITIES for kind in type(router).__mro__) else scores


def read_router(router: nn.Module, output: Any) -> RouterOutput:
    """Find ids, weights and logits in what a router returned. ValueError where there are no ids in it.

    Ids are its integers, weights what has their shape, logits the other scores. Llama 4 returns, instead of ids, scores
    that are zero wherever an expert was not chosen: its ids are the places of the K largest.
    """
    items = list(output) if isinstance(output, tuple | list) else [output]
    tensors = [(place, item) for place, item in enumerate(items) if isinstance(item, Tensor)]
    scores = [item for _, item in tensors if item.is_floating_point()]
    found = next(((place, item) for place, item in tensors if not item.is_floating_point()), None)
    if found is not None:
        place, ids = found
        same = [item for item in scores if item.shape == ids.shape]
        logits = next((item for item in scores if item.shape[-1] != ids.shape[-1]), None)
        if logits is None and len(same) > 1:  # as many experts as are chosen
            logits, same = same[0], same[1:]
        if same:
            return RouterOutput(logits, same[0], ids, place)
    k = getattr(router, "top_k", None)
    if len(scores) == 2 and scores[0].shape == scores[1].shape and isinstance(k, int):
        weights, ids = scores[0].topk(k, dim=-1)
        return RouterOutput(scores[1], weights, ids, None)
    raise ValueError(f"{type(router).__name__} returns no expert ids where transformers 5 has them: not recordable")
