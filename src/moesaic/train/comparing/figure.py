"""Runs side by side, drawn from their records: loss, MaxVio, load of every expert over time, paths of the biases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.trace.figures.figure import new_figure
from moesaic.trace.figures.font import figure_style
from moesaic.trace.shown import short_layer, visible, words_of
from moesaic.train.comparing.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[str, dict[str, Any]] = {
    "en": {
        "loss": "held-out loss", "nats": "nats per token", "vio": "MaxVio of the worst layer", "step": "step",
        "strip": "{run}: load / fair share", "bias": "{run}: selection bias", "expert": "expert", "none": "no bias",
        "layer": "strips and biases: {layer}",
    },
    "zh": {
        "loss": "留出集损失", "nats": "nat / token", "vio": "最差一层的 MaxVio", "step": "步",
        "strip": "{run}：负载 / 应得份额", "bias": "{run}：选择偏置", "expert": "专家", "none": "没有偏置",
        "layer": "负载与偏置所示的层：{layer}",
    },
}  # fmt: skip
COLORS = ("#4c78a8", "#e45756", "#f58518", "#54a24b", "#b279a2", "#72b7b2", "#9d755d", "#8c8c8c")
HOTTEST = 3.0  # times the fair share, where the colours of the strips end
STRIPS = 8  # runs with a strip of their own


def runs_figure(runs: Sequence[Run], lang: str = "en", *, layer: str | None = None) -> "Figure":
    """Curves of all runs, a colour for each balance; below, for the first run of each, its strip and its biases.

    layer: whose loads and biases are drawn; the last one unless given. ValueError for a layer that a run has not.
    """
    labels = words_of(LABELS, lang)
    firsts = list({run.balance: run for run in reversed(runs)}.values())[::-1][:STRIPS]
    layer = layer or list(firsts[0].loads)[-1]
    for run in firsts:
        if layer not in run.loads:
            raise ValueError(f"layer={layer!r} is not in run {run.name}: use one of {', '.join(run.loads)}")
    colours = {run.balance: COLORS[place % len(COLORS)] for place, run in enumerate(firsts)}
    with figure_style():
        fig = new_figure(14, 4.2 + 2.2 * len(firsts))
        grid = fig.add_gridspec(1 + len(firsts), 2, height_ratios=[2.0] + [1.0] * len(firsts))
        loss, vio = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1])
        for run in runs:
            style = {"color": colours.get(run.balance, "grey"), "alpha": 0.8, "lw": 1.4}
            label = run.balance if run in firsts else None
            loss.plot(run.steps, run.loss, label=label, **style)
            vio.plot(run.steps, run.worst_vio, label=label, **style)
        loss.set(title=labels["loss"], xlabel=labels["step"], ylabel=labels["nats"])
        vio.set(title=labels["vio"], xlabel=labels["step"], yscale="log")
        vio.legend(frameon=False, fontsize=9)
        for row, run in enumerate(firsts, 1):
            _draw_strip(fig.add_subplot(grid[row, 0]), run, layer, labels)
            _draw_bias(fig.add_subplot(grid[row, 1]), run, layer, labels)
        fig.suptitle(labels["layer"].format(layer=short_layer(layer, lang)), fontsize=11)
        fig.tight_layout()
    return fig


def _draw_strip(axis: "Axes", run: Run, layer: str, labels: dict[str, Any]) -> None:
    """Experts from top to bottom, steps from left to right; grey is the fair share."""
    load = run.loads[layer] / run.loads[layer].mean(1, keepdims=True)
    image = axis.imshow(load.T, aspect="auto", cmap="RdBu_r", vmin=2 - HOTTEST, vmax=HOTTEST, interpolation="nearest")
    ticks = np.linspace(0, len(run.steps) - 1, min(len(run.steps), 6)).astype(int)
    axis.set_xticks(ticks, [str(run.steps[tick]) for tick in ticks])
    axis.set(title=labels["strip"].format(run=visible(run.name, 30)), ylabel=labels["expert"])
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.03, extend="max")
    bar.ax.set_ylim(0, HOTTEST)


def _draw_bias(axis: "Axes", run: Run, layer: str, labels: dict[str, Any]) -> None:
    axis.set_title(labels["bias"].format(run=visible(run.name, 30)))
    bias = run.bias.get(layer)
    if bias is None or not bias.any():
        axis.text(0.5, 0.5, labels["none"], ha="center", va="center", color="grey", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
        return
    axis.plot(run.steps, bias, lw=0.8, alpha=0.8)
    axis.set_xlabel(labels["step"])
