"""Exact tails of the binomial, for counts and for effective counts that are no whole numbers."""

import numpy as np
import torch

STEPS = 5000  # of the continued fraction; about sqrt(n) are needed, so enough for 20 million tokens
TINY = 1e-300


def at_least(count: np.ndarray, n: np.ndarray | float, p: np.ndarray | float) -> np.ndarray:
    """P(X >= count) for X ~ binomial(n, p), float64, all broadcast.

    The regularised incomplete beta function I_p(count, n - count + 1): the sum itself for whole numbers, and its smooth
    continuation for a number of effective tokens. A count beyond n is taken as n.
    """
    count, n, p = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (count, n, p)))
    count = np.minimum(count, n)
    inside = (count > 0) & (p > 0) & (p < 1)
    tail = np.where((count <= 0) | (p >= 1), 1.0, 0.0)
    tail[inside] = incomplete_beta(count[inside], (n - count + 1)[inside], p[inside])
    return tail


def at_most(count: np.ndarray, n: np.ndarray | float, p: np.ndarray | float) -> np.ndarray:
    """P(X <= count) for X ~ binomial(n, p); see `at_least`. A count below 0 is taken as 0."""
    n = np.asarray(n, dtype=np.float64)
    return at_least(n - np.maximum(count, 0.0), n, 1.0 - np.asarray(p, dtype=np.float64))


def incomplete_beta(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """I_x(a, b) for a, b > 0 and 0 < x < 1, all one shape (DLMF 8.17.22, a continued fraction)."""
    flip = x > (a + 1) / (a + b + 2)  # the fraction converges fast on the other side: I_x(a, b) = 1 - I_{1-x}(b, a)
    a, b, x = np.where(flip, b, a), np.where(flip, a, b), np.where(flip, 1 - x, x)
    log_front = a * np.log(x) + b * np.log1p(-x) - np.log(a) - _log_beta(a, b)
    value = np.clip(np.exp(log_front) * _fraction(a, b, x), 0.0, 1.0)
    return np.where(flip, 1.0 - value, value)


def _fraction(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The continued fraction of the incomplete beta function, by the modified method of Lentz."""

    def safe(value: np.ndarray) -> np.ndarray:
        return np.where(np.abs(value) < TINY, TINY, value)

    c = np.ones_like(x)
    d = 1.0 / safe(1.0 - (a + b) * x / (a + 1))
    value = d.copy()
    for m in range(1, STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1.0 / safe(1.0 + even * d), safe(1.0 + even / c)
        value *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1.0 / safe(1.0 + odd * d), safe(1.0 + odd / c)
        value *= d * c
        if np.all(np.abs(d * c - 1.0) < 1e-13):
            break
    return value


def _log_beta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def log_gamma(value: np.ndarray) -> np.ndarray:
        return torch.lgamma(torch.from_numpy(np.ascontiguousarray(value))).numpy()

    return log_gamma(a) + log_gamma(b) - log_gamma(a + b)
