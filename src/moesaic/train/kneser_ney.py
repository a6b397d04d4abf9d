"""The bar the tiny model has to clear: an interpolated Kneser-Ney bigram on the same tokens."""

import numpy as np
from jaxtyping import Float, Int


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram (Kneser & Ney 1995; Chen & Goodman 1999, sec. 2.7).

        p(w | v) = max(c(v w) - D, 0) / c(v) + D * n(v .) / c(v) * q(w)
        q(w)     = max(n(. w) - d, 0) / n(. .) + d * n(. exists) / n(. .) / V

    c counts pairs of tokens, n counts kinds of pairs, V is the size of the vocabulary. D and d are n1 / (n1 + 2 n2),
    estimated from the pairs (D) and from the continuation counts (d) that were seen once and twice. After a token
    that was never seen, p is q.
    """

    def __init__(self, stream: Int[np.ndarray, " N"], vocab_size: int) -> None:
        pairs, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
        before, after = pairs // vocab_size, pairs % vocab_size
        self.vocab_size = vocab_size
        self.pairs = pairs
        self.discount = _discount(counts)
        self.kept = counts - self.discount
        self.context = np.bincount(stream[:-1], minlength=vocab_size)
        self.kinds = np.bincount(before, minlength=vocab_size)
        self.unigram = _continuation(np.bincount(after, minlength=vocab_size))

    def probability(self, before: Int[np.ndarray, " N"], after: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """p(after | before), pair by pair."""
        wanted = before * self.vocab_size + after
        at = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        kept = np.where(self.pairs[at] == wanted, self.kept[at], 0.0)
        total = np.maximum(self.context[before], 1)
        backoff = np.where(self.context[before] > 0, self.discount * self.kinds[before] / total, 1.0)
        return kept / total + backoff * self.unigram[after]

    def loss(self, stream: Int[np.ndarray, " N"]) -> float:
        """Mean negative log-likelihood in nats of every token but the first."""
        return float(-np.log(self.probability(stream[:-1], stream[1:])).mean())


def _discount(counts: Int[np.ndarray, " N"]) -> float:
    """n1 / (n1 + 2 n2). Without a single count of one there is nothing to learn it from: 1/2."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def _continuation(kinds: Int[np.ndarray, " V"]) -> Float[np.ndarray, " V"]:
    discount, total = _discount(kinds), kinds.sum()
    return (np.maximum(kinds - discount, 0) + discount * (kinds > 0).sum() / len(kinds)) / total
