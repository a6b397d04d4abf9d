"""Pairs of experts that are chosen together more often than the rule and their loads explain."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.console import RenderableType

from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import block_size, pair_chances, random_picks
from moesaic.trace.chance.documents import Documents
from moesaic.trace.chance.tails import at_least
from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_level, check_trace
from moesaic.trace.shown import NAMED, Shown, short_layers
from moesaic.trace.statistics.verdict import documents_needed
from moesaic.trace.store import Trace

TOGETHER = 1.5  # times what chance gives: below that, keeping the two on one node saves next to nothing
CODES = 2_000_000  # pairs held at once: 16 MB, and twice that while they are sorted
MOST_EXPERTS = 4096  # a dozen tables of all pairs are held, 134 MB each; no released layer has more than 2048


class Pair(NamedTuple):
    """Two experts of a layer (its index). together: tokens that chose both. expected: by chance, see `coselection`."""

    layer: int
    first: int
    second: int
    together: int
    expected: float
    lift: float
    p_value: float


@dataclass(frozen=True, repr=False)
class Coselection(Shown):
    """Pairs found, by layer and the strongest first. tests: pairs of all layers, that p was corrected for.
    by_documents: whether documents were resampled, in every layer; else it holds for these texts only."""

    layers: tuple[str, ...]
    pairs: tuple[Pair, ...]
    tests: int
    by_documents: bool
    n_documents: int

    def __repr__(self) -> str:
        names, best = short_layers(self.layers), sorted(self.pairs, key=lambda pair: -pair.lift)[:NAMED]
        named = ", ".join(f"{names[pair.layer]} e{pair.first} e{pair.second} ({pair.lift:.2f}x)" for pair in best)
        first = f"{len(self.pairs):,} of {self.tests:,} pairs of experts are chosen together beyond chance"
        return f"{first}{named and ', most of all '}{named}\n(more: .pairs, .to_dict())"

    def table(self, lang: str = "en") -> RenderableType:
        from moesaic.trace.statistics.tables import coselection_table

        return coselection_table(self, lang)

    def to_dict(self) -> dict[str, Any]:
        """All of it for strict JSON."""
        rows = [{**pair._asdict(), "layer": self.layers[pair.layer]} for pair in self.pairs]
        return {"tests": self.tests, "documents": self.n_documents, "by_documents": self.by_documents, "pairs": rows}


def coselection(trace: Trace, *, alpha: float = 0.05) -> Coselection:
    """Pairs of experts that tokens choose together beyond chance, by TOGETHER or more.

    Chance is the rule's own rate for two experts (of one group, or of two) times both loads, scaled to the number of
    pairs that there are of these groups. A pair is found where chance gives so many in any pair of any layer with
    probability `alpha` at most (binomial tail in clumps of documents, Bonferroni). Experts that prefer the same domain
    are chosen together too, and are found. Pairs are counted piece by piece, so memory does not grow with their number.
    """
    check_trace(trace)
    check_level(alpha)
    if trace.top_k < 2:
        raise ValueError("num_experts_per_tok=1 leaves no pairs: co-selection needs two experts a token at least")
    if trace.n_experts > MOST_EXPERTS:
        raise ValueError(
            f"n_routed_experts={trace.n_experts} has too many pairs to count: co-selection takes {MOST_EXPERTS} at most"
        )
    check_distinct(trace)
    documents, e = Documents.of(trace), trace.n_experts
    tests = trace.n_layers * e * (e - 1) // 2
    whole = len(documents) >= documents_needed(trace.top_k / e, e, trace.n_layers, alpha)
    layers = range(trace.n_layers)
    pairs = tuple(pair for layer in layers for pair in _pairs_of(trace, layer, documents, whole, tests, alpha))
    return Coselection(tuple(trace.layers), pairs, tests, whole, documents.n_documents)


class PairCounts(NamedTuple):
    """Per pair code (first * E + second, first < second), float64 [E*E]: tokens with both; and over documents, the sum
    of squares, and the sum weighted with each document's share of the tokens."""

    together: np.ndarray
    squares: np.ndarray
    weighted: np.ndarray


