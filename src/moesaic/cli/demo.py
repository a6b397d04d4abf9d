"""`moesaic demo`: real text through a really trained MoE model, and what its gates did."""

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moesaic.cli.output import JSON_HELP, Lang, check_not_both, make_ready, print_json, say_how_again, typed
from moesaic.cli.steps import recorded_word
from moesaic.cli.trace import said_of_windows

if TYPE_CHECKING:
    from moesaic.trace.rule.steps import Steps
    from moesaic.trace.statistics.preference import Preferences
    from moesaic.trace.statistics.stats import Stats
    from moesaic.trace.store import Trace

WORDS = {
    "en": {
        "routing": "Routing real text...",
        "model": "{model}: {layers} MoE layers, {config}",
        "sizes": "top {c.num_experts_per_tok} of {c.n_routed_experts} experts",
        "groups": " in {c.topk_group} of {c.n_group} groups",
        "text": "tokens: {tokens:,}, documents: {documents} ({domains})",
        "your_text": "text",
        "load": "1. Is the load balanced? A number in brackets is what random routing would give.",
        "prefer": "2. Which experts prefer which text?",
        "token": "3. One token through one gate: layer {layer}, token {token} {word} of {label}",
        "saved": "Saved in {out}:",
        "files": ("the figure of layer {layer}", "load of every layer beside chance", "everything recorded"),
    },
    "zh": {
        "routing": "正在让模型读真实文本……",
        "model": "{model}：{layers} 个 MoE 层，{config}",
        "sizes": "每个 token 从 {c.n_routed_experts} 个专家中选 {c.num_experts_per_tok} 个",
        "groups": "，限于 {c.n_group} 组中的 {c.topk_group} 组",
        "text": "{documents} 个文档共 {tokens:,} 个 token：{domains}",
        "your_text": "文本",
        "load": "1. 负载均衡吗？括号内是随机路由会得到的范围。",
        "prefer": "2. 哪些专家偏好哪类文本？",
        "token": "3. 一个 token 走过一个门控：第 {layer} 层，{label} 的第 {token} 个 token {word}",
        "saved": "已保存到 {out}：",
        "files": ("第 {layer} 层的路由图", "每层负载与随机范围", "全部路由记录"),
    },
}


