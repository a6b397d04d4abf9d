"""One look at a training run, as rich renderables: loss, balance beside chance, alerts, and when it will be done."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.trace.shown import short, short_layers, sparkline, visible, words_of
from moesaic.trace.statistics.load_table import STYLES
from moesaic.trace.statistics.verdict import HOT, STARVED, STATUSES, UNJUDGED
from moesaic.train.monitor.alerts import BAD, NO_TOKENS, SUSTAINED
from moesaic.train.monitor.lines import Line
from moesaic.train.monitor.run_log import RunLog

WORDS = {
    "en": {
        "step": "step {step:,}", "of": " of {total:,}", "speed": "{speed} a step", "left": "{left} left",
        "finished": "finished", "stopped": "stopped before its end", "running": "last line {age} ago",
        "silent": "silent for {age}: stopped, killed or busy",
        "last": "last line at step {step:,}", "loss": "loss", "no_steps": "no line of a step yet",
        "columns": ("layer", "MaxVio", "chance\n5–95 %", "so far", "hottest", "coldest", "dead", "bias",
                    "verdict"),
        "calmer": "+{n} layers closer to chance; a taller terminal shows more", "unjudged": "not judged yet",
        "strip": "{layer}: experts over steps; load ░ below {low:g}x, ▒ to {high:g}x, ▓ to 2x, █ beyond",
        "alerts": "alerts", "no_alerts": "no alerts", "on": "on", "over": "over", "whole": "the run",
        "more": "  and {n} more in the log", "comma": ", ",
        "kinds": {"collapsed": "collapsed", "dead": "dead experts", "drift": "bias drifted away",
                  "loss": "loss not finite", "gradient": "gradient not finite", "no_tokens": "no token counted"},
        "healthy": "no collapse, no dead experts in steps {first:,}–{last:,}", "sick": "sick: {what}",
        "layers": " ({n} of {all} layers)",
        "partly": "no collapse, no dead experts in {n} of {all} layers; the others had too few tokens so far",
        "no_verdict": "no verdict yet: it takes {n} steps and enough tokens",
        "no_tokens": "no data: no token was counted in the last steps",
        "again": "run: {command}", "with": "with {versions}, config {config}",
    },
    "zh": {
        "step": "第 {step:,} 步", "of": "，共 {total:,} 步", "speed": "每步 {speed}", "left": "还需 {left}",
        "finished": "已结束", "stopped": "提前停止", "running": "{age} 前有新的一行",
        "silent": "已有 {age} 没有新内容：停了、被杀掉，或者在忙别的",
        "last": "最后一行在第 {step:,} 步", "loss": "损失", "no_steps": "日志里还没有一步",
        "columns": ("层", "MaxVio", "随机\n5–95 %", "走势", "最忙", "最闲", "死专家", "偏置", "结论"),
        "calmer": "另有 {n} 层更接近随机，终端高一些就能看到", "unjudged": "尚未判断",
        "strip": "{layer}：各专家的负载随步数的变化；░ 低于均值的 {low:g} 倍，▒ 到 {high:g} 倍，▓ 到 2 倍，█ 更高",
        "alerts": "警报", "no_alerts": "没有警报", "on": "开始", "over": "解除", "whole": "整个训练",
        "more": "  日志里还有 {n} 条", "comma": "、",
        "kinds": {"collapsed": "坍缩", "dead": "有死专家", "drift": "偏置漂移",
                  "loss": "损失不是有限值", "gradient": "梯度不是有限值", "no_tokens": "没有数到 token"},
        "healthy": "第 {first:,}–{last:,} 步没有坍缩，没有死专家", "sick": "有问题：{what}",
        "layers": "（{all} 层中的 {n} 层）",
        "partly": "{all} 层中有 {n} 层没有坍缩，没有死专家；其余各层的 token 至今太少",
        "no_verdict": "还没有结论：需要 {n} 步和足够的 token",
        "no_tokens": "没有数据：最近几步一个 token 也没有数到",
        "again": "训练命令：{command}", "with": "版本 {versions}，配置 {config}",
    },
}  # fmt: skip
COLUMNS = ("layer", "max_vio", "chance", "course", "hottest", "coldest", "dead", "bias", "verdict")
NARROW = ("bias", "coldest", "course", "hottest", "chance", "dead")  # what a narrow terminal shows first not
GAP = 3  # characters between columns
SILENT = 10.0  # times the usual time between lines, and
PATIENCE = 60.0  # seconds at least: evaluating and saving take their time
CURVE, COURSE = 60, 10  # characters of the curves of loss and MaxVio
STRIP_ROWS, MOST_ALERTS = 8, 5
OTHER_LINES = 13  # of a frame, beside layers, strip and alerts


def outcome(log: RunLog) -> int:
    """The exit code that a run deserves: 0 good, 1 sick, 2 where nothing was judged, or a layer had too few tokens."""
    if _ills(log):
        return 1
    judged = _n_judged(log) and "too_few" not in log.standing
    return 0 if judged and NO_TOKENS not in log.active else 2


def _ills(log: RunLog) -> dict[str, set[str | None]]:
    """What is bad, and in which layers: alerts that are on, and verdicts, since a layer has dead experts before they
    are enough for an alert."""
    found = [name for name in log.active if name[0] in BAD]
    if NO_TOKENS not in log.active:
        named = zip(log.standing, (layer["name"] for layer in log.layers), strict=False)
        found += [name for name in named if name[0] in BAD]
    return {kind: {layer for other, layer in found if other == kind} for kind, _ in found}


def _n_judged(log: RunLog) -> int:
    return sum(status not in UNJUDGED for status in log.standing)


def outcome_words(log: RunLog, lang: str = "en") -> str:
    words, code = words_of(WORDS, lang), outcome(log)
    if code == 0:
        return words["healthy"].format(first=log.verdicts[-1]["from"], last=log.verdicts[-1]["step"])
    if code == 1:
        told = []
        for kind, layers in _ills(log).items():
            where = "" if None in layers else words["layers"].format(n=len(layers), all=len(log.layers))
            told.append(words["kinds"][kind] + where)
        return words["sick"].format(what=words["comma"].join(told))
    if NO_TOKENS in log.active:
        return words["no_tokens"]
    if n := _n_judged(log):
        return words["partly"].format(n=n, all=len(log.standing))
    return words["no_verdict"].format(n=SUSTAINED)


def frame(log: RunLog, *, now: float, lang: str = "en", width: int = 100, height: int | None = None) -> RenderableType:
    """All that fits into a terminal of that size. now: seconds since 1970, to tell how old the last line is."""
    words = words_of(WORDS, lang)
    parts: list[RenderableType] = [_title(log, now, words)]
    if not log.steps:
        return Group(*parts, Text(words["no_steps"], style="dim"), *_footer(log, words))
    names = _names(log, lang)
    alerts = _alerts(log, words, names)
    room = None if height is None else max(1, height - OTHER_LINES - len(alerts))
    strip = _strip(log, words, names, width) if room is None or room >= STRIP_ROWS + 4 else []
    rows = None if room is None else max(1, room - len(strip))
    loss = [float(line["loss"]) for line in log.steps if line.get("loss") is not None]
    if loss:
        course = curve(loss, max(1, min(CURVE, width - 20)))
        parts.append(Text(f"{words['loss']} {loss[-1]:#.4g}  ").append(course, "cyan"))
    parts += [_layers(log, words, names, lang, width, rows), *strip, *alerts]
    style = ("green", "bold red", "dim")[outcome(log)]
    return Group(*parts, Text(outcome_words(log, lang), style), *_footer(log, words))


def seconds_a_step(log: RunLog) -> float | None:
    """The median over the last lines: a pause, or a run taken up again the day after, does not count."""
    lines = log.steps[-50:]
    pairs = [(b["time"] - a["time"], b["step"] - a["step"]) for a, b in pairwise(lines)]
    taken = [seconds / steps for seconds, steps in pairs if steps > 0 and seconds >= 0]
    return median(taken) if taken else None


def curve(values: Sequence[float], width: int) -> str:
    """A course over time in `width` characters; of values that share one, the mean."""
    if len(values) > width:
        ends = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [[v for v in values[a:b] if math.isfinite(v)] for a, b in pairwise(ends)]
        values = [fmean(part) if part else math.nan for part in parts]
    return sparkline(torch.tensor(values, dtype=torch.float64, device="cpu"), width)


def duration(seconds: float) -> str:
    """ "35 ms", "5.0 s", "12 s", "3 min 20 s", "5 h 07 min", "3 d 4 h"."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 86400:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"


