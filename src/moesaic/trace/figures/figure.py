"""Figures of a recorded routing, drawn from the record and never recomputed. Nothing here touches pyplot."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.trace.figures.captions import LABELS
from moesaic.trace.figures.font import figure_style
from moesaic.trace.rule.derive import bias_of, derive, logits_of, slices, why_not_derived
from moesaic.trace.rule.given import layer_of
from moesaic.trace.shown import words_of
from moesaic.trace.statistics.stats import LayerReport, layer_report, layer_reports
from moesaic.trace.store import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

FLOW_COLORS = ("lightblue", "lightyellow", "lightgreen", "lightcoral", "lightpink")
GROUP_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#8c8c8c")
PANELS_AT_MOST = 16  # layers with a bar chart each; more become one heat map


def routing_figure(trace: Trace, *, layer: int | str = 0, lang: str = "zh", show: bool = False) -> "Figure":
    """The 2x2 figure of one layer: usage of experts, weights, groups, and the flow with this record's numbers.

    16 x 12 in; save it with `save_figure`.
    """
    layer = layer_of(trace, layer)
    labels, config, report = words_of(LABELS, lang), trace.configs[layer], layer_report(trace, layer)
    with figure_style():
        fig = new_figure(16, 12, on_screen=show)
        axes = fig.subplots(2, 2)
        title = labels["title"] if config.has_correction_bias else labels["title_other"]
        _bold(fig.suptitle(title, fontsize=16, fontweight="bold"), 0.7)
        _draw_usage(axes[0, 0], report, labels)
        _draw_weights(axes[0, 1], trace, layer, labels)
        if config.limits_groups:
            _draw_groups(axes[1, 0], trace, layer, labels)
        else:
            _draw_load(axes[1, 0], report, labels)
            axes[1, 0].set_title(labels["load"])
            axes[1, 0].legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
        _draw_flow(axes[1, 1], report, trace, layer, labels, lang)
        fig.tight_layout()
    if show:
        from matplotlib import pyplot

        pyplot.show()
        pyplot.close(fig)  # the figure itself can still be saved
    return fig


def load_figure(trace: Trace, lang: str = "zh") -> "Figure":
    """Load per expert of every layer with what random routing would give shaded; many layers become a heat map."""
    labels, reports = words_of(LABELS, lang), layer_reports(trace)
    with figure_style():
        if len(reports) > PANELS_AT_MOST:
            fig = new_figure(14, min(2 + 0.22 * len(reports), 16))
            _draw_all_loads(fig.subplots(), reports, labels)
        else:
            columns = 1 if len(reports) == 1 else 2
            rows = math.ceil(len(reports) / columns)
            fig = new_figure(8 * columns, 3.1 * rows + 0.8)
            grid = np.atleast_1d(fig.subplots(rows, columns, squeeze=False)).ravel()
            for axis, report in zip(grid, reports, strict=False):
                _draw_load(axis, report, labels)
                axis.set_title(f"{report.layer}\n{report.verdict(lang)}", fontsize=11)
            for axis in grid[len(reports) :]:
                axis.axis("off")
            if drawn := [axis for axis, report in zip(grid, reports, strict=False) if report.load_band is not None]:
                handles = drawn[0].get_legend_handles_labels()
                fig.legend(*handles, loc="upper right", ncols=2, frameon=False, fontsize=10)
        _bold(fig.suptitle(labels["loads_title"], fontsize=15, fontweight="bold"), 0.7)
        fig.tight_layout()
    return fig


def save_figure(fig: "Figure", path: str | Path, dpi: int = 300, *, trim: bool = True) -> None:
    """Write the figure, whole or not at all, and free it; the name's ending is the format. ValueError on failure.

    `trim` cuts the margin to what is drawn, which means drawing twice.
    """
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    try:
        fig.savefig(part, dpi=dpi, bbox_inches="tight" if trim else None)
        part.replace(path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error})") from None
    fig.clear()


def new_figure(width: float, height: float, *, on_screen: bool = False) -> "Figure":
    """A figure of its own, or, only where a window was asked for, one that pyplot manages."""
    if on_screen:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height))
    FigureCanvasAgg(fig)
    return fig


def _bold(text: "Text", width: float) -> None:
    """Thicken Chinese by `width` points: our font has one weight and would look thin beside bold Latin."""
    if not text.get_text().isascii():
        _outline(text, width, text.get_color())


def _outline(text: "Text", width: float, color: Any) -> None:
    from matplotlib.patheffects import withStroke

    text.set_path_effects([withStroke(linewidth=width, foreground=color)])


def _draw_usage(axis: "Axes", report: LayerReport, labels: dict[str, Any]) -> None:
    """Heat map of usage, one row a group; without groups, rows of equal length."""
    config, load = report.config, report.load
    rows = config.n_group if config.n_group > 1 else _rows(len(load))
    table = load.reshape(rows, -1)
    mesh = axis.pcolormesh(table, cmap="YlOrRd", vmin=table.min(), vmax=max(table.max(), 1), edgecolor="w", lw=0.4)
    axis.invert_yaxis()
    axis.figure.colorbar(mesh, ax=axis, label=labels["heat_bar"], pad=0.02)
    columns, digits = table.shape[1], len(str(table.max()))
    size = min(11.0, 400 / columns / (0.66 * max(digits, 2)))  # 400 pt is the width of the panel's cells
    if size >= 4:
        brightness = mesh.to_rgba(table)[..., :3] @ (0.299, 0.587, 0.114)
        for (row, column), value in np.ndenumerate(table):
            color = "white" if brightness[row, column] < 0.5 else "#333333"
            axis.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=size, color=color)
    step = math.ceil(columns / 16)
    axis.set_xticks(np.arange(0, columns, step) + 0.5, [str(c) for c in range(0, columns, step)])
    ids = range(rows) if config.n_group > 1 else range(0, len(load), columns)
    axis.set_yticks(np.arange(rows) + 0.5, [str(i) for i in ids])
    axis.set_title(labels["heat"])
    grouped = config.n_group > 1
    axis.set_xlabel(labels["heat_x" if grouped else "row_x"])
    axis.set_ylabel(labels["heat_y" if grouped else "row_y"])


def _draw_weights(axis: "Axes", trace: Trace, layer: int, labels: dict[str, Any]) -> None:
    weights, chosen = _chosen_weights(trace, layer)
    weights = weights[chosen & np.isfinite(weights)]
    axis.hist(weights, bins=30, alpha=0.7, color="skyblue", edgecolor="black")
    if len(weights):
        mean = weights.mean()
        axis.axvline(mean, color="#444444", ls="--", lw=1.2, label=f"{labels['weights_mean']} {mean:.4g}")
        axis.legend(frameon=False)
    axis.set_title(labels["weights"])
    axis.set_xlabel(labels["weights_x"])
    axis.set_ylabel(labels["weights_y"])
    axis.grid(True, alpha=0.3)


def _chosen_weights(trace: Trace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a layer, [T, K], and which of them are of an expert: that of the id E is 0, whatever it was."""
    routing = trace.layer(layer)
    chosen = (routing.expert_ids < trace.n_experts).numpy()
    return np.where(chosen, routing.weights.numpy(), 0.0), chosen


