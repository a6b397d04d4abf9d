"""Loads and means over documents: tokens of one text are alike, so a document, not a token, counts as one draw.

Under the null hypothesis no expert is a favourite, yet every document may have habits of its own: which experts they
are for is random. Its load, turned to random experts and summed over the documents, is then what chance gives: an exact
randomisation, whose variance, the cluster-robust one around equal shares, is counted here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesaic.trace.store import Trace

CELLS = 2_000_000  # counts of documents and experts held at once: 16 MB
MOST = 2000  # more documents are summed into as many clusters, dealt in turn: their variance is as well known


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokens ordered by document. order: int64 [T], or None where they lie so already. starts: where each of the N
    clusters begins, int64 [N+1]; a cluster is a document, or several where there are very many. n_documents: those
    that have tokens."""

    order: np.ndarray | None
    starts: np.ndarray
    n_documents: int

    @classmethod
    def of(cls, trace: Trace) -> "Documents":
        _, cluster = np.unique(trace.sequences.numpy(), return_inverse=True)
        n_documents = int(cluster.max(initial=-1)) + 1
        if n_documents > MOST:
            cluster = cluster % MOST
        order = None
        if (np.diff(cluster) < 0).any():
            order = np.argsort(cluster, kind="stable")
            cluster = cluster[order]
        return cls(order, np.searchsorted(cluster, np.arange(min(n_documents, MOST) + 1)), n_documents)

    @classmethod
    def whole(cls, n_tokens: int) -> "Documents":
        """All tokens as one document."""
        return cls(None, np.array([0, n_tokens]), 1)

    def __len__(self) -> int:
        """Number of clusters."""
        return len(self.starts) - 1

    def sorted(self, values: np.ndarray) -> np.ndarray:
        """Values of tokens [T, ...], one document after the other."""
        return values if self.order is None else values[self.order]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a value of tokens [T] over each document, float64 [N]."""
        return np.add.reduceat(self.sorted(values), self.starts[:-1], dtype=np.float64) if len(self) else np.zeros(0)

    def blocks(self, n_experts: int) -> Iterator[tuple[int, int]]:
        """Ranges of documents whose counts fit into memory."""
        step = max(1, CELLS // (n_experts + 1))
        for start in range(0, len(self), step):
            yield start, min(start + step, len(self))


@dataclass(frozen=True, eq=False)
class LoadCounts:
    """Assignments of one layer, and how much they vary between documents.

    load: int64 [E]. n_tokens: tokens with an expert. n_clusters: documents with such a token (see `Documents`).
    own_variance: cluster-robust variance of each expert's load around its own share, float64 [E].
    variance: of one expert's load where no expert is a favourite, mean over experts. clump: by how many tokens a load
    moves at once, from the third moment: 1 where tokens are independent, their number where all tokens of a document
    choose alike.
    """

    load: np.ndarray
    n_tokens: int
    n_clusters: int
    variance: float
    own_variance: np.ndarray
    clump: float

    @property
    def rate(self) -> float:
        """Share of tokens that a fair expert gets: K/E, less where some slots have no expert."""
        return float(self.load.sum()) / (max(self.n_tokens, 1) * len(self.load))

    @property
    def token_variance(self) -> float:
        """Variance of a fair expert's load if tokens were independent: binomial."""
        return self.n_tokens * self.rate * (1.0 - self.rate)

    @property
    def design_effect(self) -> float:
        """By how much the likeness of tokens inflates the variance; at least 1 (Kish's design effect)."""
        plain = self.token_variance
        return max(self.variance / plain, 1.0) if plain > 0 else 1.0

    def fair_variance(self, by_documents: bool) -> float:
        """Variance of a fair expert's load; never below that of independent tokens."""
        return max(self.variance, self.token_variance) if by_documents else self.token_variance


def count_loads(picks: np.ndarray, n_experts: int, documents: Documents) -> LoadCounts:
    """Count one layer's picks [T, K]; the id E is counted nowhere."""
    picks = documents.sorted(picks)
    lengths = np.diff(documents.starts)
    load, squares, with_total = np.zeros(n_experts, np.int64), np.zeros(n_experts), np.zeros(n_experts)
    second = third = total_squares = 0.0
    n_clusters = 0
    for start, stop in documents.blocks(n_experts):
        rows = picks[documents.starts[start] : documents.starts[stop]]
        owner = np.repeat(np.arange(0, (stop - start) * (n_experts + 1), n_experts + 1), lengths[start:stop])
        counts = np.bincount((owner[:, None] + rows).ravel(), minlength=(stop - start) * (n_experts + 1))
        counts = counts.reshape(stop - start, n_experts + 1)[:, :n_experts]
        load += counts.sum(0)
        x = counts.astype(np.float64)
        total = x.sum(1, keepdims=True)
        n_clusters += int((total > 0).sum())
        squares += (x * x).sum(0)
        with_total += (x * total).sum(0)
        total_squares += float((total * total).sum())
        x -= total / n_experts
        power = x * x
        second += float(power.sum())
        power *= x
        third += float(power.sum())
    variance = second / n_experts
    share = load / max(load.sum(), 1)
    own = squares - 2 * share * with_total + share**2 * total_squares
    own *= n_clusters / max(n_clusters - 1, 1)
    n_tokens = len(picks)
    if picks.size and int(picks.max()) >= n_experts:
        n_tokens = int((picks < n_experts).any(-1).sum())
    counts = LoadCounts(load, n_tokens, n_clusters, variance, np.maximum(own, 0.0), 1.0)
    p = counts.rate
    clump = third / n_experts / (variance * (1 - 2 * p)) if variance > 0 and p < 0.5 else 1.0
    return LoadCounts(load, n_tokens, n_clusters, variance, counts.own_variance, max(clump, counts.design_effect))


def mean_and_error(values: np.ndarray, documents: Documents | None) -> tuple[float, float]:
    """Mean of a value of tokens [T], NaN left out, and its standard error: of documents, or of tokens where None."""
    known = np.isfinite(values)
    n = int(known.sum())
    if not n:
        return float("nan"), float("nan")
    mean = float(values[known].mean())
    residual = np.where(known, values - mean, 0.0)
    parts = residual[known] if documents is None else documents.sums(residual)
    return mean, float(np.sqrt((parts**2).sum() * len(parts) / max(len(parts) - 1, 1))) / n
