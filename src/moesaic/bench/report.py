"""Results as Markdown: the machine, what was asked and reached, and everybody's numbers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from moesaic.bench.campaign import Journal
from moesaic.bench.memory import METHOD
from moesaic.bench.runner import GEMM_ONLY, Result, Row
from moesaic.bench.shapes import SHAPES, TINY, Cell
from moesaic.bench.targets import Verdict, asked_ratio, judge

Table = list[list[str]]  # the first line is the head


def markdown(journal: Journal, commands: Sequence[str], left_out: Sequence[Cell] = ()) -> str:
    """The whole report."""
    parts = ["# Benchmark of MoE experts", _machine(journal), _ceilings(journal), _verdicts(journal.results)]
    parts += _cells(journal.results)
    if left_out:
        parts.append(f"Cells not measured: {len(left_out)}; `--resume` goes on with them.")
    parts += [_reading(journal.results), reproduce(commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


def reproduce(commands: Sequence[str]) -> str:
    """How to get a report again: the commands that measured its cells, one after the other."""
    return "Reproduce: " + ", then ".join(f"`{command}`" for command in commands)


def summary(results: Iterable[Result]) -> Table:
    """One line a cell: ours, the best peer, and how far from the bounds."""
    head = ["cell", "ours", "best peer", "", "ratio", "asked", "of ceiling", f"of {GEMM_ONLY}"]
    return [head, *(line for result in results for line in _summary_lines(result))]


def aligned(table: Table) -> str:
    """Columns of text, the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def in_markdown(table: Table) -> str:
    """Text on the left in the first column, numbers on the right in the others."""
    head, *lines = table
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ruler, *lines))


def _summary_lines(result: Result) -> Iterator[list[str]]:
    cell = result.cell
    if result.skipped:
        yield [cell.key, result.skipped, *[""] * 6]
        return
    for row in result.rows:
        if row.kind != "ours" or (cell.mode == "router" and row.ratio is None):
            continue
        name = f"{cell.key}, {row.name.removeprefix('ours: ')}"
        peer = None if row.best_peer is None else result.row(row.best_peer)
        theirs = ["", ""] if peer is None else [_cost(peer), peer.name]
        asked = "" if cell.mode == "router" or cell.shape in TINY else f"{asked_ratio(cell):.2f}"
        yield [name, _cost(row), *theirs, number(row.ratio), asked, share(row.of_ceiling), share(row.of_matmuls)]


def _machine(journal: Journal) -> str:
    m = journal.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    caches = ", ".join(f"L{n} {_size(m[f'l{n}_bytes'])}" for n in (2, 3))
    return "\n".join(
        [
            f"- Date: {m['date']}",
            f"- CPU: {m['cpu']}, {m['cores']} cores, {caches}, {_size(m['memory_bytes'])} memory",
            f"- Instructions: {' '.join(m['isa']) or 'none of those that matter here'}; "
            f"torch uses {m['torch_isa']}, oneDNN {m['onednn_isa']}",
            f"- Versions: {versions}; commit {m['commit'] or 'not in a checkout'}",
            *([f"- Environment: {_environment(m)}"] if _environment(m) else []),
        ]
    )


def _environment(machine: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in machine.get("environment", {}).items())


def _ceilings(journal: Journal) -> str:
    """P and B of every dtype, as first and last measured, and how far they drifted."""
    pairs: dict[tuple[str, int], list[dict]] = {}
    for line in journal.ceilings:
        pairs.setdefault((line["dtype"], line["threads"]), []).append(line)
    if not pairs:
        return ""
    table: Table = [["ceiling", "threads", "P GF/s, first", "last", "drift", "B GB/s, first", "last", "drift"]]
    for (dtype, threads), (first, *later) in pairs.items():
        numbers = []
        for name in ("flops", "bytes"):
            last = [f"{1e-9 * later[-1][name]:.1f}", f"{later[-1][name] / first[name] - 1:+.0%}"] if later else ["", ""]
            numbers += [f"{1e-9 * first[name]:.1f}", *last]
        table.append([dtype, str(threads), *numbers])
    return in_markdown(table)


def _verdicts(results: Sequence[Result]) -> str:
    verdicts = [verdict for result in results for verdict in judge(result)]
    if not verdicts:
        return ""
    missed = [verdict for verdict in verdicts if not verdict.met]
    lines: Table = [["missed", "what", "asked", "found"]]
    for verdict in missed:
        bound = "≤ " if verdict.at_most else "≥ "
        lines.append([verdict.cell.key, verdict.what, bound + f"{verdict.asked:.2f}", f"{verdict.found:.2f}"])
    kinds = Counter((verdict.what, verdict.met) for verdict in verdicts)
    counts = [
        f"{what}: {kinds[what, True]} of {kinds[what, True] + kinds[what, False]} met"
        for what in dict.fromkeys(verdict.what for verdict in verdicts)
    ]
    ours = ", ".join(dict.fromkeys(result.ours.name for result in results if result.ours is not None))
    said = f"## Targets\n\nSet for 2 cores with AVX-512 and without 16-bit matmuls; {ours}. {'; '.join(counts)}."
    return f"{said}\n\n{in_markdown(lines)}" if missed else said


