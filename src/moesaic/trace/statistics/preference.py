"""Which experts prefer which domain, tested against relabelled documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_trace
from moesaic.trace.shown import counted
from moesaic.trace.store import Trace

LEVEL = 0.05  # the level that a preference must be able to reach
CELLS = 8_000_000  # rates of shuffles, domains and experts held at once: 32 MB


class Untestable(ValueError):
    """Domains that no test can tell apart; `words` says why, {"en": ..., "zh": ...}."""

    def __init__(self, en: str, zh: str) -> None:
        super().__init__(en)
        self.words = {"en": en, "zh": zh}


@dataclass(frozen=True, eq=False)
class Preferences:
    """For every (layer, expert): the domain it is used in most beyond chance. All arrays are [L, E].

    domain: index into `domains`. lift: its rate of use there over its rate in all text; NaN for an unused expert.
    p_value: of the pair, corrected for all L*E pairs and for having taken the best domain. permutations: behind it;
    a p-value cannot be below 1 / (permutations + 1). documents: how many each domain has.
    """

    domains: tuple[str, ...]
    domain: np.ndarray
    lift: np.ndarray
    p_value: np.ndarray
    permutations: int
    documents: tuple[int, ...]

    def found(self, alpha: float = 0.05) -> np.ndarray:
        """bool [L, E]: preferences that chance produces anywhere in at most `alpha` of all such runs."""
        return self.p_value <= alpha

    def to_dict(self, layers: Sequence[str]) -> dict[str, Any]:
        """The preferences found, for strict JSON. layers: the names of the L layers."""
        rows = [
            {
                "layer": layers[layer],
                "expert": int(expert),
                "domain": self.domains[self.domain[layer, expert]],
                "lift": float(self.lift[layer, expert]),
                "p_value": float(self.p_value[layer, expert]),
            }
            for layer, expert in zip(*self.found().nonzero(), strict=True)
        ]
        documents = dict(zip(self.domains, self.documents, strict=True))
        return {"permutations": self.permutations, "documents": documents, "preferences": rows}


def domain_preference(
    trace: Trace, labels: Sequence[str] | None = None, *, permutations: int = 1000, seed: int = 0
) -> Preferences:
    """Test which experts are used more in one domain than in others.

    `labels` name the domain of every sequence; those of the trace unless given. The unit of the test is the document,
    a sequence of the trace: tokens of one text are alike and would make anything significant. Labels are shuffled over
    documents; each pair's
    excess rate is put in units of its own spread over the shuffles, and the largest of all pairs in each shuffle is
    the yardstick (max-statistic of Westfall and Young, which bounds the chance of any false finding).

    Raises ValueError where there is not one label a sequence or a token has an expert twice; Untestable where fewer
    than two domains have tokens, or so few sequences that no shuffle could be significant.
    """
    check_trace(trace)
    names = _labels_of(trace, labels)
    check_distinct(trace)
    if permutations < 1:
        raise ValueError(f"permutations={permutations} gives no p-value: use 1000, say")
    counts, n_tokens = sequence_loads(trace, len(names))  # [N, L*E], [N]
    counts, n_tokens, names = counts[n_tokens > 0], n_tokens[n_tokens > 0], _kept(names, n_tokens > 0)
    domains = tuple(dict.fromkeys(names))
    if len(domains) < 2:
        n = len(domains)
        raise Untestable(
            f"{counted(n, 'domain')} with tokens: a preference needs at least two",
            f"有 token 的领域只有 {n} 个，至少要两个才谈得上偏好",
        )
    label = np.array([domains.index(name) for name in names])
    _check_documents(label, len(domains))
    rng = np.random.default_rng(seed)
    shuffled = np.stack([label, *(rng.permutation(label) for _ in range(permutations))])
    member = (shuffled[:, None, :] == np.arange(len(domains))[:, None]).astype(np.float32)  # [P+1, domains, N]
    member /= (member @ n_tokens.astype(np.float32))[..., None]  # a product with counts is then a rate
    overall = counts.sum(0) / n_tokens.sum()
    best, observed, rate, largest = _strongest(counts, overall, member)
    reached = permutations - np.searchsorted(np.sort(largest), observed - 1e-6, side="left")
    shape = (trace.n_layers, trace.n_experts)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = rate / overall
    return Preferences(
        domains=domains,
        domain=best.reshape(shape),
        lift=lift.astype(float).reshape(shape),
        p_value=((1 + reached) / (1 + permutations)).reshape(shape),
        permutations=permutations,
        documents=tuple(np.bincount(label).tolist()),
    )


def _strongest(
    counts: np.ndarray, overall: np.ndarray, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For every pair (layer, expert): its best domain, by how many of its own spreads it is used more there, and its
    rate there; and the largest number of spreads of any pair in each shuffle, the first of which is no shuffle."""
    step = max(CELLS // (member.shape[0] * member.shape[1]), 1)
    best, observed = np.zeros(len(overall), np.int64), np.zeros(len(overall), np.float32)
    rate, largest = np.zeros(len(overall), np.float32), np.full(len(member) - 1, -np.inf, np.float32)
    for start in range(0, len(overall), step):
        here = slice(start, start + step)
        excess = member @ counts[:, here].astype(np.float32)  # [P+1, domains, step]
        own = excess[0].copy()
        excess -= overall[here].astype(np.float32)
        spread = excess[1:].std(0)
        used = spread > 1e-9  # an expert that is never, or always, used prefers nothing
        z = np.divide(excess, spread, out=np.zeros_like(excess), where=used)
        best[here] = z[0].argmax(0)
        observed[here] = z[0].max(0)
        rate[here] = np.take_along_axis(own, best[None, here], 0)[0]
        largest = np.maximum(largest, z[1:].max(axis=(1, 2)))
    return best, observed, rate, largest


def sequence_loads(trace: Trace, n_sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Assignments of every sequence to every (layer, expert), int64 [N, L*E], and tokens of every sequence, [N]."""
    n_layers, e = trace.n_layers, trace.n_experts
    sequence = trace.sequences.numpy()
    counts = np.empty((n_sequences, n_layers, e), np.int64)
    for layer in range(n_layers):
        cell = sequence[:, None] * (e + 1) + trace.picks[layer].numpy()
        here = np.bincount(cell.ravel(), minlength=n_sequences * (e + 1))
        counts[:, layer] = here.reshape(n_sequences, e + 1)[:, :e]  # the last column is the id E, "no expert"
    return counts.reshape(n_sequences, n_layers * e), np.bincount(sequence, minlength=n_sequences)


def _labels_of(trace: Trace, labels: Sequence[str] | None) -> tuple[str, ...]:
    names = trace.labels if labels is None else tuple(labels)
    if names is None:
        raise ValueError("no domain labels: give one label for each sequence")
    if len(names) < trace.n_sequences:
        raise ValueError(f"{len(names)} labels for {trace.n_sequences} sequences: give one label a sequence")
    return names


def _check_documents(label: np.ndarray, n_domains: int) -> None:
    """Refuse what cannot come out significant: labels that can be dealt to the documents in few ways only."""
    sizes = np.bincount(label, minlength=n_domains)
    ways = math.exp(min(math.lgamma(len(label) + 1) - sum(math.lgamma(size + 1) for size in sizes.tolist()), 50.0))
    if ways < 1 / LEVEL:
        raise Untestable(
            f"{len(label)} documents in {n_domains} domains can be labelled in {ways:.0f} ways only, so that no "
            f"preference could have a p-value below {LEVEL}: give more documents, four a domain, say",
            f"{len(label)} 个文档分属 {n_domains} 个领域，只有 {ways:.0f} 种贴标签的方式，任何偏好的 p 值都到不了 "
            f"{LEVEL} 以下：请给更多文档，例如每个领域四个",
        )


def _kept(names: Sequence[str], keep: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, kept in zip(names, keep, strict=True) if kept)
