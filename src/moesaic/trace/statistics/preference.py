"""Which experts prefer which domain, tested against relabelled documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType

from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_level, check_trace
from moesaic.trace.shown import NAMED, Shown, counted, short_layers, visible
from moesaic.trace.store import Trace

CELLS = 8_000_000  # numbers of one kind held at once: 32 MB


class Untestable(ValueError):
    """Domains that no test can tell apart; `words` says why, {"en": ..., "zh": ...}."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en)
        self.words = {"en": en, "zh": zh}


@dataclass(frozen=True, eq=False, repr=False)
class Preferences(Shown):
    """For every (layer, expert): the domain it is used in most beyond chance. Arrays are [L, E] unless said.

    domain: index into `domains`. lift: its rate of use there over its rate in all text; NaN for an unused expert.
    p_value: of the pair, corrected for all L*E pairs and for having taken the best domain. permutations: behind it;
    a p-value cannot be below 1 / (permutations + 1). documents: how many of each domain were compared, tokens: by how
    many first tokens each. rates: assignments per token of each domain, [L, D, E]; K/E is a fair share.
    """

    layers: tuple[str, ...]
    domains: tuple[str, ...]
    domain: np.ndarray
    lift: np.ndarray
    p_value: np.ndarray
    permutations: int
    documents: tuple[int, ...]
    tokens: int
    rates: np.ndarray

    def __repr__(self) -> str:
        found, names = self.found(), short_layers(self.layers)
        best = sorted(zip(*found.nonzero(), strict=True), key=lambda where: -self.lift[where])[:NAMED]
        named = ", ".join(
            f"{names[layer]} e{expert} {visible(self.domains[self.domain[layer, expert]], 60)} "
            f"({self.lift[layer, expert]:.2f}x)" for layer, expert in best
        )  # fmt: skip
        first = f"{found.sum():,} of {found.size:,} experts prefer a domain beyond chance (p <= 0.05, corrected)"
        return f"{first}{named and ', most of all '}{named}\n(more: .found(), .rates, .lift, .p_value, .to_dict())"

    def table(self, lang: str = "en") -> RenderableType:
        from moesaic.trace.statistics.load_table import preference_table

        return preference_table(self, lang)

    def found(self, alpha: float = 0.05) -> np.ndarray:
        """bool [L, E]: preferences that chance produces anywhere in at most `alpha` of all such runs."""
        return self.p_value <= alpha

    def to_dict(self, alpha: float = 0.05) -> dict[str, Any]:
        """The preferences found at `alpha`, for strict JSON."""
        rows = [
            {
                "layer": self.layers[layer],
                "expert": int(expert),
                "domain": self.domains[self.domain[layer, expert]],
                "lift": float(self.lift[layer, expert]),
                "p_value": float(self.p_value[layer, expert]),
            }
            for layer, expert in zip(*self.found(alpha).nonzero(), strict=True)
        ]
        documents = dict(zip(self.domains, self.documents, strict=True))
        return {
            "permutations": self.permutations,
            "documents": documents,
            "tokens_per_document": self.tokens,
            "preferences": rows,
        }


