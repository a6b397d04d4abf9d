"""Two records of the same tokens: where they chose other experts, and whether rounding explains it or another rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from rich.console import Group
from torch import Tensor

from moesaic.trace.compare.aligned import aligned, notes_of_both, tokens_checked, without_data
from moesaic.trace.compare.finding import Finding, explain_layer
from moesaic.trace.compare.judge import Judgement, judge, precision_of
from moesaic.trace.rule.derive import dtype_of, slices
from moesaic.trace.shown import Shown, counted, finite, listed
from moesaic.trace.slots import shared
from moesaic.trace.store import Trace


class LayerDiff(NamedTuple):
    """One layer of a Diff. Counts are of tokens; what is not known is None.

    origins: where the picks of a and of b were read. flips: other experts; incomplete: fewer experts in one of the
    two; compared: tokens without the incomplete ones. ties, margin: of the flips that nothing before explains, those
    between scores that tie exactly and the median of Diff.margins.
    weight_difference: the largest between equal sets, relative to the token's largest weight. score_difference: of
    the logits of tokens that had not parted before, root mean square, relative to that of the logits.
    """

    layer: str
    origins: tuple[str, str]
    compared: int
    flips: int
    ties: int
    incomplete: int
    margin: float | None
    weight_difference: float | None
    score_difference: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Diff(Shown):
    """Where two traces of the same tokens route differently. Tokens lie in the order of a.

    flips, ties, incomplete: bool [L, T], see LayerDiff. origins: flips before which no token of the same text up to
    this one had parted, bool [L, T]; later ones follow from other hidden states. first_split: int64 [T], the first
    layer with a flip, or L. margins: float32 [L, T], how far scores were from the other choice, NaN where `origins` is
    False; None where no scores were recorded, or by a rule that is not known. read_at: per layer, where the picks of a
    and of b were read. missing: MoE layers without data in either. checked: whether token ids were there to prove that
    the tokens are the same. notes_en, notes_zh: sentences on that.
    """

    a: str
    b: str
    layers: tuple[str, ...]
    flips: Tensor
    ties: Tensor
    incomplete: Tensor
    origins: Tensor
    margins: Tensor | None
    weight_differences: Tensor | None
    score_differences: Tensor | None
    judgement: Judgement
    read_at: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    checked: bool
    notes_en: tuple[str, ...]
    notes_zh: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.sentences()) + "\n(more: .by_layer(), .flips, .to_dict(), .sentences('zh'))"

    @property
    def verdict(self) -> str:
        """A key of judge.VERDICTS: "identical", "near-ties", "different scores", "different rule", "cannot tell"."""
        return self.judgement.verdict

    @property
    def share(self) -> float:
        """Share of (layer, token) pairs with other experts."""
        compared = int((~self.incomplete).sum())
        return int(self.flips.sum()) / compared if compared else float("nan")

    @property
    def token_share(self) -> float:
        """Share of tokens with other experts in some layer."""
        return float(self.flips.any(0).float().mean()) if self.flips.shape[1] else float("nan")

    @property
    def first_split(self) -> Tensor:
        n_layers = len(self.layers)
        order = torch.arange(n_layers, device="cpu")[:, None].expand(self.flips.shape)
        return order.masked_fill(~self.flips, n_layers).amin(0)

    @property
    def margin(self) -> float | None:
        """The median of `margins`; None where none is known."""
        return None if self.margins is None else _median(self.margins)

    def by_layer(self) -> list[LayerDiff]:
        """One entry a layer, in forward order."""
        return [
            LayerDiff(
                layer=name,
                origins=self.read_at[i],
                compared=int((~self.incomplete[i]).sum()),
                flips=int(self.flips[i].sum()),
                ties=int(self.ties[i].sum()),
                incomplete=int(self.incomplete[i].sum()),
                margin=None if self.margins is None else _median(self.margins[i]),
                weight_difference=_of_layer(self.weight_differences, i),
                score_difference=_of_layer(self.score_differences, i),
            )
            for i, name in enumerate(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and words, for JSON; what is not known is None."""
        split = torch.bincount(self.first_split, minlength=len(self.layers) + 1)[:-1]
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "reasons": [dict(reason) for reason in self.judgement.reasons],
            "notes": {"en": list(self.notes_en), "zh": list(self.notes_zh)},
            "missing": list(self.missing),
            "tokens": self.flips.shape[1],
            "tokens_checked": self.checked,
            "flipped_share": finite(self.share),
            "flipped_tokens_share": finite(self.token_share),
            "first_splits": split.tolist(),
            "margin": self.margin,
            "layers": [entry._asdict() for entry in self.by_layer()],
        }

    def sentences(self, lang: str = "en") -> list[str]:
        """What was found and why, in plain words."""
        from moesaic.trace.compare.diff_table import sentences

        return sentences(self, lang)

    def table(self, lang: str = "en") -> Group:
        from moesaic.trace.compare.diff_table import diff_table

        return diff_table(self, lang)


