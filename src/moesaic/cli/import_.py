"""`moesaic import`: records of other engines as traces."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import Lang, print_json, progress, provenance, say_how_again
from moesaic.cli.trace import Size, check_target, described, show

FORMATS = {  # name -> what files are meant
    "sglang": ".pt of the expert distribution recorder, mode per_token, or the .json or .jsonl of responses",
    "vllm": "routed_experts: .npy, or the .json or .jsonl of responses",
    "megatron": "router_trace_rank*.jsonl",
}


def import_(
    source: Annotated[str, typer.Argument(metavar="FORMAT", help="sglang, vllm or megatron.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The record: all its files.")],
    config: Annotated[
        str | None, typer.Option(help="The model: a preset's name, a config.json, or the folder of a model.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Instead: how many experts a layer has. The rule stays unknown.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("run.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was imported as JSON.")] = False,
    lang: Lang = "en",
) -> int:
    """Read what another engine recorded into a trace: dumps of SGLang, its and vLLM's routed_experts,
    router traces of Megatron.

    Nothing in the files is executed, and everything in them is checked.
    """
    gc.disable()  # as in demo
    if source not in FORMATS:
        known = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
        raise ValueError(f"FORMAT {source!r} is unknown: use one of {known}")
    if twice := next((file for file, times in Counter(files).items() if times > 1), None):
        raise ValueError(f"{twice} is given twice: give every file once")
    if any(out.exists() and file.exists() and out.samefile(file) for file in files):
        raise ValueError(f"--out {out} is one of the files to read: give another name")
    replaces = check_target(out)
    from moesaic.trace.imports import READERS, read_target

    target = read_target(config, experts)
    with progress({"en": "Reading files", "zh": "正在读取文件"}[lang], len(files), quiet=as_json) as done:
        trace, notes = READERS[source](_each(files, done), target)
    trace.save(out)
    size = Size(len(trace), trace.n_sequences)
    said = [getattr(note, lang) for note in notes]
    if as_json:
        print_json(provenance((out, trace)) | {"format": source, **described(trace, size, out), "notes": said})
    else:
        for note in said:  # our own words and numbers, nothing of the files
            print(f"! {note}")
        show(trace, size, out, lang, replaces=replaces)
        say_how_again(trace, lang)
    return 0


def _each(files: list[Path], done: Callable[[int], None]) -> Iterator[Path]:
    """The files one by one; `done` hears of each when the next one is asked for."""
    for file in files:
        yield file
        done(1)