def domain_preference(
    trace: Trace,
    labels: Sequence[str] | None = None,
    *,
    permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
) -> Preferences:
    """Test which experts are used more in one domain than in others.

    `labels` name the domain of every sequence; those of the trace unless given. The unit of the test is the document,
    a sequence of the trace: tokens of one text are alike and would make anything significant. Documents are compared by
    as many first tokens each, and those that have fewer are left out: rates of short documents scatter more, and
    shuffles, which mix the lengths, would take that for preferences. Labels are shuffled over documents; each pair's
    excess rate is put in units of its own spread over the true labels and all shuffles, and the largest of all pairs in
    each shuffle is the yardstick (max-statistic of Westfall and Young, which bounds the chance of any false finding,
    however few the shuffles). `alpha` is the level at which its findings will be asked for, as of `found(alpha)`.

    Raises ValueError where there is not one label a sequence or a token has an expert twice; Untestable where fewer
    than two domains have tokens, or where of so few documents or permutations nothing could be found at `alpha`.
    """
    check_trace(trace)
    check_level(alpha)
    names = _labels_of(trace, labels)
    check_distinct(trace)
    if permutations < 1:
        raise ValueError(f"permutations={permutations} gives no p-value: use 1000, say")
    sequences, document = np.unique(trace.sequences.numpy(), return_inverse=True)  # a document is one with tokens
    names = [names[sequence] for sequence in sequences.tolist()]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(place) < 2:
        n = len(place)
        raise Untestable(
            f"{counted(n, 'domain')} with tokens: a preference needs at least two",
            f"有 token 的领域只有 {n} 个，至少要两个才谈得上偏好",
        )
    label = np.array([place[name] for name in names], np.min_scalar_type(len(place)))
    _check_within_reach(label, permutations, alpha)
    first, tokens = _first_tokens(document, label, alpha)
    compared, document = np.unique(document[first], return_inverse=True)
    label = label[compared]
    rng = np.random.default_rng(seed)
    shuffled = np.stack([label, *(rng.permutation(label) for _ in range(permutations))])
    layers = [
        _strongest(sequence_loads(picks.numpy()[first], trace.n_experts, document), tokens, shuffled)
        for picks in trace.picks
    ]
    best, observed, lift, largest, rates = (np.stack(found) for found in zip(*layers, strict=True))
    reached = permutations - np.searchsorted(np.sort(largest.max(0)), observed - 1e-6, side="left")
    return Preferences(
        layers=trace.layers,
        domains=tuple(place),
        domain=best,
        lift=lift,
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
        documents=tuple(np.bincount(label).tolist()),
        tokens=tokens,
        rates=rates,
    )


def _first_tokens(document: np.ndarray, label: np.ndarray, alpha: float) -> tuple[np.ndarray, int]:
    """bool [T]: the first tokens of every document that has so many; and how many.

    More tokens make a document's rates more certain, by their root, and leave more documents out: taken is the number
    for which that root, times the share of documents that the domain with the fewest keeps, is the largest, of those
    that keep enough for a finding at `alpha`. The shortest document's keeps all.
    """
    n_tokens, all_of_them = np.bincount(document), np.bincount(label)
    lengths = np.unique(n_tokens)
    by_domain = [np.sort(n_tokens[label == domain]) for domain in range(len(all_of_them))]
    kept = all_of_them - np.stack([np.searchsorted(sizes, lengths) for sizes in by_domain], 1)  # [lengths, D]
    best = (-(kept / all_of_them).min(1) * np.sqrt(lengths)).argsort(kind="stable")
    tokens = next(int(lengths[i]) for i in best if _least_p(kept[i]) < alpha)
    order = np.argsort(document, kind="stable")  # a batch's documents may be interleaved
    position = np.empty_like(order)
    position[order] = np.arange(len(order)) - (np.cumsum(n_tokens) - n_tokens)[document[order]]
    return (position < tokens) & (n_tokens >= tokens)[document], tokens


