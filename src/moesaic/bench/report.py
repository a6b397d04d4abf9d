"""Results as tables."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from moesaic.bench.runner import Result


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """One table a cell: everybody's time, and how far from the ceiling."""
    for result in results:
        if result.skipped:
            yield Table(title=f"{result.cell.key}: skipped, {result.skipped}")
            continue
        table = Table(title=result.cell.key, caption=f"least time by roofline {result.least_ms:.3g} ms")
        for name in ("", "ms", "p10", "p90", "rounds", "GF/s", "GB/s", "of ceiling", "of gemm-only", "ratio", "error"):
            table.add_column(name, justify="right" if name else "left")
        for row in result.rows:
            error = f"{max(row.errors.values()):.1e}" if row.errors else ""
            if row.median_ms is None:
                table.add_row(row.name, row.note, *[""] * 8, error)
                continue
            times = (row.median_ms, row.p10_ms, row.p90_ms)
            shares = (row.of_ceiling, row.of_matmuls)
            table.add_row(
                row.name,
                *(f"{value:.3g}" for value in times),
                str(row.rounds),
                f"{row.gflops:.0f}",
                f"{row.gbytes:.1f}",
                *("" if share is None else f"{share:.0%}" for share in shares),
                "" if row.ratio is None else f"{row.ratio:.2f}",
                error,
            )
        yield table
