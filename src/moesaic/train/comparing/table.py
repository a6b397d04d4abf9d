"""Runs side by side as console tables. Nothing here prints."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesaic.trace.shown import sparkline, visible, words_of
from moesaic.train.comparing.runs import Balance, Run, Spread, by_balance, names_of

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "runs": ("run", "balance", "seed", "steps", "loss", "so far", "MaxVio", "so far"),
        "evaluated": "the last evaluation, on {windows} held-out windows a domain",
        "balances": ("balance", "seeds", "loss", "against {first}", "MaxVio", "dead", "starved", "domain bits"),
        "caption": (
            "mean ±standard deviation over seeds, on all held-out text (dead: on the windows above)",
            "weights: those of the evaluation whose worst domain beat a Kneser-Ney bigram by most",
            "loss: nats per token, the domains in their shares; against: seed by seed",
            "MaxVio: worst layer{chance}",
            "dead: experts never chosen, all layers; starved: below a tenth of their share",
            "domain bits: what an expert says of its token's domain, mean of the layers",
        ),
        "chance": "; random routing gives {low:.2f} to {high:.2f}",
        "one": "one seed has no spread: what differs here may be chance",
        "unfinished": "not finished, so not in this table: {names}",
    },
    "zh": {
        "runs": ("运行", "均衡方法", "种子", "步数", "损失", "变化", "MaxVio", "变化"),
        "evaluated": "最后一次评估，每个领域 {windows} 个留出窗口",
        "balances": ("均衡方法", "种子数", "损失", "相对 {first}", "MaxVio", "死专家", "饥饿专家", "领域信息"),
        "caption": (
            "各种子的均值 ±标准差，在整个留出集上（死专家：在上表的窗口上）",
            "权重取自最差领域领先 Kneser-Ney 二元模型最多的那次评估",
            "损失：每 token 的 nat 数，各领域按训练占比加权；相对：同种子逐一相减",
            "MaxVio：最差的一层{chance}",
            "死专家：从未被选中，各层合计；饥饿专家：所得不足应得份额的十分之一",
            "领域信息：由专家可知多少比特的 token 领域，各层平均",
        ),
        "chance": "；随机路由时为 {low:.2f} 到 {high:.2f}",
        "one": "只有一个种子，看不出波动：这里的差别可能只是偶然",
        "unfinished": "尚未结束，未列入上表：{names}",
    },
}
PADDING = (0, 1, 0, 0)  # so that it fits into 80 columns


def runs_table(runs: Sequence[Run], lang: str = "en") -> Table:
    """Every run with its last numbers and how they got there."""
    words = words_of(WORDS, lang)
    windows = " / ".join(dict.fromkeys(str(run.setting["held_out_windows"]) for run in runs))
    caption = words["evaluated"].format(windows=windows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=PADDING, caption=caption, caption_justify="left")
    for head in words["runs"]:
        table.add_column(head, no_wrap=True)
    for run, balance in zip(runs, names_of(runs), strict=True):
        loss, vio = run.loss[-1], run.worst_vio[-1]
        done = f"{run.steps[-1]}/{run.setting['steps']}"
        table.add_row(
            visible(run.name, 40), balance, str(run.seed), done, f"{loss:.3f}", _line(run.loss),
            f"{vio:.2f}", _line(run.worst_vio),
        )  # fmt: skip
    return table


def balances_table(runs: Sequence[Run], lang: str = "en") -> RenderableType:
    """Every way to balance with its spread over the seeds; differences to the first one are taken seed by seed."""
    words, found = words_of(WORDS, lang), by_balance(runs)
    parts: list[RenderableType] = []
    if found:
        caption = "\n".join(words["caption"]).format(chance=_chance(found, words["chance"]))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=PADDING, caption=caption, caption_justify="left")
        for place, head in enumerate(words["balances"]):
            table.add_column(head.format(first=found[0].name), justify="right" if place else "left", no_wrap=not place)
        for balance in found:
            table.add_row(*_row(balance, found[0]))
        parts.append(table)
        if any(balance.loss.sd is None for balance in found):
            parts.append(Text(words["one"], style="dim"))
    if unfinished := [visible(run.name, 40) for run in runs if run.final is None]:
        parts.append(Text(words["unfinished"].format(names=", ".join(unfinished)), style="dim"))
    return Group(*parts)


def _chance(balances: Sequence[Balance], words: str) -> str:
    """Empty where sizes or amounts of text differ: chance then gives several bands."""
    bands = {balance.chance for balance in balances}
    return words.format(low=(band := bands.pop())[0], high=band[1]) if len(bands) == 1 else ""


def _row(balance: Balance, first: Balance) -> list[str]:
    gain = balance.gain_over(first)
    return [
        balance.name,
        str(len(balance.seeds)),
        _spread(balance.loss, 3),
        "–" if gain is None else _spread(gain, 3, sign="+"),
        _spread(balance.max_vio, 2),
        _spread(balance.dead, 1),
        _spread(balance.unused, 1),
        _spread(balance.specialisation, 2),
    ]


def _spread(spread: Spread, digits: int, sign: str = "") -> str:
    text = f"{spread.mean:{sign}.{digits}f}"
    return text if spread.sd is None else f"{text} ±{spread.sd:.{digits}f}"


def _line(values: Float[np.ndarray, " N"]) -> str:
    return sparkline(torch.from_numpy(values), 8)
