"""Which experts prefer which domain, tested against relabelled sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.trace.store import Trace


@dataclass(frozen=True, eq=False)
class Preferences:
    """For every (layer, expert): the domain it is used in most beyond chance. All arrays are [L, E].

    domain: index into `domains`. lift: its rate of use there over its rate in all text; NaN for an unused expert.
    p_value: of the pair, corrected for all L*E pairs and for having taken the best domain. permutations: behind it;
    a p-value cannot be below 1 / (permutations + 1).
    """

    domains: tuple[str, ...]
    domain: np.ndarray
    lift: np.ndarray
    p_value: np.ndarray
    permutations: int
    n_sequences: int

    def found(self, alpha: float = 0.05) -> np.ndarray:
        """bool [L, E]: preferences that chance produces anywhere in at most `alpha` of all such runs."""
        return self.p_value <= alpha


def domain_preference(
    trace: Trace, labels: Sequence[str] | None = None, *, permutations: int = 1000, seed: int = 0
) -> Preferences:
    """Test which experts are used more in one domain than in others.

    `labels` name the domain of every sequence; those of the trace unless given. The unit of the test is the sequence:
    tokens of one text are alike and would make anything significant. Labels are shuffled over sequences; each pair's
    excess rate is put in units of its own spread over the shuffles, and the largest of all pairs in each shuffle is
    the yardstick (max-statistic of Westfall and Young, which bounds the chance of any false finding).

    Raises ValueError where there are no tokens, fewer than two domains, or not one label a sequence.
    """
    names = trace.labels if labels is None else tuple(labels)
    if names is None:
        raise ValueError("no domain labels: give one label for each sequence")
    if len(names) < trace.n_sequences:
        raise ValueError(f"{len(names)} labels for {trace.n_sequences} sequences: give one label a sequence")
    counts, n_tokens = sequence_loads(trace, len(names))  # [N, L*E], [N]
    counts, n_tokens, names = counts[n_tokens > 0], n_tokens[n_tokens > 0], _kept(names, n_tokens > 0)
    domains = tuple(dict.fromkeys(names))
    if len(domains) < 2:
        raise ValueError(f"{len(domains)} domains with tokens: a preference needs at least two")
    label = np.array([domains.index(name) for name in names])

    rng = np.random.default_rng(seed)
    shuffled = np.stack([label, *(rng.permutation(label) for _ in range(permutations))])
    member = (shuffled[:, None, :] == np.arange(len(domains))[:, None]).astype(np.float32)  # [P+1, domains, N]
    rate = (member @ counts.astype(np.float32)) / (member @ n_tokens.astype(np.float32))[..., None]
    overall = counts.sum(0) / n_tokens.sum()
    excess = rate - overall.astype(np.float32)  # [P+1, domains, L*E]
    spread = excess[1:].std(0)
    used = spread > 1e-9  # an expert that is never, or always, used prefers nothing
    z = np.divide(excess, spread, out=np.zeros_like(excess), where=used)

    best = z[0].argmax(0)
    observed = z[0].max(0)
    largest = np.sort(z[1:].max(axis=(1, 2)))
    reached = permutations - np.searchsorted(largest, observed - 1e-6, side="left")
    shape = (trace.n_layers, trace.n_experts)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.take_along_axis(rate[0], best[None], 0)[0] / overall
    return Preferences(
        domains=domains,
        domain=best.reshape(shape),
        lift=lift.astype(float).reshape(shape),
        p_value=((1 + reached) / (1 + permutations)).reshape(shape),
        permutations=permutations,
        n_sequences=len(names),
    )


def sequence_loads(trace: Trace, n_sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Assignments of every sequence to every (layer, expert), int64 [N, L*E], and tokens of every sequence, [N]."""
    n_layers, e = trace.n_layers, trace.n_experts
    picks, sequence = trace.picks.numpy().astype(np.int64), trace.sequences.numpy()
    cell = (sequence[None, :, None] * n_layers + np.arange(n_layers)[:, None, None]) * (e + 1) + picks
    counts = np.bincount(cell.ravel(), minlength=n_sequences * n_layers * (e + 1))
    counts = counts.reshape(n_sequences, n_layers, e + 1)[..., :e]  # the last column is the id E, "no expert"
    return counts.reshape(n_sequences, n_layers * e), np.bincount(sequence, minlength=n_sequences)


def _kept(names: Sequence[str], keep: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, kept in zip(names, keep, strict=True) if kept)
