"""`moesaic bench`: rounds, roofline, the matmuls alone. Nothing here asserts a speed."""

import math
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations, product

import pytest
import torch
from bench_problems import CEILING, TIMED, problem_of
from cases import has_onednn

from moesaic.bench import ceiling
from moesaic.bench.ceiling import Ceiling, Phase, least_seconds, measure_ceiling, phases_of
from moesaic.bench.contenders import PEERS
from moesaic.bench.machine import cache_bytes
from moesaic.bench.matmuls import GRADS, OWN, WIDE, Matmuls, _grad_in_parts, bucket, fastest, forms_for
from moesaic.bench.routing import DRAWS
from moesaic.bench.runner import _prepare, entrants_of, flush_bytes, run_once
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.bench.timing import FEW, Clock, Entrant, interleave, plan_rounds, spread

# what rounding in bfloat16 (2e-3 each time) or summing up in float32 may do, and not a tenth of these products
CLOSE = {"float32": {"rtol": 1e-5, "atol": 1e-4}, "bfloat16": {"rtol": 8e-3, "atol": 4e-3}}


def test_everybody_has_one_turn_a_round_and_follows_everybody():
    order, now = [], iter(range(1000))
    entrants = [Entrant(name, lambda: None, lambda name=name: order.append(name)) for name in "abc"]
    seconds = interleave(entrants, {"a": 20, "b": 20, "c": 20}, Clock(lambda: next(now)))
    assert all(sorted(order[start : start + 3]) == ["a", "b", "c"] for start in range(0, 60, 3))
    assert {pair for pair in pairwise(order) if pair[0] != pair[1]} == set(permutations("abc", 2))
    assert seconds == dict.fromkeys("abc", [1] * 20)


def test_who_has_fewer_rounds_stops_early_or_never_starts():
    order, now = [], iter(range(1000))
    entrants = [Entrant(name, lambda: None, lambda name=name: order.append(name)) for name in "abc"]
    assert interleave(entrants, {"a": 2, "b": 1, "c": 0}, Clock(lambda: next(now))) == {"a": [1, 1], "b": [1], "c": []}
    assert sorted(order[:2]) == ["a", "b"]
    assert order[2:] == ["a"]


def test_preparing_is_not_timed_and_results_die_after_the_clock_stops():
    events = []

    class Loud:
        def __del__(_self):
            events.append("freed")

    def run():
        events.append("run")
        return Loud()

    interleave(
        [Entrant("a", lambda: events.append("prepare"), run)],
        {"a": 1},
        Clock(lambda: float(events.append("clock") or 0)),
    )
    assert events == ["prepare", "clock", "run", "clock", "freed"]


def test_quick_cells_have_more_rounds_and_long_ones_fewer_first_for_those_behind():
    assert plan_rounds({"a": 1e-3, "b": 1e-3}, 10) == {"a": 50, "b": 50}
    assert plan_rounds({"a": 1.0, "b": 1.0}, 10) == {"a": 10, "b": 10}
    assert plan_rounds({"a": 2.0, "b": 2.0, "c": 9.0}, 10, allowed=60) == {"a": 10, "b": 10, "c": FEW}
    assert plan_rounds({"a": 3.0, "b": 4.0, "c": 13.0}, 10, allowed=60) == {"a": 8, "b": 8, "c": FEW}
    assert plan_rounds({"a": 3.0, "b": 4.0, "c": 13.0}, 10, never_few=["c"], allowed=60) == {"a": 3, "b": 3, "c": 3}
    assert plan_rounds({"a": 30.0, "b": 50.0}, 10, allowed=60) == {"a": FEW, "b": FEW}
    assert plan_rounds({"a": 10.0, "b": 59.0, "c": 61.0}, 10, allowed=60) == {"a": 6, "b": FEW, "c": 0}


def test_spread():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx((3.0, 1.4, 4.6, 5))


