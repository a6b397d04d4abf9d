"""Two records of the same tokens: where they chose other experts, and whether rounding explains it or another rule."""

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.trace.compare.judge import Finding, Judgement, explain_layer, judge, precision_of
from moesaic.trace.rule.derive import dtype_of
from moesaic.trace.shown import visible
from moesaic.trace.store import Trace


class LayerDiff(NamedTuple):
    """One layer of a Diff. Counts are of tokens; what is not known is None.

    flips: other experts; ties: flips between scores that tie exactly; incomplete: fewer experts in one of the two;
    compared: tokens without the incomplete ones. margin: median at the flips that nothing before explains.
    weight_difference: the largest between equal sets, relative to the token's largest weight. score_difference: of
    the logits of tokens that had not parted before, root mean square, relative to that of the logits.
    """

    layer: str
    compared: int
    flips: int
    ties: int
    incomplete: int
    margin: float | None
    weight_difference: float | None
    score_difference: float | None


@dataclass(frozen=True, eq=False)
class Diff:
    """Where two traces of the same tokens route differently. Tokens lie sequence by sequence.

    flips, ties, incomplete: bool [L, T], see LayerDiff. origins: flips before which no token of the same text up to
    this one had parted, bool [L, T]; later ones follow from other hidden states. first_split: int64 [T], the first
    layer with a flip, or L. margins: float32 [L, T], how far scores were from the other choice, NaN where there is no
    flip; None where no scores were recorded, or by a rule that is not known.
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
        order = torch.arange(n_layers)[:, None].expand(self.flips.shape)
        return order.masked_fill(~self.flips, n_layers).amin(0)

    def by_layer(self) -> list[LayerDiff]:
        """One entry a layer, in forward order."""
        return [
            LayerDiff(
                layer=name,
                compared=int((~self.incomplete[i]).sum()),
                flips=int(self.flips[i].sum()),
                ties=int(self.ties[i].sum()),
                incomplete=int(self.incomplete[i].sum()),
                margin=None if self.margins is None else _median(self.margins[i][self.origins[i]]),
                weight_difference=_number(self.weight_differences, i),
                score_difference=_number(self.score_differences, i),
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
            "tokens": self.flips.shape[1],
            "flipped_share": _finite(self.share),
            "flipped_tokens_share": _finite(self.token_share),
            "first_splits": split.tolist(),
            "margin": None if self.margins is None else _median(self.margins[self.origins]),
            "layers": [entry._asdict() for entry in self.by_layer()],
        }

    def sentences(self, lang: str = "en") -> list[str]:
        """What was found and why, in plain words."""
        from moesaic.trace.compare.diff_table import sentences

        return sentences(self, lang)

    def __rich__(self) -> Any:
        from moesaic.trace.compare.diff_table import diff_table

        return diff_table(self)


def diff(a: Trace, b: Trace, *, precision: str | None = None) -> Diff:
    """Compare the experts of two traces of the same tokens, as sets, layer by layer, and judge the difference.

    precision: the coarser dtype of the two models, such as "bfloat16", within whose rounding scores may differ. Unless
    told it is that of the recorded logits, or bfloat16 where routers compute in float32 whatever the model does.
    ValueError where the traces are not of the same tokens, layers or sizes.
    """
    a, b = _aligned(a, b)
    told = dtype_of(precision)
    allowed = precision_of(a, b) if told is None else (told, False)
    rows, findings = [], []
    parted = torch.zeros(len(a), dtype=torch.bool)  # a flip in an earlier layer, of this token or of one before it
    for layer in range(a.n_layers):
        row, finding = _compare_layer(a, b, layer, parted, allowed[0])
        parted = parted | _from_here_on(row["flips"] | row["incomplete"], a.sequences)
        rows.append(row)
        findings.append(finding)
    stacked: dict[str, Any] = {
        name: None if any(row[name] is None for row in rows) else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }
    judgement = _whole(judge(findings, stacked, a, b, *allowed), a, b)
    return Diff(a.model or "a", b.model or "b", a.layers, **stacked, judgement=judgement)


def _whole(judgement: Judgement, a: Trace, b: Trace) -> Judgement:
    """The judgement, or none where it is good and layers gave no data: what was not seen may differ."""
    absent = sorted({*a.missing, *b.missing})
    if not absent:
        return judgement
    names = ", ".join(visible(name) for name in absent[:3]) + (", …" if len(absent) > 3 else "")
    reason = {
        "en": f"{len(absent)} layers of the model gave no data: {names}",
        "zh": f"模型中有 {len(absent)} 层没有数据：{names}",
    }
    good = judgement.verdict in ("identical", "near-ties")
    return Judgement("cannot tell" if good else judgement.verdict, (reason, *judgement.reasons))


def _compare_layer(
    a: Trace, b: Trace, layer: int, parted: Tensor, precision: torch.dtype
) -> tuple[dict[str, Any], Finding]:
    """What Diff holds of one layer, by field, and what its scores say about it."""
    ids = a.picks[layer].long(), b.picks[layer].long()
    ordered = [rows.sort(-1) for rows in ids]
    counts = [(rows < a.n_experts).sum(-1) for rows in ids]
    incomplete = counts[0] != counts[1]
    flips = (ordered[0].values != ordered[1].values).any(-1) & ~incomplete
    finding = explain_layer(a, b, layer, precision, flips)
    weights, apart = None, None
    if a.weights is not None and b.weights is not None:
        same = ~flips & ~incomplete
        here, there = (
            weights[layer].gather(-1, rows.indices)
            for weights, rows in zip((a.weights, b.weights), ordered, strict=True)
        )
        scale = here.abs().nan_to_num(0.0).amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
        both = here.isnan() & there.isnan()  # a NaN on one side only is infinitely far
        distance = (here - there).abs().masked_fill(both, 0.0).nan_to_num(torch.inf)
        apart = torch.where(same, distance.amax(-1) / scale, 0.0)
        weights, apart = apart.max(), apart[same & ~parted]
    row = {
        "flips": flips,
        "ties": flips & finding.tied,
        "incomplete": incomplete,
        "origins": flips & ~parted,
        "margins": None if finding.margins is None else finding.margins.masked_fill(~flips, torch.nan),
        "weight_differences": weights,
        "score_differences": _score_difference(a, b, layer, ~parted),
    }
    return row, finding._replace(weights_apart=apart)


def _score_difference(a: Trace, b: Trace, layer: int, rows: Tensor) -> Tensor | None:
    if a.logits is None or b.logits is None:
        return None
    here, there = a.logits[layer][rows].double(), b.logits[layer][rows].double()
    return ((here - there).pow(2).mean() / here.pow(2).mean()).sqrt().float()


def _from_here_on(marked: Tensor, sequences: Tensor) -> Tensor:
    """True for marked tokens and all that follow them in the same sequence. `sequences` is ascending."""
    counted = marked.long().cumsum(0)
    first = torch.searchsorted(sequences, sequences)  # where the sequence of each token begins
    return counted - counted[first] + marked[first].long() > 0


def _aligned(a: Trace, b: Trace) -> tuple[Trace, Trace]:
    """Both with their tokens sequence by sequence. ValueError, with the reason, unless they are of the same tokens."""
    for what, here, there in (
        ("MoE layers", a.n_layers, b.n_layers),
        ("experts", a.n_experts, b.n_experts),
        ("experts per token", a.top_k, b.top_k),
        ("tokens", len(a), len(b)),
    ):
        if here != there:
            raise ValueError(f"the traces cannot be compared: {here} {what} in one and {there} in the other")
    if not a.n_layers or not len(a):
        raise ValueError("the traces cannot be compared: there is nothing in them")
    for here, there in zip(a.layers, b.layers, strict=True):
        if _depth(here) != _depth(there) and None not in (_depth(here), _depth(there)):
            raise ValueError(
                f"the traces cannot be compared: layer {here!r} of one stands where the other has {there!r}: "
                "record the same layers"
            )
    if (
        min(a.n_sequences, b.n_sequences) == 1 < max(a.n_sequences, b.n_sequences)
    ):  # one of them does not tell texts apart
        known = a.sequences if a.n_sequences > 1 else b.sequences
        a, b = replace(a, sequences=known, labels=None), replace(b, sequences=known, labels=None)
    a, b = (_by_sequence(trace) for trace in (a, b))
    if not torch.equal(a.sequences, b.sequences):
        where = int((a.sequences != b.sequences).nonzero()[0])
        raise ValueError(f"the traces cannot be compared: their sequences are of other lengths, from token {where} on")
    if a.input_ids is not None and b.input_ids is not None and not torch.equal(a.input_ids, b.input_ids):
        where = int((a.input_ids != b.input_ids).nonzero()[0])
        here, there = int(a.input_ids[where]), int(b.input_ids[where])
        raise ValueError(
            f"the traces are not of the same tokens: token {where} is id {here} in one and {there} in the other"
        )
    return a, b


def _by_sequence(trace: Trace) -> Trace:
    order = trace.sequences.argsort(stable=True)
    return trace if torch.equal(order, torch.arange(len(trace))) else trace.select(order)


def _depth(name: str) -> int | None:
    """The number in a layer's name: 3 of "model.layers.3.mlp"."""
    found = re.findall(r"(?<![^.\s_])\d+(?![^.\s_])", name)
    return int(found[0]) if found else None


def _median(values: Tensor) -> float | None:
    values = values[values.isfinite()]
    return float(values.median()) if len(values) else None


def _number(values: Tensor | None, layer: int) -> float | None:
    return None if values is None else _finite(float(values[layer]))


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None