def _cells(results: Sequence[Result]) -> Iterator[str]:
    def group(result: Result) -> tuple[str, str, str, int]:
        cell = result.cell
        return cell.shape, cell.dtype, cell.mode, cell.threads

    for (shape, dtype, mode, threads), found in groupby(sorted(results, key=group), group):
        cells = list(found)
        s = SHAPES[shape]
        sizes = f"D={s.hidden_size} I={s.width} E={s.n_experts} K={s.k}"
        yield f"## {shape} {dtype} {mode}, {threads} thread{'s' if threads > 1 else ''}\n\n{sizes}"
        for result in cells:
            yield _one_cell(result)


def _one_cell(result: Result) -> str:
    cell = result.cell
    title = f"**T={cell.tokens}, {cell.routing}{'' if cell.cache == 'any' else ', ' + cell.cache}**"
    if result.skipped:
        return f"{title}: skipped, {result.skipped}"
    met = [_said(verdict) for verdict in judge(result)]
    least = "" if result.least_ms is None else f"; least time by roofline {result.least_ms:.3g} ms"
    said = f"{title}{least}{'; ' if met else ''}{', '.join(met)}"
    return f"{said}\n\n{in_markdown(_rows(result))}"


def _said(verdict: Verdict) -> str:
    return f"{verdict.what} {verdict.found:.2f} (asked {verdict.asked:.2f}: {'met' if verdict.met else 'missed'})"


def _rows(result: Result) -> Table:
    if result.cell.mode == "memory":
        memory: Table = [["", "MiB over weights and gradients", "ratio", "error"]]
        return memory + [[row.name, _cost(row), number(row.ratio), error_of(row)] for row in result.rows]
    if result.cell.mode == "router":
        router: Table = [["", "ms", "p10", "p90", "rounds", "ratio", "of the layer", "rows that differ"]]
        for row in result.rows:
            numbers = [*_times(row), str(row.rounds), number(row.ratio), share(row.of_layer), error_of(row)]
            router.append([row.name, *numbers])
        return router
    table: Table = [
        ["", "ms", "p10", "p90", "rounds", "GF/s", "GB/s", "of ceiling", f"of {GEMM_ONLY}", "ratio", "error"]
    ]
    for row in result.rows:
        speeds = [f"{row.gflops:.0f}", f"{row.gbytes:.1f}"] if row.gflops is not None else ["", ""]
        shares = [share(row.of_ceiling), share(row.of_matmuls), number(row.ratio), error_of(row)]
        table.append([row.name, *_times(row), str(row.rounds or ""), *speeds, *shares])
    return table


def _reading(results: Sequence[Result]) -> str:
    """What the columns mean, and what was done before the clock."""
    lines = [
        "## How to read this",
        "The same weights, tokens and routing for everybody; routing is not in the times. Medians of rounds in turn "
        "(each round in another order) with the 10th and 90th percentile; cells of minutes have fewer rounds, "
        "and those far behind three, or only the run that they were judged by. A contender is "
        "timed after its result agreed with float64; error is its largest difference over the largest value. "
        "*Of ceiling*: the least time by roofline, the sum over matmuls of max(F/P, Q/B), over the median; warm cells "
        "read from the cache and can pass 100 %. *Of gemm-only*: the same matmuls in their fastest forms and nothing "
        "else, over the median; where somebody is more than 5 % faster they are no bound and not judged by. "
        "*Ratio*: the best peer's median over ours. *Cold*: twice the last-level cache is read "
        "before every run; *warm*: the same run comes before. *Fresh*: gradients are new memory in every run; "
        "*accumulate*: they are added to.",
    ]
    if any(result.cell.mode == "memory" for result in results):
        lines.append(f"Memory: {METHOD}.")
    packed = {row.name: row for result in results for row in result.rows if row.prepacked_bytes}
    for name, row in packed.items():
        lines.append(f"{name} packs weights before the clock: {_size(row.prepacked_bytes)} in {row.build_ms:.0f} ms.")
    return "\n\n".join(lines)


def _times(row: Row) -> list[str]:
    if row.median_ms is None or row.p10_ms is None or row.p90_ms is None:
        return [row.note, "", ""]
    return [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in (row.median_ms, row.p10_ms, row.p90_ms)]


def _cost(row: Row) -> str:
    if row.extra_bytes is not None:
        return f"{row.extra_bytes / 2**20:.0f} MiB"
    return row.note if row.median_ms is None else f"{_times(row)[0]} ms"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def error_of(row: Row) -> str:
    return f"{max(row.errors.values()):.1e}" if row.errors else ""


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "unknown"
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.0f} GiB"
    mib = n_bytes / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.2g} MiB"