def _title(log: RunLog, now: float, words: dict[str, Any]) -> Text:
    title = Text(visible(str(log.header.get("model", "–")), 60), style="bold")
    done, total, speed = log.done, log.total, seconds_a_step(log)
    facts = [words["step"].format(step=done) + ("" if total is None else words["of"].format(total=total))]
    if speed is not None:
        facts.append(words["speed"].format(speed=duration(speed)))
    if log.end is not None:
        facts.append(words["finished" if log.finished else "stopped"])
        if log.steps and log.steps[-1]["step"] < done:
            facts.append(words["last"].format(step=log.steps[-1]["step"]))
    elif log.steps:
        age = max(0.0, now - log.steps[-1]["time"])
        quiet = age > max(PATIENCE, SILENT * (speed or 0.0) * log.steps[-1].get("steps", 1))
        if total is not None and speed is not None and not quiet:
            facts.append(words["left"].format(left=duration(max(0, total - done) * speed)))
        facts.append(words["silent" if quiet else "running"].format(age=duration(age)))
    return title.append("  " + " · ".join(facts), style="not bold")


def _names(log: RunLog, lang: str) -> dict[str, str]:
    """What each layer is called here."""
    names = [layer["name"] for layer in log.layers]
    return dict(zip(names, short_layers(names, lang), strict=True))


