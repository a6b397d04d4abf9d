"""`moesaic trace`: what the gates of a model did with a text, recorded into a file."""

import gc
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moesaic.cli.output import Lang, config_of, print_json, progress, provenance, say_how_again, say_next

if TYPE_CHECKING:
    from moesaic.trace.store import Trace

DETAILS = ("ids", "picks", "scores")
WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "reading": "Reading", "no_name": "a model without a name", "more": "{n} more",
        "model": "{model}: {layers}, top {k} of {experts}",
        "text": "{tokens} of {documents}", "token": "token", "document": "document", "labels": " ({labels})",
        "cut": ("The document is", "{cut} of {all} documents are"),
        "windows": " read in {n} windows of {window} tokens, each by itself",
        "further": "; --window {most} reads further at once", "window": "windows of {window} tokens",
        "missing": "MoE layers without data: {names}",
        "saved": "Saved in {out}: {size}, {detail}", "replaces": " (in the place of an older trace)",
        "detail": {
            "ids": "the experts of every token", "picks": "the experts of every token and their weights",
            "scores": "experts, weights, and the logits and biases of the routers",
        },
        "unknown_rule": "How this family routes is not known here: loads can be judged, the steps not derived.",
        "stats": "is the load balanced, and does it matter?", "diff": "does another record route alike?",
        "steps": "what the gate did with one token",
    },
    "zh": {
        "reading": "正在读取", "no_name": "未命名的模型", "more": "另有 {n} 个",
        "model": "{model}：{layers} 个 MoE 层，每个 token 从 {experts} 个专家中选 {k} 个",
        "text": "{documents}，共 {tokens}", "token": " 个 token", "document": " 个文档", "labels": "（{labels}）",
        "cut": ("文档", "{all} 个文档中有 {cut} 个"),
        "windows": "分成 {n} 个窗口分别读入，每个窗口 {window} 个 token",
        "further": "；用 --window {most} 一次可以读得更长", "window": "窗口 {window} 个 token",
        "missing": "没有数据的 MoE 层：{names}",
        "saved": "已保存到 {out}：{size}，{detail}", "replaces": "（替换了旧的记录）",
        "detail": {
            "ids": "每个 token 的专家", "picks": "每个 token 的专家与权重",
            "scores": "专家、权重，以及路由器的 logits 与偏置",
        },
        "unknown_rule": "这里不知道该模型系列的路由规则：可以判断负载，不能推导各步骤。",
        "stats": "负载均衡吗？要紧吗？", "diff": "另一份记录的路由相同吗？",
        "steps": "门控对一个 token 做了什么",
    },
}  # fmt: skip
MOST_LABELS = 8  # shown by name


def trace(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a Hugging Face MoE model; the shipped one unless given.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Let the model read this text.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option(help="Let it read this file; may be given several times, each a document.")
    ] = None,
    corpus: Annotated[bool, typer.Option("--corpus", help="Let it read the shipped corpus: four domains.")] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Every line of the text or the files is a document.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("run.safetensors"),
    detail: Annotated[
        str, typer.Option(help="ids (experts only), picks (and weights), scores (and logits and biases).")
    ] = "picks",
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens read at once, 128 unless given; longer documents are cut.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was recorded as JSON.")] = False,
    lang: Lang = "en",
) -> int:
    """Let a model read a text and record which experts each token used: the input of stats, steps, diff and what-if.

    The record is one .safetensors file with the tokens, their text and their documents in it.
    """
    gc.disable()  # as in demo
    if detail not in DETAILS:
        raise ValueError(f"--detail {detail!r} is unknown: use one of {', '.join(DETAILS)}")
    from moesaic.cli import sources
    from moesaic.hf.load import TINY, load_model, quiet_transformers

    documents = sources.documents(text, file or [], corpus, lines)
    replaces = check_target(out)
    network, tokenizer = load_model(model or TINY)
    most, window = sources.window_of(network, window)
    network = moved(network, device)
    tokens = sources.tokens_of(tokenizer, documents, window)
    sources.check_before(network, tokens)
    with quiet_transformers(), progress(WORDS[lang]["reading"], len(tokens.sequences)) as done:
        recorded = sources.record_documents(network, tokens, detail, out, done=done)
    size, cut = Size(len(tokens.sequences), len(documents)), said_of_windows(tokens.windows, window, lang)
    if as_json:
        read = {"window": window, "windows": sum(tokens.windows)}
        print_json(provenance((out, recorded)) | described(recorded, size, out) | read)
    else:
        further = "" if window == most else WORDS[lang]["further"].format(most=most or "N")
        show(recorded, size, out, lang, replaces=replaces, cut=cut[0] + further if cut else "")
        say_how_again(recorded, lang, *cut[1:])
    return 0


