"""`moesaic doctor`: what is installed, what this machine can do, and which engine serves what, and why."""

import gc
import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

DTYPES = ("float32", "bfloat16", "float16", "float64")
MEASURED_DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3, "float64": 1e-12}  # of the largest value
WORTH_TELLING = 1.25  # times the fastest form's time: below, two runs may disagree
WORDS = {
    "en": {
        "versions": "Versions", "machine": "Machine", "none": "none",
        "cpu": "CPU", "cores": "cores, threads of torch", "isa": "instructions", "torch_isa": "torch uses",
        "onednn_isa": "oneDNN uses", "memory": "memory", "cache": "L2, L3", "cuda": "CUDA devices",
        "free": "{free} free of {all}", "load": "busy processes", "load_of": "{load:.1f} in the last minute",
        "held_back": "The CPU has bfloat16 instructions that oneDNN does not use: is ONEDNN_MAX_CPU_ISA set?",
        "engines": "Engines: what engine=\"auto\" takes, tried here against float64",
        "engine_columns": ("device", "dtype", "auto"), "ok": "right", "no": "no",
        "elsewhere": "On a CUDA device, which is not here, auto would take for {dtype}: {auto}, {reason}.",
        "known": "transformers knows the experts implementation \"moesaic\". Switch it on with one of",
        "unknown": "transformers does not know \"moesaic\": {reason}",
        "stream": "Read from memory: {gb:.1f} GB/s. Square matmul: {flops}.",
        "forms": "{dtype}: x [rows, {i}] times W' [{i}, {o}] from memory, µs, the best of {n} runs",
        "rows": "rows", "engine": "the engine", "measuring": "Measuring, some seconds...",
        "slow": "In {n} of {all} rows some form is over {x:.2f} times as fast as the engine: please report this table.",
        "fast": "In every row the engine is within {x:.2f} times the fastest form.",
        "wrong": "engine=\"auto\" does not give the right numbers on: {where}",
    },
    "zh": {
        "versions": "版本", "machine": "机器", "none": "无",
        "cpu": "CPU", "cores": "核数，torch 线程数", "isa": "指令集", "torch_isa": "torch 使用",
        "onednn_isa": "oneDNN 使用", "memory": "内存", "load": "忙碌进程数", "cache": "L2、L3", "cuda": "CUDA 设备",
        "free": "共 {all}，可用 {free}", "load_of": "最近一分钟 {load:.1f}",
        "held_back": "CPU 有 bfloat16 指令而 oneDNN 没有使用：是否设置了 ONEDNN_MAX_CPU_ISA？",
        "engines": "引擎：engine=\"auto\" 的选择，均已在本机与 float64 对照",
        "engine_columns": ("设备", "类型", "auto"), "ok": "正确", "no": "否",
        "elsewhere": "若有 CUDA 设备（本机没有），auto 对 {dtype} 会选择：{auto}，{reason}。",
        "known": "transformers 已认识专家实现 \"moesaic\"，任选一种方式启用：",
        "unknown": "transformers 不认识 \"moesaic\"：{reason}",
        "stream": "内存读取：{gb:.1f} GB/s。方阵乘法：{flops}。",
        "forms": "{dtype}：x [行数, {i}] 乘以来自内存的 W' [{i}, {o}]，微秒，{n} 次中最快",
        "rows": "行数", "engine": "引擎", "measuring": "正在测量，需要几秒……",
        "slow": "{all} 行中有 {n} 行存在速度超过引擎 {x:.2f} 倍的形式：请报告此表。",
        "fast": "每一行中，引擎用时都不超过最快形式的 {x:.2f} 倍。",
        "wrong": "engine=\"auto\" 在以下情形结果不正确：{where}",
    },
}  # fmt: skip
SWITCH_ON = (
    'import moesaic.hf; AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesaic")',
    "model = moesaic.attach(model)",
)


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure memory and matmuls too: some seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
) -> int:
    """Say what is installed, what this machine can do, and which engine serves which device and dtype, and why.

    Every engine is run on a small problem, forward and backward. Exit code 1 where "auto" gives wrong numbers.
    """
    gc.disable()  # as in demo
    if lang not in WORDS:
        raise ValueError(f"--lang {lang!r} is unknown: use en or zh")
    from rich.console import Console

    found = examine()
    if measure:
        Console(stderr=True).print(WORDS[lang]["measuring"], style="dim")
        found["measured"] = take_measures()
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        console = Console()
        for part in report(found, WORDS[lang]):
            console.print(part, soft_wrap=isinstance(part, str))  # lines of code are for copying
    return 1 if wrong(found) else 0


