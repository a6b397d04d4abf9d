"""Targets of the GPU engine and the report of a run, as Markdown and as a short table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from moesaic.bench.campaign import Journal
from moesaic.bench.gpu.campaign import measured_in
from moesaic.bench.gpu.cells import FORWARD, LADDER, LADDER_TOKENS, OURS, STEP, TORCH, GpuCell
from moesaic.bench.gpu.run import Measured
from moesaic.bench.gpu.special import KERNEL
from moesaic.bench.report import Table, aligned, error_of, in_markdown, number, reproduce, share
from moesaic.bench.runner import Row

WORSE = 1.1  # times the error of torch's own grouped_mm: more is worse


class Verdict(NamedTuple):
    """One target: found is None where the cell was not measured."""

    what: str
    asked: float
    found: float | None
    at_most: bool = False

    @property
    def word(self) -> str:
        if self.found is None:
            return "not measured"
        return "met" if (self.found <= self.asked if self.at_most else self.found >= self.asked) else "missed"


def verdicts(results: Sequence[Measured]) -> list[Verdict]:
    """The targets for an H100, in their order."""
    forward, step = (_ladder(results, mode) for mode in (FORWARD, STEP))
    found = [
        *(Verdict(f"forward TF/s, {name}", asked, _teraflops(forward)) for name, asked in FORWARD_STEPS.items()),
        Verdict("forward+backward TF/s", 400, _teraflops(step)),
    ]
    for tokens in (1, 16):
        row = _row(results, GpuCell("decode", LADDER, tokens), f"{OURS} (graph)")
        found.append(Verdict(f"T={tokens}: share of bandwidth", 0.70, None if row is None else row.of_ceiling))
    for tokens in (1, 16, 128):
        row = _row(results, GpuCell("router", "deepseek-v3", tokens, "float32"), KERNEL)
        found.append(Verdict(f"route kernel T={tokens}, us", 10, _microseconds(row), at_most=True))
    return [*found, *_memory_verdicts(results), *_peer_verdicts(results)]


FORWARD_STEPS = {"first light": 215, "Liger main": 337, "goal": 500}


def _memory_verdicts(results: Sequence[Measured]) -> Iterator[Verdict]:
    cell = GpuCell("memory", LADDER, LADDER_TOKENS, mode=STEP)
    facts: dict[str, Any] = next((r.facts for r in results if r.cell.key == cell.key and OURS in r.facts), {})
    held = peak = None
    if facts:
        ours = facts[OURS]
        held = ours["held"] / (facts["X"] + facts["H"] + facts["metadata"])
        peak = max(ours["forward_peak"], ours["backward_peak"]) / sum(facts[name] for name in "XHAY")
    yield Verdict("held for backward / (X + H + metadata)", 1.1, held, at_most=True)
    yield Verdict("peak / (X + H + A + Y)", 1.1, peak, at_most=True)


def _peer_verdicts(results: Sequence[Measured]) -> Iterator[Verdict]:
    """Over all cells: ours against the faster of torch's grouped_mm, each in a graph where it can be in one, and its
    errors in 16 bits."""
    speeds, errors = [], []
    for result in results:
        ours, peers = _least_ms(result, (OURS,)), _least_ms(result, TORCH)
        if ours is not None and peers is not None:
            speeds.append(peers / ours)
        measure = next(
            (row for name in TORCH if (row := result.row(name)) is not None and row.errors and not row.note), None
        )
        found = result.row(OURS)
        if measure is not None and found is not None and found.errors and result.cell.dtype != "float32":
            errors += [found.errors[what] / error for what, error in measure.errors.items() if error]
    yield Verdict("least speed over torch's grouped_mm", 1.0, min(speeds, default=None))
    yield Verdict("largest error over torch's grouped_mm, 16 bits", WORSE, max(errors, default=None), at_most=True)


def _least_ms(result: Measured, names: Sequence[str]) -> float | None:
    """The least median among these, launched one by one or in a graph."""
    rows = [row for name in names for row in (result.row(name), result.row(f"{name} (graph)")) if row is not None]
    return min((row.median_ms for row in rows if row.median_ms is not None), default=None)


def _ladder(results: Sequence[Measured], mode: str) -> Row | None:
    return _row(results, GpuCell("experts", LADDER, LADDER_TOKENS, mode=mode), OURS)


def _row(results: Sequence[Measured], cell: GpuCell, name: str) -> Row | None:
    found = next((result.row(name) for result in results if result.cell.key == cell.key), None)
    return found if found is not None and found.median_ms is not None else None


def _teraflops(row: Row | None) -> float | None:
    return None if row is None or row.gflops is None else 1e-3 * row.gflops


def _microseconds(row: Row | None) -> float | None:
    return None if row is None or row.median_ms is None else 1e3 * row.median_ms


def target_table(results: Sequence[Measured]) -> Table:
    lines: Table = [["target", "asked", "found", ""]]
    for verdict in verdicts(results):
        found = "" if verdict.found is None else f"{verdict.found:.3g}"
        lines.append([verdict.what, f"{'<=' if verdict.at_most else '>='} {verdict.asked:g}", found, verdict.word])
    return lines


def summary(results: Sequence[Measured]) -> Table:
    """One line a cell: ours, the best peer, the share of the ceiling."""
    lines: Table = [["cell", "ours", "TF/s", "best peer", "", "ratio", "of ceiling"]]
    for result in results:
        ours = next((row for row in result.rows if row.kind == "ours" and row.median_ms is not None), None)
        graph = result.row(f"{OURS} (graph)")
        if graph is not None and graph.median_ms is not None:
            ours = graph
        if ours is None:
            notes = [result.note, *(row.note for row in result.rows if row.kind == "ours")]
            lines.append([result.cell.key, next((note for note in notes if note), ""), *[""] * 5])
            continue
        peer = None if ours.best_peer is None else result.row(ours.best_peer)
        theirs = ["", ""] if peer is None else [_milliseconds(peer.median_ms), peer.name]
        numbers = [*theirs, number(ours.ratio), share(ours.of_ceiling)]
        lines.append([result.cell.key, _milliseconds(ours.median_ms), _speed(ours), *numbers])
    return lines


def markdown(journal: Journal, left_out: Sequence[GpuCell] = ()) -> str:
    """The whole report."""
    results = measured_in(journal)
    parts = ["# Benchmark of MoE experts on a GPU", _machine(journal.machine), _ceilings(journal)]
    if journal.machine["smoke"]:
        parts.append("**A smoke run: interpreted on a CPU, its times say nothing. Not measured on a GPU.**")
    else:
        parts += ["## Targets", in_markdown(target_table(results))]
    parts += ["## All cells", in_markdown(summary(results))]
    parts += [_one_cell(result) for result in results]
    if left_out:
        parts.append(
            f"Not measured yet: {', '.join(cell.key for cell in left_out)}. The same command goes on with them."
        )
    parts += [READING, reproduce(journal.commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


READING = (
    "## How to read this\n\nThe same weights, tokens and routing for everybody, routing not in the times. Who is timed "
    "agreed with float64 first, forward and, where it trains, all gradients; *error* is the largest |found - truth| / "
    "|truth| of what was compared, or a tenth of that of its worst row. "
    "Medians of rounds in random order by CUDA events, before every run 256 MB "
    "read and the device kept busy for a millisecond while Python launches; "
    "*(graph)* rows are one call of a CUDA graph of many, each on other experts. TF/s count 6 T K D I a forward and 18 "
    "with the backward. *Of ceiling*: the least time, the sum over kernels of max(F / P, Q / B) with P and B of this "
    "run (decode and router: of the better of copy and read), over the median. *Ratio*: the best peer's median over "
    "ours. Memory: bytes over weights and their gradients, tokens counted."
)


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    more = [
        f"{name} {machine[key]}"
        for name, key in (("driver", "driver_version"), ("SM clock", "clocks.max.sm"), ("power limit", "power.limit"))
        if machine.get(key)
    ]
    lines = [
        f"- Date: {machine['date']}",
        f"- Device: {', '.join([machine['device'], *more])}",
        f"- Versions: {versions}; commit {machine['commit'] or 'not in a checkout'}, engine {machine['sources']}, "
        f"tiles {machine.get('tiles')}",
    ]
    return "\n".join(lines)


def _ceilings(journal: Journal) -> str:
    table: Table = [["ceiling", "first", "last", "drift"]]
    names = dict.fromkeys(line["what"] for line in journal.ceilings)
    for what in names:
        values = [line["value"] for line in journal.ceilings if line["what"] == what]
        unit = "TF/s" if what.startswith("P") else "TB/s"
        drift = f"{values[-1] / values[0] - 1:+.1%}" if len(values) > 1 else ""
        table.append([f"{what}, {unit}", f"{1e-12 * values[0]:.4g}", f"{1e-12 * values[-1]:.4g}", drift])
    return in_markdown(table) if names else ""


def _one_cell(result: Measured) -> str:
    head = f"### {result.cell.key}"
    if result.note:
        return "\n\n".join([head, result.note, *([_rows(result)] if result.rows else [])])
    least = "" if result.least_ms is None else f"\n\nleast time {1e3 * result.least_ms:.4g} us"
    kinds: dict[str, Callable[[Measured], str]] = {"memory": _memory, "kernels": _kernels, "decode": _decode}
    return f"{head}{least}\n\n{kinds.get(result.cell.kind, _rows)(result)}"


def _rows(result: Measured) -> str:
    table: Table = [["", "ms", "p10", "p90", "rounds", "TF/s", "GB/s", "of ceiling", "ratio", "error"]]
    for row in result.rows:
        times = [_milliseconds(value) for value in (row.median_ms, row.p10_ms, row.p90_ms)]
        times[0] = times[0] or row.note
        speeds = [_speed(row), "" if row.gbytes is None else f"{row.gbytes:.0f}"]
        shares = [share(row.of_ceiling), number(row.ratio), error_of(row)]
        table.append([row.name, *times, str(row.rounds or ""), *speeds, *shares])
    return in_markdown(table)


def _decode(result: Measured) -> str:
    host = ", ".join(f"{name} {us:.0f}" for name, us in result.facts.get("host_us", {}).items())
    return f"{_rows(result)}\n\nPython and launching, us a call: {host}" if host else _rows(result)


def _memory(result: Measured) -> str:
    table: Table = [["MiB", "held for backward", "forward peak", "backward peak"]]
    for row in result.rows:
        found = result.facts.get(row.name)
        numbers = [row.note, "", ""] if found is None else [f"{value / 2**20:.0f}" for value in found.values()]
        table.append([row.name, *numbers])
    parts = ", ".join(f"{name} {result.facts[name] / 2**20:.0f}" for name in ("X", "H", "A", "Y", "metadata"))
    return f"{in_markdown(table)}\n\n{parts} MiB"


def _kernels(result: Measured) -> str:
    table: Table = [["kernel", "us", "launches", "least us", "of ceiling"]]
    for kernel in result.facts.get("kernels", []):
        least = kernel["least_us"]
        bound = [f"{least:.1f}", f"{least / kernel['us']:.0%}"] if least else ["", ""]
        table.append([kernel["name"][:60], f"{kernel['us']:.1f}", f"{kernel['launches']:.0f}", *bound])
    return in_markdown(table)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _speed(row: Row) -> str:
    return "" if row.gflops is None else f"{1e-3 * row.gflops:.3g}"


def short(journal: Journal) -> str:
    """What is printed last: the ceilings, every cell, the targets."""
    results = measured_in(journal)
    targets = [] if journal.machine["smoke"] else [aligned(target_table(results))]
    return "\n\n".join([_ceilings(journal), aligned(summary(results)), *targets])