def diff(a: Trace, b: Trace, *, precision: str | None = None, done: Callable[[int], None] = lambda _: None) -> Diff:
    """Compare the experts of two traces of the same tokens, as sets, layer by layer, and judge the difference.

    precision: the coarser dtype of the two models, such as "bfloat16", within whose rounding scores may differ. Unless
    told it is that of the recorded logits, or bfloat16 where routers compute in float32 whatever the model does.
    done hears the number of layers as they are compared.
    ValueError where the traces are not of the same tokens, layers or sizes.
    """
    a, b = aligned(a, b)
    if not a.n_layers or not len(a):
        raise ValueError("the traces cannot be compared: there is nothing in them")
    told = dtype_of(precision)
    allowed = precision_of(a, b) if told is None else (told, False)
    rows, findings = [], []
    # a flip in an earlier layer, of this token or of one before it
    parted, texts = torch.zeros(len(a), dtype=torch.bool, device="cpu"), _Texts.of(a.sequences)
    for layer in range(a.n_layers):
        row, finding = _compare_layer(a, b, layer, parted, allowed[0])
        parted = parted | texts.from_here_on(row["flips"] | row["incomplete"])
        rows.append(row)
        findings.append(finding)
        done(1)
    stacked: dict[str, Any] = {
        name: None if any(row[name] is None for row in rows) else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }
    missing = without_data(a, b)
    en, zh = (tuple(notes_of_both(a, b, lang, missing=False)) for lang in ("en", "zh"))
    return Diff(
        a.model or "a",
        b.model or "b",
        a.layers,
        **stacked,
        judgement=_whole(judge(findings, stacked, a, b, *allowed), missing),
        read_at=tuple(zip(a.origins, b.origins, strict=True)),
        missing=missing,
        checked=tokens_checked(a, b),
        notes_en=en,
        notes_zh=zh,
    )


def _whole(judgement: Judgement, absent: Sequence[str]) -> Judgement:
    """The judgement, or none where it is good and layers gave no data: what was not seen may differ."""
    if not absent:
        return judgement
    reason = {
        "en": f"{counted(len(absent), 'layer')} of the model gave no data: {listed(absent)}",
        "zh": f"模型中有 {len(absent)} 层没有数据：{listed(absent, 'zh')}",
    }
    good = judgement.verdict in ("identical", "near-ties")
    return Judgement("cannot tell" if good else judgement.verdict, (reason, *judgement.reasons))


def _compare_layer(
    a: Trace, b: Trace, layer: int, parted: Tensor, precision: torch.dtype
) -> tuple[dict[str, Any], Finding]:
    """What Diff holds of one layer, by field, and what its scores say about it."""
    flips, incomplete = _unlike(a, b, layer)
    origins = flips & ~parted
    finding = explain_layer(a, b, layer, precision, origins)
    weights, apart = None, None
    if a.weights is not None and b.weights is not None:
        same = ~flips & ~incomplete
        picks = a.picks[layer], b.picks[layer]
        here, there = (
            weights[layer].masked_fill(ids >= a.n_experts, 0.0)
            for weights, ids in zip((a.weights, b.weights), picks, strict=True)
        )
        rows = (picks[0] != picks[1]).any(-1).nonzero().flatten()  # their slots are put into one order
        here[rows], there[rows] = (
            weights[rows].gather(-1, ids[rows].sort(-1).indices)
            for weights, ids in zip((here, there), picks, strict=True)
        )
        scale = here.abs().nan_to_num(0.0).amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
        both = here.isnan() & there.isnan()  # a NaN on one side only is infinitely far
        distance = (here - there).abs().masked_fill(both, 0.0).nan_to_num(torch.inf)
        apart = torch.where(same, distance.amax(-1) / scale, 0.0)
        weights, apart = apart.max(), apart[same & ~parted]
    row = {
        "flips": flips,
        "ties": finding.tied,
        "incomplete": incomplete,
        "origins": origins,
        "margins": finding.margins,
        "weight_differences": weights,
        "score_differences": _score_difference(a, b, layer, ~parted),
    }
    return row, finding._replace(weights_apart=apart)


def _unlike(a: Trace, b: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """Tokens with other experts in one of the two, and those with fewer, bool [T] both."""
    one, two = (trace.picks[layer].numpy() for trace in (a, b))
    had, has = (np.sum([slot < a.n_experts for slot in ids.T], axis=0) for ids in (one, two))
    fewer = had != has
    flips = (shared(one, two, a.n_experts) != had) & ~fewer
    return torch.from_numpy(flips), torch.from_numpy(fewer)


def _score_difference(a: Trace, b: Trace, layer: int, rows: Tensor) -> Tensor | None:
    if a.logits is None or b.logits is None:
        return None
    both = a.logits[layer], b.logits[layer]
    apart, size = torch.zeros(2, dtype=torch.float64, device="cpu")  # sums of squares
    for here in slices(len(a)):
        one, two = (logits[here][rows[here]].double() for logits in both)
        apart, size = apart + (one - two).pow(2).sum(), size + one.pow(2).sum()
    return (apart / size).sqrt().float()


class _Texts(NamedTuple):
    """Tokens in the order of their texts: which they are, where the text of each begins, and the place of each."""

    order: Tensor
    begins: Tensor
    place: Tensor

    @classmethod
    def of(cls, sequences: Tensor) -> Self:
        sequences, order = sequences.sort(stable=True)
        return cls(order, torch.searchsorted(sequences, sequences), order.argsort())

    def from_here_on(self, marked: Tensor) -> Tensor:
        """True for marked tokens and all that follow them in the same text."""
        marked = marked[self.order].long()
        counted = marked.cumsum(0)
        return (counted > (counted - marked)[self.begins])[self.place]


def _median(values: Tensor) -> float | None:
    values = values[values.isfinite()]
    return float(values.median()) if len(values) else None


def _of_layer(values: Tensor | None, layer: int) -> float | None:
    return None if values is None else finite(values[layer])
