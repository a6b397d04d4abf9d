"""`moesaic steps`: the 15 steps of one token through one gate."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import JSON_HELP, Lang, print_json, provenance, say_how_again

if TYPE_CHECKING:
    from moesaic.trace.store import Trace


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
    lang: Lang = "en",
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show what a gate did with one token: 15 steps with formula, shape and values."""
    gc.disable()  # as in demo
    if vs not in (None, "topk"):
        raise ValueError(f"--vs {vs!r} is unknown: use topk")
    if trace is not None and (text is not None or model is not None):
        raise ValueError("--trace has its routing recorded already: leave out TEXT and --model")
    if text is not None and not text.strip():
        raise ValueError("TEXT is empty: give a word at least")
    from rich.console import Console

    from moesaic.cli import sources
    from moesaic.hf.load import TINY, load_model
    from moesaic.trace.file.reader import load
    from moesaic.trace.rule.steps import steps as steps_of
    from moesaic.trace.rule.steps_table import steps_as_dict, steps_table
    from moesaic.trace.shown import short_layers

    if trace is not None:
        recorded = load(trace)
        counts = {"layer": recorded.n_layers, "token": len(recorded)}
        sources.check_numbers({"layer": layer, "token": token}, counts)
    else:
        network, tokenizer = load_model(model or TINY)
        given = sources.Document("text", sources.SAMPLE if text is None else text)
        _, window = sources.window_of(network)
        tokens = sources.tokens_of(tokenizer, [given], window)
        sources.check_before(network, tokens, layer, token)
        recorded = sources.route(network, tokens)
    word = recorded_word(recorded, token)
    of_token = steps_of(recorded, layer=layer, token=token)
    if json:
        about = {"model": recorded.model, "layer": recorded.layers[layer], "token": token, "text": word}
        print_json(provenance((trace, recorded)) | about | steps_as_dict(of_token, versus=vs == "topk"))
        return
    title = f"token {token} {word}  layer {layer}: {short_layers(recorded.layers)[layer]}"
    if lang == "zh":
        title = f"token {token} {word}  第 {layer} 层：{short_layers(recorded.layers, lang)[layer]}"
    Console().print(steps_table(of_token, lang, versus=vs == "topk", title=title))
    say_how_again(recorded, lang)


def recorded_word(trace: "Trace", token: int) -> str:
    """The text of a token as the trace holds it; empty where it holds none."""
    if trace.pieces is None or trace.input_ids is None:
        return ""
    piece = trace.pieces.get(int(trace.input_ids[token]))
    return "" if piece is None else repr(piece)