def demo(
    random: Annotated[
        bool, typer.Option("--random", help="The article's demo: a random gate on random input.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="With --random: a released model's sizes; deepseek-v3 unless given.")
    ] = None,
    lang: Lang = "en",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the random gate and of the permutation test.")
    ] = 0,
    text: Annotated[str | None, typer.Option(help="Route this text instead of the shipped corpus.")] = None,
    file: Annotated[Path | None, typer.Option(help="Route the text of this file.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face MoE model; the shipped one unless given.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="MoE layer to look into, from 0; the middle one unless given.")
    ] = None,
    token: Annotated[int | None, typer.Option(help="Token to follow, from 0; a telling one unless given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures and the record.")] = Path("moesaic-demo"),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> int:
    """Route real English, Chinese and code through a trained MoE model and say what its gates did.

    Prints load verdicts beside chance, which experts prefer which text, and one token's 15 steps; saves figures and
    the routing record. Exit code 1 where a layer has collapsed.
    """
    gc.disable()  # seconds long: collecting would cost 1.2 of 9 s while torch and transformers are imported
    # the threads of a matmul wait for each other; spinning while they do takes ten times as long on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if random:
        if any(given is not None for given in (text, file, model, layer, token)):
            raise ValueError("--random routes random input: leave out --text, --file, --model, --layer and --token")
        return _random(preset or "deepseek-v3", lang, seed, out, as_json)
    if preset is not None:
        raise ValueError(f"--preset {preset} is for the random gate: add --random, or leave it out")
    return _real(lang, seed, text, file, model, layer, token, out, as_json)


def _random(preset: str, lang: str, seed: int, out: Path, as_json: bool) -> int:
    from moesaic.article import create_moe_config, demo_moe_gate
    from moesaic.config import MoEConfig

    article = preset == "deepseek-v3"  # its sizes, with the article's routed_scaling_factor of 1.0
    config = create_moe_config() if article else MoEConfig.preset(preset)
    make_ready(out)
    figure = out / "moe_routing_visualization.png"
    title = "DeepSeek-V3" if article else preset
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        trace = demo_moe_gate(config, title=title, lang=lang, seed=seed, save_path=figure)
    if as_json:
        print_json(_document(trace, _what_is_shown(trace, lang, 0, 0, seed), 0, 0, "", [figure]))
    else:
        say_how_again(trace, lang)
    return 0


def _real(
    lang: str,
    seed: int,
    text: str | None,
    file: Path | None,
    model_folder: Path | None,
    layer: int | None,
    token: int | None,
    out: Path,
    as_json: bool,
) -> int:
    from rich.console import Console

    from moesaic.cli import sources
    from moesaic.hf.load import TINY, load_model
    from moesaic.trace.figures.figure import load_figure, routing_figure, save_figure
    from moesaic.trace.statistics.per_token import overlap_of

    check_not_both("--text", text, "--file", file)
    documents = sources.documents(text, [] if file is None else [file], corpus=text is None and file is None)
    model, tokenizer = load_model(model_folder or TINY)
    _, window = sources.window_of(model)
    tokens = sources.tokens_of(tokenizer, documents, window)
    sources.check_before(model, tokens, layer, token)
    make_ready(out)
    with Console(stderr=True).status(WORDS[lang]["routing"]):
        trace = sources.route(model, tokens, seed)
    layer = trace.n_layers // 2 if layer is None else layer
    if token is None:  # the first of those whose experts differ most from plain top-k's
        token = int(overlap_of(trace, layer).argmin())

    word = recorded_word(trace, token)
    shown = _what_is_shown(trace, lang, layer, token, seed)
    cut = said_of_windows(tokens.windows, window, lang)
    if not as_json:
        _show(trace, shown, word, lang, layer, token, "".join(cut[:1]))
    names = ("routing.png", "load.png", "trace.safetensors")
    save_figure(routing_figure(trace, layer=layer, lang=lang), out / names[0], dpi=100, trim=False)
    save_figure(load_figure(trace, lang=lang), out / names[1], dpi=100, trim=False)
    trace.save(out / names[2])
    if as_json:
        print_json(_document(trace, shown, layer, token, word, [out / name for name in names]))
    else:
        _say_saved(trace, lang, layer, out, names)
        say_how_again(trace, lang, *cut[1:])
    return 1 if any(report.status == "collapsed" for report in shown.stats.layers) else 0


class Shown(NamedTuple):
    """What the demo says of a routing; labels: the domain of each document, in words, empty for random input."""

    stats: "Stats"
    preferences: "Preferences | None"
    steps: "Steps"
    labels: list[str]

    def tokens_of(self, trace: "Trace") -> dict[str, int]:
        """Tokens of every domain."""
        counts = dict.fromkeys(self.labels, 0)
        for sequence in trace.sequences.tolist() if self.labels else ():
            counts[self.labels[sequence]] += 1
        return counts


def _what_is_shown(trace: "Trace", lang: str, layer: int, token: int, seed: int) -> Shown:
    from moesaic.trace.rule.steps import steps
    from moesaic.trace.statistics.preference import domain_preference
    from moesaic.trace.statistics.stats import stats
    from moesaic.train.data import DOMAINS

    names = {key: getattr(domain, lang) for key, domain in DOMAINS.items()} | {"text": WORDS[lang]["your_text"]}
    labels = [names.get(label, label) for label in trace.labels or ()]
    preferences = domain_preference(trace, labels, seed=seed) if len(set(labels)) > 1 else None
    return Shown(stats(trace, seed=seed), preferences, steps(trace, layer=layer, token=token), labels)


def _show(trace: "Trace", shown: Shown, word: str, lang: str, layer: int, token: int, cut: str) -> None:
    """Print the three parts."""
    from rich.console import Console

    from moesaic.trace.rule.steps_table import steps_table
    from moesaic.trace.shown import visible
    from moesaic.trace.statistics.load_table import load_table, preference_table

    say, show = WORDS[lang], Console().print
    per_label, config = shown.tokens_of(trace), trace.configs[0]
    sizes = say["sizes"].format(c=config) + (say["groups"].format(c=config) if config.n_group > 1 else "")
    print(say["model"].format(model=trace.model, layers=trace.n_layers, config=sizes))
    domains = ", ".join(f"{visible(label, 40)} {count:,}" for label, count in per_label.items())
    print(say["text"].format(tokens=len(trace), documents=trace.n_sequences, domains=domains))
    if cut:
        print(cut)

    print("\n" + say["load"])
    show(load_table(list(shown.stats.layers), lang))
    if shown.preferences is not None:
        print(say["prefer"])
        show(preference_table(shown.preferences, lang))
    label = visible(shown.labels[int(trace.sequences[token])], 40)
    print(say["token"].format(layer=trace.layers[layer], token=token, word=word, label=label))
    show(steps_table(shown.steps, lang, versus=True))


def _document(trace: "Trace", shown: Shown, layer: int, token: int, word: str, files: list[Path]) -> dict[str, Any]:
    """The same numbers for a program, and how to get them again."""
    from moesaic.trace.rule.steps_table import steps_as_dict

    domain = shown.labels[int(trace.sequences[token])] if shown.labels else None
    followed = {"layer": trace.layers[layer], "token": token, "text": word, "domain": domain}
    return {
        **shown.stats.to_dict(),
        "sequences": trace.n_sequences,
        "tokens_by_domain": shown.tokens_of(trace),
        "domains": None if shown.preferences is None else shown.preferences.to_dict(),
        "followed": followed | steps_as_dict(shown.steps, versus=True),
        "files": [str(file) for file in files],
        "command": typed(),
        "versions": dict(trace.versions),
        "seed": trace.seed,
        "config": trace.configs[0].digest(),
    }


def _say_saved(trace: "Trace", lang: str, layer: int, out: Path, names: tuple[str, ...]) -> None:
    say = WORDS[lang]
    print(say["saved"].format(out=out))
    for name, what in zip(names, say["files"], strict=True):
        print(f"   {name:<20}{what.format(layer=trace.layers[layer])}")