def count_pairs(picks: np.ndarray, n_experts: int, documents: Documents) -> PairCounts:
    """Count pairs of one layer's picks [T, K], documents or a piece of a long one at a time; the id E makes none."""
    cells, k = n_experts * n_experts, picks.shape[1]
    together, squares, weighted = np.zeros(cells), np.zeros(cells), np.zeros(cells)
    picks = documents.sorted(picks)
    lengths = np.diff(documents.starts)
    most = max(CODES * 2 // (k * (k - 1)), 1)  # tokens
    for start, stop in _ranges(documents, most):
        rows = picks[documents.starts[start] : documents.starts[stop]]
        if len(rows) > most:  # one long document
            counts = np.zeros(cells)
            for at in range(0, len(rows), most):
                counts += np.bincount(_codes(rows[at : at + most], n_experts), minlength=cells)
            together += counts
            squares += counts**2
            weighted += counts * (len(rows) / len(picks))
        else:
            owner = np.repeat(np.arange(start, stop), lengths[start:stop])
            keys, counts = np.unique(_codes(rows, n_experts, owner), return_counts=True)
            pair, length = keys % cells, lengths[keys // cells]
            together += np.bincount(pair, counts, cells)
            squares += np.bincount(pair, counts.astype(float) ** 2, cells)
            weighted += np.bincount(pair, counts * length / max(len(picks), 1), cells)
    return PairCounts(together, squares, weighted)


def _ranges(documents: Documents, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents with `most` tokens at most, or one document."""
    start, n = 0, len(documents)
    while start < n:
        stop = int(np.searchsorted(documents.starts, documents.starts[start] + most, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        yield start, stop
        start = stop


def _codes(rows: np.ndarray, n_experts: int, owner: np.ndarray | int = 0) -> np.ndarray:
    """owner * E*E + first * E + second, int64, of every pair of experts in rows [T, K]; owner: a number of each row."""
    rows = rows.astype(np.int64)
    code = np.empty((math.comb(rows.shape[1], 2), len(rows)), np.int64)
    for place, (i, j) in enumerate(itertools.combinations(range(rows.shape[1]), 2)):
        first, second = np.minimum(rows[:, i], rows[:, j]), np.maximum(rows[:, i], rows[:, j])
        ok = (second < n_experts) & (first != second)
        code[place] = np.where(ok, (owner * n_experts + first) * n_experts + second, -1)
    return code[code >= 0]


def pair_rates(config: MoEConfig) -> np.ndarray:
    """P(a token chooses both of two experts) under random routing, float64 [E, E]: one value inside groups and one
    between them, which is all a fair rule can tell apart. The diagonal is 0."""
    block = np.arange(config.n_routed_experts) // block_size(config)
    rates = np.where(block[:, None] == block, *pair_chances(random_picks(config), config))
    np.fill_diagonal(rates, 0.0)
    return rates


def _pairs_of(
    trace: Trace, layer: int, documents: Documents, by_documents: bool, tests: int, alpha: float
) -> list[Pair]:
    e, picks = trace.n_experts, trace.picks[layer].numpy()
    slots = picks.ravel()
    pieces = (slots[at : at + CODES] for at in range(0, len(slots), CODES))
    load = sum((np.bincount(piece, minlength=e + 1) for piece in pieces), np.zeros(e + 1))[:e]
    n_tokens = len(picks)
    if not load.sum():
        return []
    counts = count_pairs(picks, e, documents)
    expected = _expected(trace.configs[layer], load, counts.together.reshape(e, e)).ravel()
    p = np.clip(expected / n_tokens, 0.0, 1.0 - 1e-9)
    maybe = np.flatnonzero((counts.together >= TOGETHER * expected) & (expected > 0))
    clump = _clumps(counts, expected, p, documents)[maybe] if by_documents else 1.0
    tail = at_least(counts.together[maybe] / clump, n_tokens / clump, p[maybe]) * tests
    found = maybe[tail <= alpha]
    lift = counts.together[found] / expected[found]
    tail = tail[tail <= alpha]
    order = np.argsort(-lift, kind="stable")
    return [
        Pair(
            layer, int(found[i] // e), int(found[i] % e), int(counts.together[found[i]]),
            float(expected[found[i]]), float(lift[i]), float(tail[i]),
        )
        for i in order
    ]  # fmt: skip


def _expected(config: MoEConfig, load: np.ndarray, together: np.ndarray) -> np.ndarray:
    """Tokens that choose both of two experts by chance, [E, E], the upper triangle: the rule's rate times both loads,
    scaled so that every two groups have the pairs they really have (some groups are chosen together more than others,
    which is the groups' doing and no pair's)."""
    e, n = config.n_routed_experts, block_size(config)
    expected = np.triu(pair_rates(config) * np.outer(load, load))
    blocks = (e // n, n, e // n, n)
    have, give = (values.reshape(blocks).sum((1, 3)) for values in (together, expected))
    scale = np.divide(have, give, out=np.zeros_like(have), where=give > 0)
    return (expected.reshape(blocks) * scale[:, None, :, None]).reshape(e, e)


def _clumps(counts: PairCounts, expected: np.ndarray, p: np.ndarray, documents: Documents) -> np.ndarray:
    """By how many tokens a pair's count moves at once: its variance over documents, over that of independent tokens;
    at least 1, and at least that of all pairs together around what chance gives."""
    lengths = np.diff(documents.starts)
    weights = float(((lengths / max(lengths.sum(), 1)) ** 2).sum())
    plain = np.maximum(expected * (1 - p), 1e-12)
    fair = (counts.squares - 2 * expected * counts.weighted + expected**2 * weights).sum()
    own = counts.squares - 2 * counts.together * counts.weighted + counts.together**2 * weights
    own /= np.maximum(counts.together * (1 - p), 1e-12)
    return np.maximum(np.maximum(own, fair / plain[expected > 0].sum()), 1.0)