def _strongest(
    counts: np.ndarray, tokens: int, shuffled: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every expert of a layer: its best domain, by how many of its own spreads it is used more there, and its rate
    there over that in all text; the largest number of spreads of any expert in each shuffle; and all rates, [D, E].

    counts: of each document and expert, [N, E]. tokens: of every document. shuffled: the domain of each document,
    [P+1, N]; first the true one.
    """
    of_domain = tokens * np.bincount(shuffled[0]).astype(np.float32)[:, None]
    (n_shuffled, n_documents), n_domains = shuffled.shape, len(of_domain)
    step = max(CELLS // (n_shuffled * n_domains), 1)
    rows = max(CELLS // (n_documents * n_domains), 1)
    overall = counts.sum(0) / (tokens * n_documents)
    best, lift = np.zeros(len(overall), np.int64), np.zeros(len(overall))
    true_rates = np.zeros((n_domains, len(overall)), np.float32)
    observed = np.zeros(len(overall), np.float32)
    largest = np.full(n_shuffled - 1, -np.inf, np.float32)
    for start in range(0, len(overall), step):
        here = slice(start, start + step)
        columns = counts[:, here].astype(np.float32)
        sums = [_sums(shuffled[at : at + rows], n_domains, columns) for at in range(0, n_shuffled, rows)]
        rates = np.concatenate(sums) / of_domain  # [P+1, D, step]
        true_rates[:, here] = rates[0]
        excess = rates - overall[here].astype(np.float32)
        spread = excess.std(0)  # of all labellings alike: leaving out the true one would favour it
        used = spread > 1e-9  # an expert that is never, or always, used prefers nothing
        z = np.divide(excess, spread, out=np.zeros_like(excess), where=used)
        best[here] = z[0].argmax(0)
        observed[here] = z[0].max(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            lift[here] = np.take_along_axis(rates[0], best[None, here], 0)[0] / overall[here]
        largest = np.maximum(largest, z[1:].max(axis=(1, 2)))
    return best, observed, lift, largest, true_rates


def _sums(labels: np.ndarray, n_domains: int, columns: np.ndarray) -> np.ndarray:
    """Assignments of every domain, [shuffles, D, experts], by those of each document, [N, experts]."""
    return (labels[:, None, :] == np.arange(n_domains)[:, None]).astype(np.float32) @ columns


def sequence_loads(picks: np.ndarray, n_experts: int, document: np.ndarray) -> np.ndarray:
    """Assignments of every document to every expert of a layer, int64 [N, E].

    picks: of that layer, [T, K]. document: of every token, [T].
    """
    e, n_documents = n_experts, int(document.max(initial=-1)) + 1
    cell = document[:, None] * (e + 1) + picks
    counts = np.bincount(cell.ravel(), minlength=n_documents * (e + 1))
    return counts.reshape(n_documents, e + 1)[:, :e]  # the last column is the id E, "no expert"


def _labels_of(trace: Trace, labels: Sequence[str] | None) -> tuple[str, ...]:
    names = trace.labels if labels is None else tuple(labels)
    if names is None:
        raise ValueError("no domain labels: give one label for each sequence")
    if len(names) < trace.n_sequences:
        raise ValueError(f"{len(names)} labels for {trace.n_sequences} sequences: give one label a sequence")
    return names


def _check_within_reach(label: np.ndarray, permutations: int, alpha: float) -> None:
    """Refuse what cannot come out significant at `alpha`."""
    if (least := 1 / (permutations + 1)) > alpha:
        raise Untestable(
            f"of {counted(permutations, 'permutation')} no p-value is below {least:.2g}, and alpha is {alpha:g}",
            f"置换 {permutations:,} 次，p 值不会低于 {least:.2g}，而 alpha 是 {alpha:g}",
        )
    n, d = len(label), len(np.unique(label))
    if (least := _least_p(np.bincount(label))) >= alpha:
        raise Untestable(
            f"no preference among {counted(n, 'document')} in {counted(d, 'domain')} could have a p-value below "
            f"{least:.2g}, and alpha is {alpha:g}: give more documents a domain",
            f"{n} 个文档分属 {d} 个领域，任何偏好的 p 值都不会低于 {least:.2g}，而 alpha 是 {alpha:g}："
            "请给每个领域更多的文档",
        )


def _least_p(documents: np.ndarray) -> float:
    """The smallest p-value that a preference can have, by the number of documents of each domain.

    A preference for a domain is that for its documents. Every shuffle that deals these to it, or to another domain of
    as many, has the same preference: of `binom(documents, those of the domain)` equally likely draws, one each. Where
    that share is alpha itself, half of all seeds would find it.
    """
    n, (sizes, alike) = int(documents.sum()), np.unique(documents, return_counts=True)
    log_ways = [math.lgamma(n + 1) - math.lgamma(size + 1) - math.lgamma(n - size + 1) for size in sizes.tolist()]
    return min(domains / round(math.exp(min(log, 50.0))) for domains, log in zip(alike.tolist(), log_ways, strict=True))
