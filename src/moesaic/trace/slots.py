"""Experts of each token compared slot by slot: nothing is sorted, and every comparison runs over all tokens."""

import numpy as np


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