def said_of_windows(windows: Sequence[int], window: int, lang: str) -> tuple[str, ...]:
    """What is said, and in few words, of documents that were read in several windows; nothing where none was."""
    say, cut = WORDS[lang], [n for n in windows if n > 1]
    if not cut:
        return ()
    who = say["cut"][len(windows) > 1].format(cut=f"{len(cut):,}", all=f"{len(windows):,}")
    return who + say["windows"].format(n=f"{sum(cut):,}", window=window), say["window"].format(window=window)


def check_target(out: Path) -> bool:
    """Whether a trace is there already, which will be replaced. Refuses, before any work, every other file (weights are
    .safetensors too) and what cannot be written."""
    from moesaic.trace.file.writer import folder_beside, target

    try:
        folder_beside(target(out)).rmdir()
    except ValueError as error:
        raise ValueError(f"--out {error}") from None
    return out.exists()


class Size(NamedTuple):
    """How much is in a trace that was written and is not in memory."""

    tokens: int
    documents: int


def show(recorded: "Trace", size: Size, out: Path, lang: str, *, replaces: bool, cut: str = "") -> None:
    """What is in a trace that was just written, and what to do with it. cut: how documents were cut, if any was."""
    from moesaic.trace.shown import counted, visible

    say, config = WORDS[lang], recorded.configs[0]
    name = visible(recorded.model, 60) or say["no_name"]
    sizes: dict[str, Any] = {"layers": recorded.n_layers, "experts": config.n_routed_experts}
    if lang == "en":
        sizes = {"layers": counted(sizes["layers"], "MoE layer"), "experts": counted(sizes["experts"], "expert")}
    print(say["model"].format(model=name, k=config.num_experts_per_tok, **sizes))
    print(_read(recorded, size, lang))
    if cut:
        print(cut)
    if recorded.missing:
        print(say["missing"].format(names=", ".join(visible(name, 60) for name in recorded.missing)))
    if not config.rule_is_known:
        print(say["unknown_rule"])
    what = say["detail"][recorded.detail]
    saved = say["saved"].format(out=visible(str(out)), size=_in_words(out.stat().st_size), detail=what)
    print(saved + (say["replaces"] if replaces else ""))
    path = shlex.quote(str(out))
    commands = [(f"moesaic stats {path}", say["stats"])]
    if recorded.detail == "scores" and config.rule_is_known:
        commands.append((f"moesaic steps --trace {path} --layer 0 --token 0", say["steps"]))
    commands.append((f"moesaic diff {path} OTHER.safetensors", say["diff"]))
    say_next(commands, lang)


def _read(recorded: "Trace", size: Size, lang: str) -> str:
    """How much was read: "12 tokens of 2 documents (prose 1, code 1)"."""
    from moesaic.trace.shown import visible

    say = WORDS[lang]
    many = {  # English has a plural
        name: f"{n:,} {say[name]}{'' if n == 1 else 's'}" if lang == "en" else f"{n:,}{say[name]}"
        for name, n in (("token", size.tokens), ("document", size.documents))
    }
    by_label = Counter(recorded.labels or ())
    names = [f"{visible(label, 40)} {n:,}" for label, n in by_label.most_common(MOST_LABELS)]
    if len(by_label) > MOST_LABELS:
        names.append(say["more"].format(n=len(by_label) - MOST_LABELS))
    line = say["text"].format(tokens=many["token"], documents=many["document"])
    return line + (say["labels"].format(labels=("，" if lang == "zh" else ", ").join(names)) if names else "")


def described(recorded: "Trace", size: Size, out: Path) -> dict[str, Any]:
    """The same for a program."""
    config = recorded.configs[0]
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "model": recorded.model,
        "detail": recorded.detail,
        "layers": list(recorded.layers),
        "origins": list(recorded.origins),
        "missing": list(recorded.missing),
        "tokens": size.tokens,
        "documents": size.documents,
        "labels": dict(Counter(recorded.labels or ())),
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "rule_is_known": config.rule_is_known,
        "config": config_of(recorded),
        "seed": recorded.seed,
        "versions": dict(recorded.versions),
    }


def _in_words(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def moved(model: Any, device: str) -> Any:
    from torch import OutOfMemoryError

    try:
        return model.to(device)
    except OutOfMemoryError:  # the device is there
        raise
    except (RuntimeError, AssertionError):  # torch has no one kind for an unknown or a missing device
        raise ValueError(f"--device {device!r} is not there: use cpu, or cuda where torch has a GPU") from None
