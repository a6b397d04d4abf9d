"""How balanced the routing of every layer is, beside what chance gives, and what that means."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import Band
from moesaic.trace.chance.documents import Documents, LoadCounts, count_loads
from moesaic.trace.chance.placement import place_experts
from moesaic.trace.rule.distinct import check_distinct
from moesaic.trace.rule.given import check_level, check_trace, real_number, whole_number
from moesaic.trace.shown import Shown, origin_notes, short_layer, visible, words_of
from moesaic.trace.statistics import verdict
from moesaic.trace.statistics.measures import Measure, layer_measures
from moesaic.trace.statistics.run_verdict import run_status, run_verdict
from moesaic.trace.statistics.verdict import HEALTHY
from moesaic.trace.store import Trace

CAPACITIES = (1.0, 1.25, 2.0)  # capacity factors that papers and frameworks use


@dataclass(frozen=True, eq=False, repr=False)
class LayerReport:
    """Balance of one layer over a whole run.

    load: assignments per expert, [E]. measures: by name (measures.py). status: a key of STATUSES.
    by_documents: whether the verdict holds for texts like these (documents were resampled) or for these texts only.
    origin: where its picks were read (see Trace.origins). hot, starved, dead: experts significantly above or below
    their share, by more than the effect sizes of verdict.py. p_value: corrected for all experts and layers.
    design_effect: by how much the likeness of a document's tokens inflates variances. least_seen: the smallest
    measured load, over a fair one, that would have been found.
    """

    layer: str
    origin: str
    n_tokens: int
    n_documents: int
    config: MoEConfig
    load: np.ndarray
    measures: Mapping[str, Measure]
    status: str
    by_documents: bool
    hot: tuple[int, ...]
    starved: tuple[int, ...]
    dead: tuple[int, ...]
    p_value: float
    design_effect: float
    least_seen: float

    def __repr__(self) -> str:
        return f"LayerReport({short_layer(self.layer)}: {self.verdict()}; see .load, .measures, .hot, .starved, .dead)"

    def verdict(self, lang: str = "en") -> str:
        return words_of(verdict.words_of_layer(self), lang)

    @property
    def is_healthy(self) -> bool:
        """False also where there is no data, or too little: nothing seen is not health."""
        return self.status in HEALTHY

    @property
    def load_band(self) -> Band | None:
        """5th to 95th percentile of one expert's load under random routing: binomial(T, K/E), as a normal, as much
        wider as the likeness of a document's tokens makes it."""
        if not self.n_tokens:
            return None
        p = float(self.load.sum()) / (self.n_tokens * len(self.load))
        mean, spread = self.n_tokens * p, float(np.sqrt(self.n_tokens * p * (1 - p) * self.design_effect))
        return Band(mean, max(mean - 1.645 * spread, 0.0), mean + 1.645 * spread, mean + 3.09 * spread)


@dataclass(frozen=True, eq=False, repr=False)
class Stats(Shown):
    """Balance of all layers of a trace. Arrays are [L] or [L, E], in the order of `layers`.

    layers: a report for each. missing: MoE layers of the model that the trace has no data of. load: int64 [L, E].
    values, low, high: every number by name and its band, float64 [L], NaN where there is no data. placement: the node
    of every expert or None. status: of the run, a key of STATUSES or "partly" (what was judged is healthy, some layers
    could not be judged).
    """

    model: str
    n_tokens: int
    n_documents: int
    layers: tuple[LayerReport, ...]
    missing: tuple[str, ...]
    load: np.ndarray
    values: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    placement: np.ndarray | None
    alpha: float
    seed: int
    status: str

    def __repr__(self) -> str:
        return self.verdict() + "\n(more: .layers, .values, .load, .to_dict(), .verdict('zh'))"

    def verdict(self, lang: str = "en") -> str:
        """Sentences, one a line, the worst first; at the end, where picks were not read at the experts."""
        layers, origins = [report.layer for report in self.layers], [report.origin for report in self.layers]
        said = run_verdict(self.layers, self.missing, self.n_tokens, self.n_documents, lang)
        return "\n".join([*said, *origin_notes(layers, origins, lang)])

    @property
    def is_healthy(self) -> bool:
        """Every layer of the model was judged and none is imbalanced, dead or collapsed."""
        return self.status in HEALTHY

    @property
    def is_sick(self) -> bool:
        return self.status in verdict.SICK

    def to_dict(self) -> dict[str, Any]:
        """All of it for strict JSON: numbers that are not known are None."""
        from moesaic.trace.statistics.stats_dict import as_dict

        return as_dict(self)

    def table(self, lang: str = "en") -> Group:
        from moesaic.trace.statistics.tables import loads_table, stats_tables

        said = [Text(line) for line in [*filter(None, [visible(self.model)]), *self.verdict(lang).splitlines()]]
        return Group(*said, *stats_tables(self, lang).renderables, loads_table(self, lang))