def _draw_groups(axis: "Axes", trace: Trace, layer: int, labels: dict[str, Any]) -> None:
    """Groups that the gate kept (where they can be derived) beside groups that chosen experts lie in."""
    config, routing = trace.configs[layer], trace.layer(layer)
    series = []
    if not why_not_derived(trace, layer):
        bias, kept = bias_of(trace, layer), np.zeros(config.n_group, np.int64)
        for here in slices(len(trace)):
            ids = routing.expert_ids[here].long()
            kept += derive(logits_of(trace, layer, here), bias, config, ids)["group_mask"].sum(0).numpy()
        series.append(("kept", "lightgreen", kept))
        fair = len(trace) * config.topk_group / config.n_group
        axis.axhline(fair, color="#888888", ls=":", lw=1.2, label=f"{labels['fair']} {fair:g}")
    groups = np.arange(config.n_group)
    member = (routing.expert_ids.numpy()[..., None] // config.experts_per_group == groups).any(1)
    series.append(("reached", "#2e8b57", member.sum(0)))
    width = 0.8 / len(series)
    size = min(9.0, 380 * width / config.n_group / (0.62 * len(str(max(len(trace), 1)))))
    for place, (name, color, counts) in enumerate(series):
        x = np.arange(config.n_group) + (place - (len(series) - 1) / 2) * width
        bars = axis.bar(x, counts, width * 0.95, color=color, alpha=0.7, label=labels[name])
        if size >= 4:
            for bar, value in zip(bars, counts, strict=True):
                middle = bar.get_x() + bar.get_width() / 2
                label = axis.text(middle, value + 0.5, str(int(value)), ha="center", va="bottom", fontsize=size)
                _outline(label, 2.5, "white")  # so that the dotted line does not cross the number
    axis.set_ylim(0, max(axis.get_ylim()[1], 1) * 1.22)  # room for the legend
    axis.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    axis.set_xticks(range(config.n_group))
    axis.set_title(labels["nodes"])
    axis.set_xlabel(labels["nodes_x"])
    axis.set_ylabel(labels["nodes_y"])


def _draw_load(axis: "Axes", report: LayerReport, labels: dict[str, Any]) -> None:
    """Bars of load, coloured by group, over the band of one expert's load under random routing."""
    config, load, band = report.config, report.load, report.load_band
    colors = [GROUP_COLORS[expert // config.experts_per_group % len(GROUP_COLORS)] for expert in range(len(load))]
    axis.bar(np.arange(len(load)), load, width=0.85, color=colors, zorder=2)
    if band is None:
        axis.text(0.5, 0.5, labels["no_data"], transform=axis.transAxes, ha="center", va="center", fontsize=14)
    else:
        axis.axhspan(band.low, band.high, color="#000000", alpha=0.13, lw=0, zorder=3, label=labels["band"])
        axis.axhline(band.mean, color="#222222", lw=0.9, zorder=4, label=f"{labels['mean']} {band.mean:g}")
        axis.set_ylim(0, max(float(load.max()), band.high) * 1.15)
    axis.set_xlim(-0.7, len(load) - 0.3)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel(labels["load_x"])
    axis.set_ylabel(labels["load_y"])
    axis.spines[["top", "right"]].set_visible(False)


def _draw_all_loads(axis: "Axes", reports: list[LayerReport], labels: dict[str, Any]) -> None:
    """Load over the fair share for [layers, experts]; white is whatever one expert gets under random routing, and a
    layer without data is grey."""
    shown = np.full((len(reports), len(reports[0].load)), np.nan)
    for row, report in zip(shown, reports, strict=True):
        if (band := report.load_band) is not None:
            chance = (report.load >= band.low) & (report.load <= band.high)
            row[:] = np.where(chance, 1.0, report.load / band.mean)
    mesh = axis.pcolormesh(shown, cmap="RdBu_r", vmin=0, vmax=2)
    axis.set_facecolor("#bbbbbb")  # seen where there is no number
    axis.invert_yaxis()
    label = f"{labels['relative']} ({labels['white']})"
    axis.figure.colorbar(mesh, ax=axis, label=label, pad=0.02, extend="max", fraction=0.04)
    axis.set_xlabel(labels["load_x"])
    axis.set_ylabel(labels["layer"])


def _draw_flow(axis: "Axes", report: LayerReport, trace: Trace, layer: int, labels: dict[str, Any], lang: str) -> None:
    """Five boxes of the gate, under each what this record has there, and the layer's numbers beside chance."""
    from matplotlib.patches import Rectangle

    axis.set_xlim(0, 10)
    axis.set_ylim(0, 8)
    axis.axis("off")
    axis.set_title(labels["flow"])
    c, t = report.config, len(trace)
    weights, chosen = _chosen_weights(trace, layer)
    total = float(weights.sum(-1)[chosen.any(-1)].mean()) if chosen.any() else None
    facts = (
        f"[{t}, {c.hidden_size}]",
        f"[{t}, {c.n_routed_experts}]\n{c.scoring_func}",
        labels["keep"].format(g=c.n_group, m=c.topk_group) if c.limits_groups else labels["free"],
        labels["pick"].format(e=c.n_routed_experts, k=c.num_experts_per_tok),
        f"[{t}, {c.num_experts_per_tok}]\n{labels['sum'].format(s=total)}" if total is not None else labels["no_data"],
    )
    y = 6
    for x, text, color, fact in zip((1, 3, 5, 7, 9), labels["boxes"], FLOW_COLORS, facts, strict=True):
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, lw=1.5, edgecolor="black", facecolor=color, alpha=0.7))
        _bold(axis.text(x, y, text, ha="center", va="center", fontsize=8.5, fontweight="bold"), 0.35)
        axis.text(x, y - 0.7, fact, ha="center", va="top", fontsize=9, color="#444444", linespacing=1.35)
        if x < 9:
            axis.annotate("", (x + 1.5, y), (x + 0.5, y), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.2})
    line = 3.9
    for name, word in labels["numbers"].items():
        measure = report.measures.get(name)
        if measure is not None and measure.band is not None:
            band = f"{labels['chance']} {measure.band.low:.4g} – {measure.band.high:.4g}"
            axis.text(1.0, line, word, fontsize=11, color="#222222")
            axis.text(4.2, line, f"{measure.value:.4g}", fontsize=11, color="#222222", ha="left")
            axis.text(6.0, line, band, fontsize=11, color="#777777")
            line -= 0.72
    axis.text(1.0, line - 0.1, f"{labels['verdict']}", fontsize=11, color="#222222")
    axis.text(4.2, line - 0.1, report.verdict(lang), fontsize=11, fontweight="bold", color="#222222")


def _rows(n_experts: int) -> int:
    """Rows for experts without groups: the most rows that divide them and stay twice as wide as high."""
    return max(r for r in range(1, n_experts + 1) if n_experts % r == 0 and (r == 1 or 2 * r * r <= n_experts))
