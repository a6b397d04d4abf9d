"""Whether every token has its experts once: with one of them twice, neither loads nor sets of experts mean anything."""

import numpy as np

from moesaic.trace.shown import short_layer
from moesaic.trace.store import Trace


def twice(picks: np.ndarray, n_experts: int) -> np.ndarray:
    """True for tokens with the same expert in two slots, bool [T], for picks [T, K]; the id E may stand in several."""
    slots, found = _columns(picks, n_experts, -1), np.zeros(len(picks), bool)
    for second in range(1, len(slots)):
        for first in range(second):
            found |= slots[first] == slots[second]
    return found


def shared(one: np.ndarray, two: np.ndarray, n_experts: int) -> np.ndarray:
    """How many experts two choices [T, K] of each token share, int64 [T], none of them twice in either."""
    ours, theirs = _columns(one, n_experts, -1), _columns(two, n_experts, -1 - one.shape[1])
    found = np.zeros(len(one), np.int64)
    for slot in ours:
        found += np.logical_or.reduce([slot == other for other in theirs])
    return found


def _columns(picks: np.ndarray, n_experts: int, nobody: int) -> np.ndarray:
    """Picks [T, K] as [K, T], so that whole rows are compared, the id E as a number below 0 that no other slot has."""
    ids = nobody - np.arange(picks.shape[1], dtype=np.int16)
    return np.ascontiguousarray(np.where(picks < n_experts, picks, ids).T)


def check_distinct(trace: Trace) -> None:
    """ValueError, in one line, where a token has the same expert in two slots; the id E may stand in several."""
    for layer in range(trace.n_layers):
        if len(tokens := np.flatnonzero(twice(trace.picks[layer].numpy(), trace.n_experts))):
            ids = trace.picks[layer, int(tokens[0])].tolist()
            expert = next(e for e in ids if ids.count(e) > 1 and e < trace.n_experts)
            raise ValueError(
                f"token {tokens[0]} of {short_layer(trace.layers[layer])} has expert e{expert} twice, which no "
                "top-k gives: correct the picks, with the id E where a slot has no expert"
            )