def _layers(
    log: RunLog, words: dict[str, Any], names: dict[str, str], lang: str, width: int, rows: int | None
) -> RenderableType:
    """A row a layer, as many as there is room for; columns give way in the order of NARROW."""
    order = _by_excess(log)
    order = sorted(order if rows is None else order[:rows])
    cells = [[Text(names[log.layers[row]["name"]]), *_cells(log, row, words, lang)] for row in order]
    columns = dict(zip(COLUMNS, zip(*cells, strict=True), strict=True))
    heads = dict(zip(COLUMNS, words["columns"], strict=True))
    wide = {
        name: max(cell_len(text) for text in [*heads[name].split("\n"), *(cell.plain for cell in cells)]) + GAP
        for name, cells in columns.items()
    }
    for name in NARROW:
        if sum(wide.values()) > width:
            del wide[name]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in wide:
        left = name in ("layer", "course", "verdict")
        table.add_column(heads[name], justify="left" if left else "right", no_wrap=not left)
    for cells in zip(*(columns[name] for name in wide), strict=True):
        table.add_row(*cells)
    hidden = len(log.layers) - len(order)
    return Group(table, Text(words["calmer"].format(n=hidden), "dim")) if hidden else table


def _cells(log: RunLog, row: int, words: dict[str, Any], lang: str) -> list[Text]:
    """What each of COLUMNS after the first says of a layer."""
    last = log.steps[-1]
    status = log.standing[row] or "" if log.standing else ""
    status = "no_data" if NO_TOKENS in log.active else status
    told = STATUSES.get(status, {}).get(lang) or visible(status, 30) or words["unjudged"]
    verdict = Text(told, STYLES.get(status, "dim"))
    if last["max_vio"][row] is None:
        return [*[Text("–", "dim")] * 6, _bias(last["bias"][row]), verdict]
    value, (low, high), share = last["max_vio"][row], last["chance"][row], last["percentiles"][row]
    course = [math.nan if line["max_vio"][row] is None else line["max_vio"][row] for line in log.steps]
    dead = last["dead"][row]
    return [
        Text(short(value, 2), "bold" if value > high else ""),
        Text(f"{short(low, 2)}–{short(high, 2)}", "dim"),
        Text(curve(course, COURSE)),
        Text(f"e{last['hottest'][row]} {share[-1]:.2f}x"),
        Text(f"e{last['coldest'][row]} {share[0]:.2f}x"),
        Text(str(dead), "bold" if dead else ""),
        _bias(last["bias"][row]),
        verdict,
    ]


