import dataclasses
import logging

import numpy as np
import pytest
import torch
from cases import v3
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from moesaic.config import MoEConfig
from moesaic.layer.router import Router
from moesaic.rules import group_scores, kept_groups, route, select
from moesaic.trace.figures.captions import LABELS
from moesaic.trace.figures.figure import load_figure, routing_figure, save_figure
from moesaic.trace.figures.font import FONT_FILE
from moesaic.trace.statistics.stats import layer_report
from moesaic.trace.statistics.verdict import STATUSES
from moesaic.trace.store import Trace
from moesaic.types import Routing

ARTICLE = MoEConfig.preset("deepseek-v3", hidden_size=64, routed_scaling_factor=1.0)


def traced(config, n_tokens=256, layers=1, detail="scores") -> Trace:
    routings, biases = {}, {}
    for layer in range(layers):
        bias = torch.randn(config.n_routed_experts) * 0.02 if config.has_correction_bias else None
        routing = route(torch.randn(n_tokens, config.n_routed_experts) * 0.6, bias, config)
        name = f"model.layers.{layer}.mlp"
        routings[name] = routing if detail == "scores" else routing._replace(logits=None)
        biases[name] = bias if detail == "scores" else None
    return Trace.from_routings(routings, config, biases)


@pytest.fixture(scope="module")
def article() -> Trace:
    torch.manual_seed(0)
    return traced(ARTICLE)


def bars(axis, label=None):
    groups = [c for c in axis.containers if label is None or c.get_label() == label]
    return np.array([bar.get_height() for group in groups for bar in group])


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_the_figure_has_the_articles_titles_and_labels_in_chinese(article):
    fig = routing_figure(article, layer=article.layers[0], lang="zh")
    heat, weights, nodes, flow, bar = fig.axes
    assert tuple(fig.get_size_inches()) == (16, 12)
    assert fig.get_suptitle() == "DeepSeek-V3 MoE路由过程可视化"
    assert fig._suptitle.get_fontsize() == 16
    assert fig._suptitle.get_fontweight() == "bold"
    for axis, title, x, y in (
        (heat, "专家使用分布热力图", "组内专家索引", "节点组索引"),
        (weights, "专家权重分布", "权重值", "频次"),
        (nodes, "节点选择统计", "节点索引", "被选择次数"),
        (flow, "MoE路由流程", "", ""),
    ):
        assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == (title, x, y)
    assert bar.get_ylabel() == "使用次数"
    assert heat.collections[0].get_cmap().name == "YlOrRd"