def examine() -> dict[str, Any]:
    """Everything that can be said without measuring a time."""
    import torch

    from moesaic.bench.machine import available_bytes, machine
    from moesaic.engine.select import best_engine

    found = machine()
    versions = found.pop("versions") | {name: version for name in ("numpy", "triton") if (version := _version(name))}
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    here = {
        "threads": torch.get_num_threads(),
        "free_bytes": available_bytes(),
        "load": os.getloadavg()[0],
        "cuda": cuda,
    }
    result = {
        "versions": versions,
        "machine": found | here,
        "engines": [serve(device, dtype) for device in ("cpu", *(["cuda"] if cuda else [])) for dtype in DTYPES],
        "transformers": transformers_seam(),
    }
    if not cuda:
        name, reason = best_engine("cuda", torch.bfloat16)
        result["on_cuda"] = {"dtype": "bfloat16", "auto": name, "reason": reason}
    return result


def serve(device: str, dtype: str) -> dict[str, Any]:
    """What "auto" takes there, why, and how each engine did: null where it was right, else what went wrong."""
    import torch

    from moesaic.engine.select import ENGINES, best_engine

    name, reason = best_engine(device, getattr(torch, dtype))
    tried = {engine: try_engine(engine, device, dtype) for engine in ENGINES}
    return {"device": device, "dtype": dtype, "auto": name, "reason": reason, "engines": tried}


def try_engine(name: str, device: str, dtype: str) -> str | None:
    """None where an engine gives the reference's numbers, forward and backward; else the reason, in one line."""
    import torch

    from moesaic.engine.reference import reference
    from moesaic.engine.select import ENGINES
    from moesaic.engine.spec import ExpertSpec
    from moesaic.types import ExpertWeights

    draw = torch.Generator().manual_seed(0)
    n_experts, d, i, n_tokens, k = 4, 512, 384, 24, 2  # matrices large enough for the forms that real models meet
    shapes = ((n_tokens, d), (n_tokens, k), (n_experts, 2 * i, d), (n_experts, d, i))
    drawn = [torch.randn(shape, generator=draw).div(16).to(getattr(torch, dtype)) for shape in shapes]
    ids = torch.rand(n_tokens, n_experts, generator=draw).topk(k).indices

    def run(engine: Any, tensors: "list[torch.Tensor]", ids: "torch.Tensor") -> "list[torch.Tensor]":
        x, weights, up, down = (tensor.requires_grad_() for tensor in tensors)
        out = engine(x, ids, weights, ExpertWeights(up, down), ExpertSpec())
        return [out, *torch.autograd.grad(out.square().sum(), (x, weights, up, down))]

    expected = run(reference, [tensor.double() for tensor in drawn], ids)
    try:
        got = run(ENGINES[name], [tensor.to(device, copy=True) for tensor in drawn], ids.to(device))
    except Exception as error:  # whatever it is, it is the finding
        return " ".join(f"{type(error).__name__}: {error}".split())
    worst = max(
        float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(got, expected, strict=True)
    )
    return None if worst <= TOLERANCE[dtype] else f"off by {worst:.1e} of the largest value"


def transformers_seam() -> dict[str, Any]:
    """Whether transformers offers "moesaic" as an experts implementation, and how to switch it on."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        import moesaic.hf  # noqa: F401, registers it
    except ImportError as error:
        return {"known": False, "reason": str(error), "switch_on": SWITCH_ON}
    known = "moesaic" in ALL_EXPERTS_FUNCTIONS
    return {"known": known, "reason": None if known else "not registered", "switch_on": SWITCH_ON}


def take_measures() -> dict[str, Any]:
    """Memory, square matmuls in GF/s, and every form of an expert's matmul in microseconds, by dtype and rows."""
    import torch

    from moesaic.bench.ceiling import read_speed
    from moesaic.bench.forms import square_flops, time_forms

    with torch.inference_mode():
        return {
            "read_gb_per_s": read_speed() / 1e9,
            "square_gflops": {dtype: square_flops(getattr(torch, dtype)) / 1e9 for dtype in DTYPES},
            "forms": [times.to_dict() for dtype in MEASURED_DTYPES for times in time_forms(getattr(torch, dtype))],
        }


def wrong(found: dict[str, Any]) -> list[str]:
    """Where "auto" fails: device and dtype."""
    return [f"{row['device']} {row['dtype']}" for row in found["engines"] if row["engines"][row["auto"]] is not None]