@pytest.mark.parametrize("cache", ["cold", "warm", "any"])
def test_a_cold_run_comes_after_a_read_of_twice_the_cache_and_a_warm_one_after_itself(cache, monkeypatch):
    problem, read, calls = problem_of(cache=cache), [], []
    monkeypatch.setattr("moesaic.bench.runner.l3_bytes", lambda: 1000)
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, *_: read.append(x.nbytes) or x)
    _prepare(problem, lambda: calls.append("run"), [], torch.ones(flush_bytes(problem.cell) // 4))
    assert read == ([2000] if cache == "cold" else [])
    assert calls == (["run"] if cache == "warm" else [])


@pytest.mark.parametrize(("mode", "kept"), [("fwd+bwd-fresh", False), ("fwd+bwd-accumulate", True)])
def test_nobody_starts_beside_the_gradients_of_another_unless_they_accumulate(mode, kept):
    problem = problem_of(mode=mode)
    eager, titan = (PEERS[name].build(problem) for name in ("eager", "torchtitan"))
    run_once(problem, titan)
    for entrant in entrants_of(problem, {"eager": eager, "titan": titan}):
        entrant.prepare()
        assert (problem.experts.down.grad is not None) == kept
        assert problem.tokens.grad is None
        assert [leaf.grad is not None for leaf in titan.leaves] == [kept, kept]
        run_once(problem, titan)


def test_roofline_is_the_sum_of_the_larger_limits():
    phases = [Phase(2e12, 1e9), Phase(1e11, 3e10)]
    assert least_seconds(phases, CEILING) == pytest.approx(2.0 + 3.0)


def test_a_token_of_qwen3_reads_its_experts():
    """151 MB at 26 GB/s and 320 GF/s: 5.8 ms; one of 512 tokens is bound by compute, 121 ms."""
    machine = Ceiling(320e9, 26e9)
    config = SHAPES["qwen3-30b"].config()
    weights = torch.empty(128, 1, 1, device="meta")
    for tokens, milliseconds in ((1, 5.8), (512, 121)):
        cell = Cell("qwen3-30b", tokens, "float32", "forward")
        problem = problem_of(tokens=4)
        generator = torch.Generator().manual_seed(0)
        full = replace(
            problem,
            cell=cell,
            config=config,
            experts=problem.experts._replace(up=weights.expand(128, 1536, 2048), down=weights.expand(128, 2048, 768)),
            tokens=torch.empty(tokens, 2048),
            expert_ids=DRAWS["balanced"](tokens, 128, 8, generator),
        )
        assert 1e3 * least_seconds(phases_of(full), machine) == pytest.approx(milliseconds, rel=0.02)


def test_phases_by_hand():
    """T=2, K=4, D=64, I=32: 8 assignments, all to the same 4 experts of 16."""
    for mode, grads in (("fwd+bwd-fresh", 16), ("fwd+bwd-accumulate", 2 * 4)):
        problem = problem_of(tokens=2, mode=mode, routing="all-to-k")
        up, down, tokens, hidden = 64 * 64, 64 * 32, 4 * 2 * 64, 4 * 8 * 32
        assert phases_of(problem) == [
            Phase(2 * 8 * up, 4 * 4 * up + tokens + 2 * hidden),
            Phase(2 * 8 * down, 4 * 4 * down + hidden + tokens),
            Phase(2 * 8 * down, 4 * 4 * down + hidden + tokens),
            Phase(2 * 8 * down, 4 * grads * down + hidden + tokens),
            Phase(2 * 8 * up, 4 * 4 * up + tokens + 2 * hidden),
            Phase(2 * 8 * up, 4 * grads * up + tokens + 2 * hidden),
        ]
        assert sum(p.flops for p in phases_of(problem)) == 3 * 6 * 2 * 4 * 64 * 32, "a step is three times 6 T K D I"


def test_measured_ceilings_are_numbers(monkeypatch):
    monkeypatch.setattr("moesaic.bench.ceiling.SQUARE", 64)
    monkeypatch.setattr("moesaic.bench.ceiling.STREAM", 1 << 20)
    for dtype in ("float32", "bfloat16"):
        found = measure_ceiling(dtype)
        assert 0 < found.flops < 1e15
        assert 0 < found.bytes < 1e13


def test_a_form_that_is_hopeless_on_small_squares_is_not_run_on_large_ones(monkeypatch):
    """Without the instructions torch may take 20 s for a square of bfloat16 that float32 has in 0.1."""
    runs = []

    def squares(_dtype, size):
        forms = {"fast": lambda: runs.append((size, "fast")), "slow": lambda: time.sleep(0.002)}
        return forms | {"refused": lambda: torch.ones(2) @ torch.ones(3)} if size == 64 else {"fast": forms["fast"]}

    monkeypatch.setattr(ceiling, "_squares", squares)
    monkeypatch.setattr(ceiling, "SMALL", 64)
    monkeypatch.setattr(ceiling, "STREAM", 1 << 20)
    assert measure_ceiling("bfloat16").flops > 0
    assert {size for size, _ in runs} == {64, ceiling.SQUARE}


def test_the_cache_is_read_as_the_system_writes_it(tmp_path):
    for number, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("3", "Instruction", "9K"), ("3", "Unified", "260M")]
    ):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert cache_bytes(3, tmp_path) == 260 << 20
    assert cache_bytes(2, tmp_path) is None