def stats(
    trace: Trace,
    *,
    placement: Sequence[int] | np.ndarray | None = None,
    nodes: int | None = None,
    capacity: float | Sequence[float] = CAPACITIES,
    alpha: float = 0.05,
    seed: int = 0,
    done: Callable[[int], None] = lambda _: None,
) -> Stats:
    """Balance numbers of every layer beside chance, and a verdict on the run.

    A verdict other than "within chance" needs a load that a run of random routing has anywhere, in any expert of any
    layer, with probability `alpha` at most, and one other than "balanced" an effect that matters as well. Documents
    are what is resampled; where there are too few of them the verdict is about these texts only, and says so.

    placement: the node of every expert, or nodes: their number, experts in equal runs. capacity: factors c, or one;
    what goes beyond ceil(c*T*K/E) assignments of an expert counts as dropped, the whole trace being one batch. done
    hears the number of layers as they are judged. ValueError where a token has an expert twice.
    """
    check_trace(trace)
    factors = _checked(alpha, capacity)
    if not 0 <= (seed := whole_number(seed, "seed")) < 2**32:
        raise ValueError(f"seed={seed} must lie between 0 and 2^32 - 1: use 0, say")
    check_distinct(trace)
    placed, nodes = None, None if nodes is None else whole_number(nodes, "nodes", 8)
    if placement is not None or nodes is not None:
        placed = place_experts(trace.n_experts, nodes=nodes, placement=placement)
    reports = _reports(trace, range(trace.n_layers), placed, factors, alpha, seed, done)
    names = list(dict.fromkeys(name for report in reports for name in report.measures))
    measured = {name: [report.measures.get(name) for report in reports] for name in names}
    missing = tuple(trace.missing)
    return Stats(
        model=trace.model,
        n_tokens=len(trace),
        n_documents=int(np.unique(trace.sequences.numpy()).size),
        layers=reports,
        missing=missing,
        load=np.stack([report.load for report in reports]) if reports else np.zeros((0, trace.n_experts), np.int64),
        values={name: _column(row, "value") for name, row in measured.items()},
        low={name: _column(row, "low") for name, row in measured.items()},
        high={name: _column(row, "high") for name, row in measured.items()},
        placement=placed,
        alpha=alpha,
        seed=seed,
        status=run_status(reports, missing),
    )


def layer_report(trace: Trace, layer: int = 0) -> LayerReport:
    """The report of one layer, the same as `stats` gives: corrected for all layers of the trace."""
    return _reports(trace, [range(trace.n_layers)[layer]], None, CAPACITIES, 0.05, 0)[0]


def layer_reports(trace: Trace) -> list[LayerReport]:
    """`layer_report` of every layer, in forward order."""
    return list(_reports(trace, range(trace.n_layers), None, CAPACITIES, 0.05, 0))


def _reports(
    trace: Trace,
    layers: Sequence[int],
    placement: np.ndarray | None,
    capacity: tuple[float, ...],
    alpha: float,
    seed: int,
    done: Callable[[int], None] = lambda _: None,
) -> tuple[LayerReport, ...]:
    documents, counts, by_documents = Documents.of(trace), [], []
    for layer in layers:
        count = count_loads(trace.picks[layer].numpy(), trace.n_experts, documents)
        needed = verdict.documents_needed(count.rate, trace.n_experts, trace.n_layers, alpha)
        counts.append(count)
        by_documents.append(count.n_clusters >= needed)
    tests = verdict.judge_loads(counts, trace.n_layers, by_documents)
    seen = verdict.least_seen(counts, tests, by_documents, alpha) if counts else np.zeros(0)
    rows = zip(layers, counts, tests, by_documents, seen, strict=True)
    found = []
    for layer, count, test, whole, least in rows:
        measures = layer_measures(trace, layer, count, documents if whole else None, placement, capacity, seed)
        found.append(_report(trace, layer, count, test, whole, measures, float(least), documents, alpha))
        done(1)
    return tuple(found)


def _report(
    trace: Trace,
    layer: int,
    counts: LoadCounts,
    test: verdict.LoadTest,
    by_documents: bool,
    measures: Mapping[str, Measure],
    least: float,
    documents: Documents,
    alpha: float,
) -> LayerReport:
    numbers = {name: measure.value for name, measure in measures.items()}
    chance = {name: measure.band.mean for name, measure in measures.items() if measure.band is not None}
    status = verdict.status_of(counts, test, numbers, chance, alpha)
    named = {"hot": verdict.hot, "starved": verdict.starved, "dead": verdict.dead}
    judged = status not in verdict.UNJUDGED
    experts = {name: tuple(find(counts, test, alpha).tolist()) if judged else () for name, find in named.items()}
    return LayerReport(
        layer=trace.layers[layer],
        origin=trace.origins[layer],
        n_tokens=counts.n_tokens if counts.load.sum() else 0,
        n_documents=documents.n_documents if counts.load.sum() else 0,
        config=trace.configs[layer],
        load=counts.load,
        measures=measures,
        status=status,
        by_documents=by_documents,
        p_value=test.p_value if judged else float("nan"),
        design_effect=counts.design_effect if by_documents else 1.0,
        least_seen=least,
        **experts,
    )


def _column(row: Sequence[Measure | None], what: str) -> np.ndarray:
    return np.array([float("nan") if measure is None else getattr(measure, what) for measure in row])


def _checked(alpha: float, capacity: float | Sequence[float]) -> tuple[float, ...]:
    """The capacity factors; ValueError for numbers that make no sense."""
    check_level(alpha)
    several = isinstance(capacity, Sequence | np.ndarray) and not isinstance(capacity, str)
    factors = [real_number(factor, "capacity", 1.25) for factor in (capacity if several else (capacity,))]
    if bad := [factor for factor in factors if not 0 < factor < float("inf")]:
        raise ValueError(f"capacity={bad[0]} must be a positive number: use 1.25, say")
    return tuple(factors)