def report(found: dict[str, Any], words: dict[str, Any]) -> "list[RenderableType]":
    from rich.markup import escape
    from rich.text import Text

    machine, seam = found["machine"], found["transformers"]
    rows = {
        "cpu": machine["cpu"],
        "cores": f"{machine['cores']}, {machine['threads']}",
        "isa": " ".join(machine["isa"]) or words["none"],
        "torch_isa": machine["torch_isa"],
        "onednn_isa": machine["onednn_isa"],
        "cache": ", ".join(_size(machine[level]) for level in ("l2_bytes", "l3_bytes")),
        "memory": words["free"].format(free=_size(machine["free_bytes"]), all=_size(machine["memory_bytes"])),
        "load": words["load_of"].format(load=machine["load"]),
        "cuda": ", ".join(machine["cuda"]) or words["none"],
    }
    parts: list[RenderableType] = [
        _pairs(words["versions"], found["versions"]),
        _pairs(words["machine"], {words[key]: value for key, value in rows.items()}),
    ]
    if held_back(machine):
        parts.append(Text(words["held_back"] + "\n", style="yellow"))
    parts += _engines(found["engines"], words)
    parts += [words["elsewhere"].format(**found["on_cuda"]) + "\n"] if "on_cuda" in found else []
    if wrong(found):
        parts.append(Text(words["wrong"].format(where=", ".join(wrong(found))) + "\n", style="bold red"))
    parts.append(Text(words["known"] if seam["known"] else words["unknown"].format(reason=seam["reason"])))
    parts += [f"  {escape(how)}" for how in seam["switch_on"] if seam["known"]]
    return parts + (_measures(found["measured"], words) if "measured" in found else [])


def held_back(machine: dict[str, Any]) -> bool:
    """Whether the CPU multiplies bfloat16 and oneDNN, which names what it uses, does not."""
    has = any("bf16" in flag for flag in machine["isa"])
    return has and machine["onednn_isa"] != "unknown" and "bfloat16" not in machine["onednn_isa"].lower()


def _engines(rows: list[dict[str, Any]], words: dict[str, Any]) -> "list[RenderableType]":
    """The table, then in lines of their own why "auto" takes what it takes and what kept the others from it."""
    from rich.markup import escape
    from rich.padding import Padding

    table = _table(words["engines"], (*words["engine_columns"], *rows[0]["engines"]))
    failures = list(dict.fromkeys(failure for row in rows for failure in row["engines"].values() if failure))
    for row in rows:
        tried = [
            f"[yellow]{words['no']} ({failures.index(failure) + 1})" if failure else f"[green]{words['ok']}"
            for failure in row["engines"].values()
        ]
        table.add_row(row["device"], row["dtype"], f"[bold]{row['auto']}", *tried)
    lines = [f"({number}) {failure}" for number, failure in enumerate(failures, 1)]
    lines += [f"{row['device']} {row['dtype']}: {row['auto']}, {row['reason']}" for row in rows]
    return [table, *(Padding(escape(line), (0, 0, 0, 1)) for line in lines), ""]


def _measures(measured: dict[str, Any], words: dict[str, Any]) -> "list[RenderableType]":
    from rich.text import Text

    from moesaic.bench.forms import IN, OUT, ROUNDS

    flops = ", ".join(f"{dtype} {value:.0f} GF/s" for dtype, value in measured["square_gflops"].items())
    parts: list[RenderableType] = [Text("\n" + words["stream"].format(gb=measured["read_gb_per_s"], flops=flops))]
    for dtype in MEASURED_DTYPES:
        rows = [row for row in measured["forms"] if row["dtype"] == dtype]
        labels = list(dict.fromkeys(label for row in rows for label in row["us"]))
        title = words["forms"].format(dtype=dtype, i=IN, o=OUT, n=ROUNDS)
        table = _table(title, (words["rows"], *labels, words["engine"]), justify="right")
        for row in rows:
            times = [_time(row, label) for label in labels]
            style = "yellow" if row["slower"] > WORTH_TELLING else "default"
            table.add_row(str(row["rows"]), *times, f"[{style}]{row['engine_us']:.0f}  {row['engine']}")
        parts.append(table)
    slow = [row for row in measured["forms"] if row["slower"] > WORTH_TELLING]
    verdict = words["slow" if slow else "fast"]
    parts.append(Text(verdict.format(n=len(slow), all=len(measured["forms"]), x=WORTH_TELLING)))
    return parts


def _time(row: dict[str, Any], label: str) -> str:
    if label not in row["us"]:
        return ""
    return f"[bold green]{row['us'][label]:.0f} *" if label == row["fastest"] else f"{row['us'][label]:.0f}  "


def _pairs(title: str, pairs: dict[str, str]) -> "Table":
    table = _table(title, ("", ""))
    table.show_header = False
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


def _table(title: str, columns: tuple[str, ...], justify: Any = "left") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