@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt-oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_multiplies(shape, dtype, monkeypatch):
    monkeypatch.setattr("moesaic.engine.matmul_forms.SMALL", 0)  # or those in blocks are all `x @ W` here
    matmuls = Matmuls(problem_of(shape, dtype=dtype, tokens=40))
    weight = matmuls.weights["up"][0]
    for (name, form), n in product(forms_for(weight.dtype).items(), (1, 3)):
        rows = matmuls.rows[weight.shape[0]].first(n)
        expected = rows.own.double() @ weight.double()
        if name == "oneDNN" and not has_onednn(weight.dtype):
            continue
        run = form.call(rows, weight, matmuls.work)
        for scratch in matmuls.work._buffers.values():
            scratch.fill_(math.nan)
        result = run()
        found = run.args[2] if result is None else result
        assert torch.allclose(found.double(), expected, **CLOSE[dtype]), name


@pytest.mark.parametrize("mode", TIMED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_runs_as_many_matmuls_as_the_cell_has(mode, dtype, monkeypatch):
    problem = problem_of(dtype=dtype, mode=mode)
    done = []

    def counted(form):
        return form._replace(multiply=lambda *args: done.append("multiply") or form.multiply(*args))

    forms = {name: counted(form) for name, form in (OWN | WIDE).items()}
    gradients = {name: lambda *args, form=form: done.append("gradient") or form(*args) for name, form in GRADS.items()}
    monkeypatch.setattr("moesaic.bench.matmuls.forms_for", lambda _dtype: forms)
    monkeypatch.setattr("moesaic.bench.matmuls.GRADS", gradients)
    matmuls = Matmuls(problem)
    done.clear()
    matmuls()
    active = sum(count > 0 for count in problem.counts)
    trains = problem.cell.trains
    assert done.count("multiply") == active * (4 if trains else 2)
    assert done.count("gradient") == active * (2 if trains else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("aliased", [1, 512])
def test_every_form_of_a_gradient_computes_the_same(monkeypatch, dtype, adds, aliased):
    monkeypatch.setattr("moesaic.bench.matmuls.ALIASED", aliased)
    matmuls = Matmuls(problem_of("tiny", dtype=dtype, tokens=40, mode="fwd+bwd-fresh"))
    _, rows, columns = matmuls.stored["up"].shape
    left, right = matmuls.rows[rows].first(3), matmuls.rows[columns].first(3)
    before = torch.randn(rows, columns).to(getattr(torch, dtype))
    summands = left.own.double().abs().T @ right.own.double().abs() + (before.double().abs() if adds else 0)
    parts = {f"in parts {onednn}": partial(_grad_in_parts, onednn=onednn, elements=64) for onednn in (False, True)}
    for name, form in (GRADS | parts).items():
        if name == "oneDNN" and not has_onednn(before.dtype):
            continue
        grad = before.clone()
        form(left, right, grad, matmuls.work, adds)
        expected = left.own.double().T @ right.own.double() + (before.double() if adds else 0)
        error = (grad.double() - expected).abs()
        assert (error <= CLOSE[dtype]["rtol"] * summands).all(), name


def test_gradients_are_added_only_where_they_accumulate():
    problem = problem_of(mode="fwd+bwd-accumulate")
    matmuls = Matmuls(problem)
    assert problem.experts.up.grad is None
    matmuls()
    once = problem.experts.up.grad.clone()
    assert once.any()
    matmuls()
    assert torch.allclose(problem.experts.up.grad, 2 * once, rtol=1e-4, atol=1e-3)
    fresh = problem_of(mode="fwd+bwd-fresh")
    Matmuls(fresh)()
    assert fresh.experts.up.grad is None


def test_buckets_are_at_most_a_quarter_wide():
    assert [bucket(n) for n in (1, 7, 8, 9, 10, 15, 16, 17, 127, 128, 130)] == [
        1, 7, 8, 8, 10, 14, 16, 16, 112, 128, 128,
    ]  # fmt: skip


def test_a_form_that_is_not_there_drops_out_and_the_fastest_is_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def costs(seconds):
        def run(_sample):
            now[0] += seconds

        return run

    def missing(_sample):
        raise RuntimeError("not in this build")

    assert fastest({"slow": costs(3.0), "missing": missing, "quick": costs(1.0), "near": costs(1.5)}) == "quick"
