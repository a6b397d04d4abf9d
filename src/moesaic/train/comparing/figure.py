"""Runs side by side, drawn from their records: loss, MaxVio, load of every expert over time, paths of the biases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.trace.figures.figure import new_figure
from moesaic.trace.figures.font import figure_style
from moesaic.trace.shown import short_layer, visible, words_of
from moesaic.train.comparing.runs import Run, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[str, dict[str, Any]] = {
    "en": {
        "loss": "held-out loss", "nats": "nats per token", "vio": "MaxVio of the worst layer", "step": "step",
        "last": "held-out loss at the last evaluation", "strip": "load / fair share", "bias": "selection bias",
        "expert": "expert", "none": "no bias", "chance": "chance",
        "layer": "above: thin lines and dots are seeds, thick lines their mean; below: {layer} of {runs}",
    },
    "zh": {
        "loss": "留出集损失", "nats": "nat / token", "vio": "最差一层的 MaxVio", "step": "步",
        "last": "最后一次评估的留出集损失", "strip": "负载 / 应得份额", "bias": "选择偏置",
        "expert": "专家", "none": "没有偏置", "chance": "随机",
        "layer": "上：细线和点是各个种子，粗线是其均值；下：{runs} 的 {layer}",
    },
}  # fmt: skip
COLORS = ("#4c78a8", "#e45756", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#8c8c8c")
HOTTEST = 3.0  # times the fair share, where the colours of the strips end
STRIPS = 8  # ways to balance with a strip of their own
CLOSER = 1.5  # nats above the best loss, where the curves are cut: what differs lies at their ends


def runs_figure(runs: Sequence[Run], lang: str = "en", *, layer: str | None = None) -> "Figure":
    """Curves of all runs, a colour for each balance; below, for the first run of each, its strip and its biases.

    layer: whose loads and biases are drawn; the last one unless given. ValueError for a layer that a run has not.
    """
    labels = words_of(LABELS, lang)
    groups: dict[str, list[Run]] = {}
    for name, run in zip(names_of(runs), runs, strict=True):
        groups.setdefault(name, []).append(run)
    firsts = {name: members[0] for name, members in list(groups.items())[:STRIPS]}
    layer = layer or list(runs[0].loads)[-1]
    for run in firsts.values():
        if layer not in run.loads:
            raise ValueError(f"layer={layer!r} is not in run {run.name}: use one of {', '.join(run.loads)}")
    with figure_style():
        fig = new_figure(16, 9)
        above, below = fig.add_gridspec(2, 1, height_ratios=[1, 1.25], hspace=0.3)
        loss, vio, last = (fig.add_subplot(place) for place in above.subgridspec(1, 3, wspace=0.32))
        _draw_curves(loss, vio, groups, labels)
        _draw_last(last, groups, labels)
        grid = below.subgridspec(2, len(firsts), hspace=0.35, wspace=0.12).subplots(squeeze=False, sharey="row")
        strips = []
        for column, (name, run) in enumerate(firsts.items()):
            strips.append(_draw_strip(grid[0, column], run, layer))
            grid[0, column].set_title(visible(name, 30), fontsize=11)
            _draw_bias(grid[1, column], run, layer, labels)
        grid[0, 0].set_ylabel(labels["expert"])
        grid[1, 0].set_ylabel(labels["bias"])
        bars = [fig.colorbar(strips[0], ax=row.tolist(), fraction=0.015, pad=0.01, extend="max") for row in grid]
        bars[0].ax.set(ylim=(0, HOTTEST), ylabel=labels["strip"])
        bars[1].ax.set_visible(False)  # it keeps both rows as wide
        names = ", ".join(visible(run.name, 30) for run in firsts.values())
        fig.suptitle(labels["layer"].format(layer=short_layer(layer, lang), runs=names), fontsize=11, y=0.94)
    return fig


def _draw_curves(loss: "Axes", vio: "Axes", groups: dict[str, list[Run]], labels: dict[str, Any]) -> None:
    """Every run thin; thick the mean of those of one balance, at the steps that all of them have."""
    for place, (name, members) in enumerate(groups.items()):
        colour = COLORS[place % len(COLORS)]
        steps = sorted(set.intersection(*(set(run.steps) for run in members)))
        for axis, curves in ((loss, [run.loss for run in members]), (vio, [run.worst_vio for run in members])):
            for run, curve in zip(members, curves, strict=True):
                axis.plot(run.steps, curve, color=colour, alpha=0.45, lw=0.8)
            common = [curve[np.isin(run.steps, steps)] for run, curve in zip(members, curves, strict=True)]
            axis.plot(steps, np.mean(common, axis=0), color=colour, lw=2, label=visible(name, 30))
    runs = [run for members in groups.values() for run in members]
    loss.set(title=labels["loss"], xlabel=labels["step"], ylabel=labels["nats"])
    known = np.concatenate([run.loss[np.isfinite(run.loss)] for run in runs])
    if len(known):  # a run that diverged at once has none
        loss.set_ylim(known.min() - 0.05, min(known.min() + CLOSER, known.max()) + 0.05)
    low, high = max((run.chance for run in runs), key=lambda band: band[1])
    vio.axhspan(low, high, color="grey", alpha=0.25, lw=0, label=labels["chance"])
    vio.set(title=labels["vio"], xlabel=labels["step"], yscale="log")
    vio.legend(frameon=False, fontsize=9, ncols=2)


def _draw_last(axis: "Axes", groups: dict[str, list[Run]], labels: dict[str, Any]) -> None:
    """A row for each balance: a dot for each seed, a stroke for their mean."""
    for place, members in enumerate(groups.values()):
        colour, values = COLORS[place % len(COLORS)], [run.loss[-1] for run in members]
        axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
        axis.plot([np.mean(values)] * 2, [place - 0.25, place + 0.25], color=colour, lw=2)
    axis.set_yticks(range(len(groups)), [visible(name, 30) for name in groups], fontsize=9)
    axis.invert_yaxis()
    axis.set(title=labels["last"], xlabel=labels["nats"])


def _draw_strip(axis: "Axes", run: Run, layer: str) -> Any:
    """Experts from top to bottom, steps from left to right; grey is the fair share."""
    load = run.loads[layer] / run.loads[layer].mean(1, keepdims=True)
    image = axis.imshow(load.T, aspect="auto", cmap="RdBu_r", vmin=2 - HOTTEST, vmax=HOTTEST, interpolation="nearest")
    ticks = np.linspace(0, len(run.steps) - 1, min(len(run.steps), 4)).astype(int)
    axis.set_xticks(ticks, [str(run.steps[tick]) for tick in ticks])
    return image


def _draw_bias(axis: "Axes", run: Run, layer: str, labels: dict[str, Any]) -> None:
    axis.set_xlabel(labels["step"])
    bias = run.bias.get(layer)
    if bias is None or not bias.any():
        axis.text(0.5, 0.5, labels["none"], ha="center", va="center", color="grey", transform=axis.transAxes)
        axis.set_xticks([])
        return
    axis.plot(run.steps, bias, lw=0.8, alpha=0.8)
