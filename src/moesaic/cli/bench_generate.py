"""`moesaic bench generate`: how fast a whole model reads and writes, with our engines and without."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.output import print_json, progress, typed

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.bench.generating import Generating
    from moesaic.bench.timing import Spread


def generate(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a Hugging Face MoE model; the shipped one unless given.")
    ] = None,
    read: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    write: Annotated[int, typer.Option(min=2, help="Tokens written after it, one by one.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 1,
    peers: Annotated[
        str, typer.Option(help="Experts implementations of transformers to compare with, with commas.")
    ] = "eager,grouped_mm",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; that of the weights or the config unless given.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights: of MODEL only config.json is needed.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="With --random: only so many layers.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; everybody runs once in each.")] = 5,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Let a whole model read a text and write on, under each experts implementation in turn, and compare the speeds.

    transformers' own generate() runs, attention and cache included. Everybody writes the same tokens, and everybody's
    logits are compared with eager's first. Exit code 1 where ours are wrong.
    """
    if layers is not None and not random:
        raise ValueError(f"--layers {layers}: only random weights can be fewer: add --random")
    import torch

    from moesaic.bench.generating import compare_generating, random_model
    from moesaic.bench.shapes import DTYPES
    from moesaic.cli.trace import moved
    from moesaic.hf.load import TINY, load_model, quietly

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    folder = model or TINY
    wanted = None if dtype is None else getattr(torch, dtype)
    network, tokenizer = (random_model(folder, layers, wanted), None) if random else load_model(folder)
    network = moved(network if wanted is None else network.to(wanted), device)
    tokens = _tokens(network, tokenizer, batch, read + write).to(network.device)
    names = [name.strip() for name in peers.split(",") if name.strip()]
    with quietly(), progress("eager", 2 + (len(names) + 1) * (rounds + 1)) as done:
        found = compare_generating(network, tokens, write, names, rounds, done)
    facts = _facts(network, folder, random, read, write, batch)
    if as_json:
        print_json(facts | {"results": [_as_dict(one, read * batch, batch) for one in found]})
    else:
        _show(facts, found)
    return 1 if found[0].note else 0


def _tokens(model: Any, tokenizer: Any, batch: int, length: int) -> "Tensor":
    """[batch, length] of the shipped texts, each row from another place; random ids where there is no tokenizer."""
    import torch

    from moesaic.cli.sources import held_out

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ValueError(f"--read and --write: {length} tokens together, and the model takes {most}: give fewer")
    known = model.get_input_embeddings().num_embeddings
    if tokenizer is None:
        return torch.randint(known, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer("\n".join(document.text for document in held_out()))["input_ids"])
    if len(ids) < batch * length:
        raise ValueError(f"--batch {batch}: the shipped texts have {len(ids)} tokens: give fewer, or shorter texts")
    if int(ids.max()) >= known:
        raise ValueError(f"the tokenizer gives id {int(ids.max())} and the model knows {known}")
    places = torch.arange(batch) * (len(ids) // batch)
    return ids[places[:, None] + torch.arange(length)]


def _facts(model: Any, folder: Path, random: bool, read: int, write: int, batch: int) -> dict[str, Any]:
    import torch

    from moesaic.bench.machine import machine

    text = model.config.get_text_config()
    return {
        "command": typed(),
        "model": type(model).__name__,
        "folder": str(folder),
        "weights": "random" if random else "of the folder",
        "layers": text.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "read": read,
        "write": write,
        "batch": batch,
        "machine": machine(),
    }


def _show(facts: dict[str, Any], found: "list[Generating]") -> None:
    from moesaic.bench.report import aligned

    m, read, batch = facts["machine"], facts["read"], facts["batch"]
    texts = f"{read} tokens" if batch == 1 else f"{batch} texts of {read} tokens"
    weights = "random" if facts["weights"] == "random" else f"of {facts['folder']}"
    what = [facts["model"], f"{facts['layers']} layers", f"weights {weights}", facts["dtype"]]
    where = [m["cpu"], facts["device"], f"{facts['threads']} threads", *(f"{n} {v}" for n, v in m["versions"].items())]
    print(f"{', '.join(what)}: reads {texts}, writes {facts['write']}\n{', '.join(where)}\n")
    table = [["", "reads tokens/s", "ours is", "writes tokens/s", "ours is", "logits from eager's"]]
    for one in found:
        reads = _speed(one.prefill, found[0].prefill, read * batch)
        writes = _speed(one.step, found[0].step, batch)
        table.append([one.name, *reads, *writes, "" if one.difference is None else f"{one.difference:.1e}"])
    print(aligned(table))
    for one in found:
        if one.note:
            print(f"{one.name}: {one.note}")
    print(f"\nreproduce: {facts['command']}")


def _speed(its: "Spread | None", ours: "Spread | None", tokens: int) -> list[str]:
    """Tokens a second, and how many times as fast ours is."""
    if its is None:
        return ["", ""]
    return [f"{tokens / its.median:.4g}", "" if ours is None or ours is its else f"{its.median / ours.median:.2f}x"]


def _as_dict(one: "Generating", read: int, batch: int) -> dict[str, Any]:
    """Seconds of the prefill and of a step, with their spread, and tokens a second."""
    speeds = {"reads": (one.prefill, read), "writes": (one.step, batch)}
    per_second = {f"{name}_tokens_per_second": s and n / s.median for name, (s, n) in speeds.items()}
    spreads = {name: s and s._asdict() for name, s in (("prefill_seconds", one.prefill), ("step_seconds", one.step))}
    difference = one.difference if one.difference is not None and math.isfinite(one.difference) else None
    return {"name": one.name, **per_second, **spreads, "difference": difference, "note": one.note}
