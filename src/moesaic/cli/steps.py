"""`moesaic steps`: the 15 steps of one token through one gate."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import say_how_again


def steps(
    text: Annotated[
        str | None, typer.Argument(help="Text to route; four lines unless given, one of each shipped domain.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face MoE model; the shipped one unless given.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A recorded .safetensors instead of a text.")] = None,
    layer: Annotated[int, typer.Option(help="Which MoE layer, from 0 in forward order.")] = 0,
    token: Annotated[int, typer.Option(help="Which token, from 0.")] = 0,
    vs: Annotated[str | None, typer.Option(help="topk: what plain top-k would have taken instead.")] = None,
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
) -> None:
    """Show what a gate did with one token: 15 steps with formula, shape and values."""
    gc.disable()  # as in demo
    if vs not in (None, "topk"):
        raise ValueError(f"--vs {vs!r} is unknown: use topk")
    if lang not in ("zh", "en"):
        raise ValueError(f"--lang {lang!r} is unknown: use zh or en")
    if trace is not None and (text is not None or model is not None):
        raise ValueError("--trace has its routing recorded already: leave out TEXT and --model")
    if text is not None and not text.strip():
        raise ValueError("TEXT is empty: give a word at least")
    from rich.console import Console

    from moesaic.cli import sources
    from moesaic.hf.load import TINY, load_model
    from moesaic.trace.render import steps_table
    from moesaic.trace.steps import steps as steps_of
    from moesaic.trace.store import load

    if trace is not None:
        recorded, word = load(trace), ""
        counts = {"layer": recorded.n_layers, "token": len(recorded)}
        sources.check_numbers({"layer": layer, "token": token}, counts)
    else:
        network, tokenizer = load_model(model or TINY)
        windows = sources.windows_of(tokenizer, sources.SAMPLE if text is None else text)
        sources.check_before(network, windows, layer, token)
        recorded = sources.route(network, windows)
        word = sources.word_of(tokenizer, recorded, token)
    title = f"token {token} {word}  {recorded.layers[layer]}"
    table = steps_table(steps_of(recorded, layer=layer, token=token), lang, versus=vs == "topk", title=title)
    Console().print(table)
    say_how_again(recorded, lang)
