"""What `moesaic doctor` found, in tables and words."""

from typing import TYPE_CHECKING, Any

from moesaic.cli.examine import MEASURED_DTYPES, held_back, wrong
from moesaic.cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

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
        "reference": "The reference is the definition in float32 and float64: in 16 bits it adds a weight's gradients "
        "token by token in that type, where the other engines round once.",
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
        "engine_columns": ("设备", "类型", "auto"), "ok": "正确", "no": "不可用",
        "reference": "reference 在 float32 和 float64 下就是定义；在 16 位类型下，它用该类型逐个 token 累加权重的"
        "梯度，而其他引擎只舍入一次。",
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


def _engines(rows: list[dict[str, Any]], words: dict[str, Any]) -> "list[RenderableType]":
    """The table, then in lines of their own why "auto" takes what it takes and what kept the others from it."""
    from rich.markup import escape
    from rich.padding import Padding

    drawn = table(words["engines"], (*words["engine_columns"], *rows[0]["engines"]))
    failures = list(dict.fromkeys(said for row in rows for said in row["engines"].values() if said is not True))
    for row in rows:
        tried = [
            f"[green]{words['ok']}" if said is True else f"[yellow]{words['no']} ({failures.index(said) + 1})"
            for said in row["engines"].values()
        ]
        drawn.add_row(row["device"], row["dtype"], f"[bold]{row['auto']}", *tried)
    lines = [f"({number}) {failure}" for number, failure in enumerate(failures, 1)]
    lines += [words["reference"]] if any(row["engines"]["reference"] is not True for row in rows) else []
    lines += [f"{row['device']} {row['dtype']}: {row['auto']}, {row['reason']}" for row in rows]
    return [drawn, *(Padding(escape(line), (0, 0, 0, 1)) for line in lines), ""]


def _measures(measured: dict[str, Any], words: dict[str, Any]) -> "list[RenderableType]":
    from rich.text import Text

    from moesaic.bench.forms import IN, OUT, ROUNDS

    flops = ", ".join(f"{dtype} {value:.0f} GF/s" for dtype, value in measured["square_gflops"].items())
    parts: list[RenderableType] = [Text("\n" + words["stream"].format(gb=measured["read_gb_per_s"], flops=flops))]
    for dtype in MEASURED_DTYPES:
        rows = [row for row in measured["forms"] if row["dtype"] == dtype]
        labels = list(dict.fromkeys(label for row in rows for label in row["us"]))
        title = words["forms"].format(dtype=dtype, i=IN, o=OUT, n=ROUNDS)
        drawn = table(title, (words["rows"], *labels, words["engine"]), justify="right", whole=False)
        for row in rows:
            times = [_time(row, label) for label in labels]
            style = "yellow" if row["slower"] > WORTH_TELLING else "default"
            drawn.add_row(str(row["rows"]), *times, f"[{style}]{row['engine_us']:.0f}  {row['engine']}")
        parts.append(drawn)
    slow = [row for row in measured["forms"] if row["slower"] > WORTH_TELLING]
    verdict = words["slow" if slow else "fast"]
    parts.append(Text(verdict.format(n=len(slow), all=len(measured["forms"]), x=WORTH_TELLING)))
    return parts


def _time(row: dict[str, Any], label: str) -> str:
    if label not in row["us"]:
        return ""
    return f"[bold green]{row['us'][label]:.0f} *" if label == row["fastest"] else f"{row['us'][label]:.0f}  "


def _pairs(title: str, pairs: dict[str, str]) -> "Table":
    drawn = table(title, ("", ""))
    drawn.show_header = False
    for name, value in pairs.items():
        drawn.add_row(name, value)
    return drawn


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
