"""`moesaic upcycle`: the folder of a dense model -> the folder of an MoE model with the same output."""

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import Lang, print_json, say_command, say_next

# carried over as they are: what belongs to the tokenizer, and the terms of the weights
CARRIED = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "tekken.json",
    "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip

WORDS = {
    "en": {
        "what": "{from} -> {to}: {layers} layers of {experts} experts, top {top_k}",
        "parameters": "parameters {dense_parameters:,} -> {parameters:,}",
        "same": "output: the same, compared on a few tokens",
        "other": "output: another one, a share of every expert was drawn anew",
        "written": "written to {out}",
        "trace": "which experts it chooses, before it is trained",
        "check": "its gates, by known traps",
    },
    "zh": {
        "what": "{from} -> {to}：{layers} 层，每层 {experts} 个专家，取 {top_k} 个",
        "parameters": "参数 {dense_parameters:,} -> {parameters:,}",
        "same": "输出：不变，用几个 token 比对过",
        "other": "输出：已改变，每个专家都有一部分重新抽取",
        "written": "写入 {out}",
        "trace": "训练之前，它选择哪些专家",
        "check": "用已知的陷阱检查它的门控",
    },
}


def upcycle(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder of a dense Hugging Face model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the MoE model; must not be there yet.")],
    experts: Annotated[int, typer.Option(help="Copies of every MLP.")] = 8,
    k: Annotated[int, typer.Option("--k", help="Of these, how many a token visits.")] = 2,
    granularity: Annotated[
        int, typer.Option(help="Cut every copy into this many experts; a token visits as many times more.")
    ] = 1,
    noise: Annotated[
        float, typer.Option(help="Share of every expert to draw anew; the output is then another one.")
    ] = 0.0,
    router_std: Annotated[
        float | None,
        typer.Option(help="Deviation of the router's weights; the config's initializer_range unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the router and of --noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    lang: Lang = "en",
) -> int:
    """Make an MoE model of a dense one that computes the same, to train it further: Qwen3 -> Qwen3-MoE, Qwen2 ->
    Qwen2-MoE, Llama and Mistral -> Mixtral, OLMo 2 and 3 -> FlexOlmo. Plain transformers loads it.
    """
    if out.exists():
        raise ValueError(f"--out {out} is there already: give a new folder")
    options = {"experts": experts, "k": k, "granularity": granularity, "noise": noise, "router_std": router_std}
    from moesaic.hf.load import quiet_transformers
    from moesaic.hf.upcycle import upcycle as upcycled
    from moesaic.trace.shown import visible

    with quiet_transformers():
        dense = _load(model, experts, k, granularity)
        moe = upcycled(dense, **options, seed=seed)
        said = _described(dense, moe)
        del dense  # before writing, which may hold another copy of what it writes
        _write(moe, model, out)
    if as_json:
        print_json({**said, "options": {**options, "seed": seed}, "out": str(out)})
        return 0
    for name in ("what", "parameters", "other" if noise else "same", "written"):
        print(visible(WORDS[lang][name].format(**said, out=out)))
    commands = {"check": f"moesaic check {shlex.quote(str(out))}"}
    if any(out.glob("tokenizer*")):
        commands = {"trace": f"moesaic trace {shlex.quote(str(out))} --corpus --detail scores", **commands}
    say_next([(command, WORDS[lang][name]) for name, command in commands.items()], lang)
    say_command(said["versions"], seed, said["config"], lang)
    return 0


def _load(folder: Path, experts: int, k: int, granularity: int) -> Any:
    """The dense model; refused from its config.json alone where that is enough."""
    from transformers import AutoConfig

    from moesaic.hf.load import HERE, first_line, load_network
    from moesaic.hf.upcycle import check_sizes

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there: give the folder of a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(folder, **HERE)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{folder}: its config.json cannot be read ({first_line(error)})") from None
    try:
        check_sizes(config, experts, k, granularity)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return load_network(folder, dtype="auto")


def _described(dense: Any, moe: Any) -> dict[str, Any]:
    from moesaic.hf.modules import moe_layers
    from moesaic.versions import versions

    layers = moe_layers(moe)
    return {
        "from": type(dense).__name__,
        "to": type(moe).__name__,
        "layers": len(layers),
        "experts": layers[0].config.n_routed_experts,
        "top_k": layers[0].config.num_experts_per_tok,
        "dense_parameters": dense.num_parameters(),
        "parameters": moe.num_parameters(),
        "config": layers[0].config.digest(),
        "versions": versions("transformers"),
    }


def _write(moe: Any, source: Path, out: Path) -> None:
    """All of the folder, or nothing: it gets its name when it is complete."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
            part = Path(place) / "model"
            moe.save_pretrained(part)
            for file in sorted({file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()}):
                shutil.copyfile(file, part / file.name)
            part.rename(out)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}): give another folder") from None