def test_the_panels_show_the_record_and_nothing_else(article):
    fig = routing_figure(article)
    heat, weights, nodes, flow, _ = fig.axes
    usage = np.bincount(article.picks.flatten(), minlength=256).reshape(8, 32)
    assert np.array_equal(heat.collections[0].get_array().reshape(8, 32), usage)
    assert [int(text) for text in texts(heat)] == usage.ravel().tolist()
    assert usage.sum() == 2048

    counts, _ = np.histogram(article.weights.flatten(), bins=30)
    assert [patch.get_height() for patch in weights.patches] == counts.tolist()
    assert counts.sum() == 2048

    choice = article.logits[0].sigmoid() + article.bias[0]
    kept = kept_groups(group_scores(choice, ARTICLE), ARTICLE).sum(0)
    reached = [sum(g in {e // 32 for e in row} for row in article.picks[0].tolist()) for g in range(8)]
    assert bars(nodes, LABELS["zh"]["kept"]).tolist() == kept.tolist()
    assert bars(nodes, LABELS["zh"]["reached"]).tolist() == reached
    assert kept.sum() == 1024
    assert [line.get_ydata()[0] for line in nodes.lines] == [128]  # the mean if groups were kept evenly
    assert texts(nodes) == [str(n) for n in [*kept.tolist(), *reached]]

    assert flow.get_xlim() == (0, 10)
    assert flow.get_ylim() == (0, 8)
    boxes = [patch for patch in flow.patches if isinstance(patch, Rectangle)]
    assert [(p.get_x() + 0.5, p.get_y() + 0.5, p.get_width(), p.get_height()) for p in boxes] == [
        (x, 6, 1, 1) for x in (1, 3, 5, 7, 9)
    ]


def test_numbers_in_the_flow_panel_are_those_of_the_report(article):
    shown, report = texts(routing_figure(article, lang="en").axes[3]), layer_report(article)
    for name in ("max_vio", "cv", "entropy", "groups_reached"):
        measure = report.measures[name]
        assert f"{measure.value:.4g}" in shown
        assert f"chance {measure.band.low:.4g} – {measure.band.high:.4g}" in shown
    assert report.verdict("en") in shown


def test_groups_kept_are_not_shown_where_nothing_tells_them():
    picks_only = routing_figure(traced(v3(32, 4, 2, 4), detail="picks")).axes[2]
    assert {c.get_label() for c in picks_only.containers} == {LABELS["zh"]["reached"]}
    assert not picks_only.lines  # what uniform keeping gives is no yardstick for groups reached, which are fewer
    no_bias = dataclasses.replace(traced(v3(32, 4, 2, 4)), bias=None)
    assert {c.get_label() for c in routing_figure(no_bias).axes[2].containers} == {LABELS["zh"]["reached"]}


def test_groups_that_the_rule_ignores_are_not_said_to_be_kept():
    flow = texts(routing_figure(traced(v3(32, 4, 2, 4, topk_method="greedy"))).axes[3])
    assert LABELS["zh"]["free"] in flow


def overlapping(fig):
    """Pairs of texts of one panel that cover each other, and texts that leave the figure."""
    renderer, edges = fig.canvas.get_renderer(), fig.bbox
    found = []
    for axis in fig.axes:
        legend = axis.get_legend()
        parts = [t for t in axis.texts if t.get_text()] + [axis.title] + ([legend] if legend else [])
        boxes = [(part, part.get_window_extent(renderer)) for part in parts]
        for i, (part, box) in enumerate(boxes):
            found += [
                (part, other) for other, b in boxes[i + 1 :] if box.shrunk(0.96, 0.96).overlaps(b.shrunk(0.96, 0.96))
            ]
            if box.x0 < edges.x0 or box.x1 > edges.x1 or box.y0 < edges.y0 or box.y1 > edges.y1:
                found.append((part, "outside"))
    return [(str(a), str(b)) for a, b in found]


FIGURES = {
    "article": (ARTICLE, 256),
    "tiny": (v3(32, 4, 2, 4), 12_345),
    "mixtral": (MoEConfig.preset("mixtral", hidden_size=8), 300),
    "olmoe": (MoEConfig.preset("olmoe", hidden_size=8), 5000),
    "v2": (MoEConfig.preset("deepseek-v2", hidden_size=8), 1000),
    "many": (v3(64, 16, 4, 4), 23_456),
    "two": (v3(2, 1, 1, 1), 3),
}


@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("kind", FIGURES)
def test_nothing_overlaps_and_no_glyph_is_missing(kind, lang, caplog):
    """A missing glyph is a warning, and warnings are errors here; a missing weight is a line in the log."""
    config, n_tokens = FIGURES[kind]
    trace = traced(config, n_tokens)
    with caplog.at_level(logging.WARNING, "matplotlib"):
        assert overlapping(routing_figure(trace, lang=lang)) == []
        if kind in ("tiny", "mixtral"):
            assert overlapping(load_figure(traced(config, 500, 3), lang=lang)) == []
    assert not caplog.records


def test_every_word_can_be_written_with_the_fonts_that_ship():
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    glyphs = set(FT2Font(str(FONT_FILE)).get_charmap()) | set(
        FT2Font(findfont(FontProperties("DejaVu Sans"))).get_charmap()
    )
    words = str([LABELS, STATUSES])
    assert not {c for c in words if ord(c) not in glyphs and c.isprintable()}
    level_1 = [
        bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) if (row, cell) < (0xD7, 0xFA)
    ]
    assert len(level_1) == 3755
    assert not [c for c in level_1 if ord(c.decode("gb2312")) not in glyphs]
    assert FONT_FILE.stat().st_size < 600_000
    assert "Apache" in (FONT_FILE.parent / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_live_routing_of_any_dtype_that_wants_gradients_can_be_drawn(dtype):
    router = Router(v3(32, 4, 2, 4)).to(dtype)
    routing = router(torch.randn(2, 20, 32, dtype=dtype))
    assert routing.weights.requires_grad
    bias = router.e_score_correction_bias
    fig = routing_figure(Trace.from_routings({"gate": routing}, router.config, {"gate": bias}))
    assert fig.axes[0].collections[0].get_array().sum() == 160
    assert bars(fig.axes[2], LABELS["zh"]["kept"]).sum() == 80


def test_no_data_is_drawn_as_no_data():
    config = v3(32, 4, 2, 4)
    none = Routing(torch.zeros(0, 32), torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))
    trace = Trace.from_routings({"moe": none}, config, {"moe": torch.zeros(32)})
    assert "没有数据" in texts(routing_figure(trace).axes[3])
    assert "no data" in texts(load_figure(trace, lang="en").axes[0])


def test_layers_without_data_are_grey_in_the_heat_map_and_no_others():
    trace = traced(v3(32, 4, 2, 4), 100, 17)
    trace.picks[5] = 32
    fig = load_figure(trace, lang="en")
    shown = np.ma.getmaskarray(fig.axes[0].collections[0].get_array()).reshape(17, 32)
    assert shown[5].all()
    assert not np.delete(shown, 5, axis=0).any()
    assert fig.axes[0].get_facecolor()[:3] == pytest.approx((0.733,) * 3, abs=0.01)
    assert "grey: no data" in fig.axes[1].get_ylabel()


def test_the_legend_of_the_panels_is_there_where_the_first_layer_has_no_data():
    trace = traced(v3(32, 4, 2, 4), 100, 3)
    trace.picks[0] = 32
    assert "random routing, 5–95 %" in [text.get_text() for text in load_figure(trace, lang="en").legends[0].texts]


def test_nan_weights_do_not_stop_the_figure():
    trace = traced(v3(32, 4, 2, 4), 10)
    trace.weights[0, 0] = torch.nan
    assert sum(patch.get_height() for patch in routing_figure(trace).axes[1].patches) == 36


def test_weights_of_slots_without_an_expert_are_neither_drawn_nor_averaged():
    trace = traced(v3(32, 4, 2, 4), 400)
    trace.picks[0, :, -1], trace.weights[0, :, -1] = 32, 7.0
    trace.picks[0, 300:], trace.weights[0, 300:] = 32, torch.nan
    _, weights, _, flow, _ = routing_figure(trace, lang="en").axes
    assert sum(patch.get_height() for patch in weights.patches) == 900
    assert weights.get_xlim()[1] < 3
    assert weights.lines[0].get_xdata()[0] == pytest.approx(trace.weights[0, :300, :3].mean())
    total = trace.weights[0, :300, :3].sum(-1).mean()
    assert f"[400, 4]\nsum = {total:.4g}" in texts(flow)
    trace.picks[:] = 32
    assert "no data" in texts(routing_figure(trace, lang="en").axes[3])


def test_load_is_drawn_for_every_layer_over_its_chance_band():
    trace = traced(v3(32, 4, 2, 4), 400, 5)
    fig = load_figure(trace, lang="en")
    panels = [axis for axis in fig.axes if axis.containers]
    assert len(panels) == 5
    for layer, axis in enumerate(panels):
        report = layer_report(trace, layer)
        assert bars(axis).tolist() == report.load.tolist()
        low, high = report.load_band.low, report.load_band.high
        spans = [p for p in axis.patches if p.get_label() == "random routing, 5–95 %"]
        assert (spans[0].get_y(), spans[0].get_y() + spans[0].get_height()) == pytest.approx((low, high))
        assert axis.get_title() == f"model.layers.{layer}.mlp\n{report.verdict('en')}"


def test_the_load_band_holds_nine_of_ten_experts_under_random_routing():
    config = v3(64, 8, 4, 6)
    band = layer_report(traced(config, 500)).load_band
    loads = np.stack([np.bincount(select(torch.rand(500, 64), config).flatten(), minlength=64) for _ in range(50)])
    assert np.mean((loads >= band.low) & (loads <= band.high)) == pytest.approx(0.9, abs=0.02)


def test_many_layers_become_one_heat_map_that_is_white_within_chance():
    trace = traced(v3(32, 4, 2, 4), 100, 20)
    shown = load_figure(trace).axes[0].collections[0].get_array().reshape(20, 32)
    for layer in range(20):
        report = layer_report(trace, layer)
        within = (report.load >= report.load_band.low) & (report.load <= report.load_band.high)
        assert 0 < within.sum() < 32
        assert (shown[layer][within] == 1).all()
        assert np.allclose(shown[layer][~within], (report.load / report.load.mean())[~within])


def test_saving_writes_the_picture_and_frees_the_figure(tmp_path, article):
    fig = routing_figure(article)
    save_figure(fig, tmp_path / "routing.png", dpi=50)
    assert imread(tmp_path / "routing.png").shape[1] == pytest.approx(800, rel=0.05)
    assert not fig.axes
    with pytest.raises(ValueError, match=r"nowhere.*: cannot be written"):
        save_figure(routing_figure(article), tmp_path / "nowhere" / "routing.png")
    with pytest.raises(ValueError, match=r"routing\.xyz: cannot be written"):
        save_figure(routing_figure(article), tmp_path / "routing.xyz")


def test_an_unknown_language_is_refused(article):
    with pytest.raises(ValueError, match="lang='fr' is unknown: use 'zh' or 'en'"):
        routing_figure(article, lang="fr")


def test_drawing_leaves_the_users_settings_alone(article):
    import matplotlib

    before = dict(matplotlib.rcParams)
    routing_figure(article)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_touched_only_where_a_window_was_asked_for(article, monkeypatch, tmp_path):
    routing_figure(article)
    load_figure(article)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.extend(pyplot.get_fignums()))
    figure = routing_figure(article, show=True)
    assert len(shown) == 1, "one window, with the figure in it"
    assert pyplot.get_fignums() == [], "and closed"
    save_figure(figure, tmp_path / "shown.png", dpi=50)
    assert (tmp_path / "shown.png").stat().st_size > 10_000