def _bias(bias: Sequence[float | None] | None) -> Text:
    if bias is None:
        return Text("–", "dim")
    low, high, _ = ("nan" if value is None else f"{value:+.3f}" for value in bias)
    return Text(f"{low} {high}")


def _by_excess(log: RunLog) -> list[int]:
    """Layers, the one farthest beyond chance first."""
    last = log.steps[-1]

    def excess(row: int) -> float:
        return -math.inf if last["max_vio"][row] is None else last["max_vio"][row] - last["chance"][row][1]

    return sorted(range(len(log.layers)), key=excess, reverse=True)


def _strip(log: RunLog, words: dict[str, Any], names: dict[str, str], width: int) -> list[Text]:
    """Experts over steps in the layer farthest beyond chance, where the log has every expert's load and it fits."""
    row = _by_excess(log)[0]
    lines = [line for line in log.steps if line.get("load") and line["load"][row]]
    n_experts = log.layers[row]["experts"]
    if not lines or n_experts > width - 12 or any(len(line["load"][row]) != n_experts for line in lines):
        return []
    head = words["strip"].format(layer=names[log.layers[row]["name"]], low=STARVED, high=HOT)
    shown = [Text(head, "dim")]
    bins = min(STRIP_ROWS, len(lines))
    for place in range(bins):
        part = lines[place * len(lines) // bins : (place + 1) * len(lines) // bins]
        load = [sum(line["load"][row][e] for line in part) for e in range(n_experts)]
        shown.append(Text(f"{part[-1]['step']:>10,} ").append("".join(_shade(c, sum(load) / n_experts) for c in load)))
    return shown


def _shade(load: float, mean: float) -> str:
    if not load:
        return " "
    return "░▒▓█"[sum(load > mean * limit for limit in (STARVED, HOT, 2.0))]


def _alerts(log: RunLog, words: dict[str, Any], names: dict[str, str]) -> list[Text]:
    """The newest alerts, those that are on before others, in the order of the log."""
    if not log.alerts:
        return [Text(words["no_alerts"], "dim")]
    on = {id(line) for line in log.active.values()}
    newest = sorted(range(len(log.alerts)), key=lambda place: (id(log.alerts[place]) in on, place))[-MOST_ALERTS:]
    shown = [Text(words["alerts"], "bold")]
    for line in (log.alerts[place] for place in sorted(newest)):
        kind, layer = line["alert"], line["layer"]
        what = words["kinds"].get(kind, visible(kind, 30))
        where = words["whole"] if layer is None else names.get(layer) or visible(layer, 60)
        state = words["on"] if line["begins"] else words["over"]
        shown.append(Text(f"  {line['step']:>8,}  {state}  {where}: {what}", "red" if id(line) in on else ""))
    hidden = len(log.alerts) - len(newest)
    return [*shown, Text(words["more"].format(n=hidden), "dim")] if hidden else shown


def _footer(log: RunLog, words: dict[str, Any]) -> list[Text]:
    header: Line = log.header
    versions = header.get("versions")
    versions = versions.items() if isinstance(versions, dict) else ()
    named = ", ".join(f"{visible(str(name), 30)} {visible(str(value), 40)}" for name, value in versions)
    config = visible(str(header.get("config", "–")), 20)
    return [
        Text("\n" + words["again"].format(command=visible(str(header.get("command", "–")), 300))),
        Text(words["with"].format(versions=named or "–", config=config)),
    ]
