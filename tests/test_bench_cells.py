"""`moesaic bench`: the grid, the tasks in it, and the gate that refuses wrong results."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from bench_problems import CEILING, TIMED, problem_of

from moesaic.bench import machine, runner
from moesaic.bench.contenders import PEERS, Contender, our_engine
from moesaic.bench.gate import BOUNDS, errors_of, is_right, truth_of
from moesaic.bench.problem import make_experts
from moesaic.bench.routing import DRAWS
from moesaic.bench.runner import Result, Row, does_not_fit, needed_bytes, run_cell, run_once
from moesaic.bench.shapes import SHAPES, SMOKE, Cell, Grid, choose
from moesaic.engine.reference import reference
from moesaic.types import ExpertWeights


def test_weights_are_loaded_once_and_every_combination_is_there():
    grid = Grid(("olmoe", "qwen3-30b"), (16, 128), ("float32", "bfloat16"), ("forward", "fwd+bwd-fresh"))
    cells = list(grid.cells())
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 2 * 3, "16 tokens are cold and warm, 128 are neither"
    loads = [(cell.shape, cell.dtype) for cell in cells]
    changes = sum(a != b for a, b in pairwise(loads))
    assert changes == len(set(loads)) - 1


def test_cold_and_warm_are_for_few_tokens_that_are_timed():
    def caches(tokens, mode):
        return [cell.cache for cell in Grid(("tiny",), (tokens,), ("float32",), (mode,), ("zipf",)).cells()]

    assert caches(16, "forward") == ["cold", "warm"]
    assert caches(17, "forward") == caches(16, "memory") == caches(16, "router") == ["any"]


def test_a_router_is_measured_once_whatever_the_routing():
    assert [c.routing for c in Grid(("tiny-dsv3",), (32,), ("float32",), ("router",)).cells()] == ["balanced"]


def test_keys_tell_cells_apart():
    cells = list(Grid(threads=(1, 2)).cells())
    assert len({cell.key for cell in cells}) == len(cells)


def test_what_a_user_gives_with_commas():
    assert choose(tokens="1, 16,1", dtypes="bfloat16", shapes=None) == {"tokens": (1, 16), "dtypes": ("bfloat16",)}
    with pytest.raises(ValueError, match="--shape 'qwen9' is unknown: use qwen3-30b, olmoe"):
        choose(shapes="olmoe,qwen9")
    with pytest.raises(ValueError, match="--tokens '0' is not a number from 1"):
        choose(tokens="8,0")


def test_a_cell_survives_json():
    cell = next(iter(SMOKE.cells()))
    result = Result(cell, [Row("ours: x", "ours", median_ms=1.0)], least_ms=0.5, ceiling=CEILING)
    assert Result.of(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_what_the_family_calls_them(name):
    shape, config = SHAPES[name], SHAPES[name].config()
    assert (config.n_routed_experts, config.num_experts_per_tok) == (shape.n_experts, shape.k)
    assert config.n_shared_experts == 0
    assert config.transposed == ("gpt-oss" in name)


@pytest.mark.parametrize("name", DRAWS)
def test_a_token_goes_to_k_distinct_experts(name):
    ids = DRAWS[name](200, 16, 4, torch.Generator().manual_seed(0))
    assert ids.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_loads_of_the_routings():
    def loads(name):
        ids = DRAWS[name](4000, 16, 1, torch.Generator().manual_seed(0))
        return ids.flatten().bincount(minlength=16).sort(descending=True).values / 4000

    assert loads("balanced").max() < 0.09
    harmonic = sum(1 / rank for rank in range(1, 17))
    expected = torch.tensor([1 / rank / harmonic for rank in range(1, 17)])
    assert torch.allclose(loads("zipf"), expected, atol=0.03)
    assert loads("all-to-k")[0] == 1


def test_the_same_cell_is_the_same_task_and_only_the_weights_are_shared():
    one, other = problem_of(), problem_of(mode="fwd+bwd-fresh", threads=2)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.expert_ids, other.expert_ids)
    assert not one.tokens.requires_grad
    assert other.tokens.requires_grad


@pytest.mark.parametrize(("shape", "expected"), [("tiny", torch.bfloat16), ("tiny-dsv3", torch.float32)])
def test_routing_weights_have_the_dtype_that_the_family_gives_them(shape, expected):
    assert problem_of(shape, dtype="bfloat16").weights.dtype == expected


def test_a_cell_too_large_for_the_machine_says_so(monkeypatch):
    cell = Cell("qwen3-30b", 2048, "float32", "fwd+bwd-fresh")
    assert needed_bytes(cell) > 5 * SHAPES["qwen3-30b"].num_parameters * 4
    monkeypatch.setattr("moesaic.bench.runner.available_bytes", lambda: 8 << 30)
    assert does_not_fit(cell) == "needs about 12 GiB, 8 GiB are free"
    assert not does_not_fit(cell, held=6 << 30)
    monkeypatch.setattr(runner, "l3_bytes", lambda: 3 << 30)
    assert does_not_fit(replace(cell, cache="cold")) == "needs about 18 GiB, 8 GiB are free"
    assert not does_not_fit(replace(cell, mode="forward"))


@pytest.mark.parametrize("shape", ["tiny", "tiny-dsv3", "tiny-gpt-oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_holds_the_same_parameters_and_passes(shape, dtype, name):
    problem = problem_of(shape, dtype=dtype, mode="fwd+bwd-fresh")
    peer = PEERS[name]
    if peer.refuses(problem.cell):
        pytest.skip(peer.refuses(problem.cell))
    call = peer.build(problem)
    out = run_once(problem, call)
    grads_of = getattr(call, "expert_grads", problem.expert_grads)
    assert is_right(errors_of(problem, truth_of(problem), out, grads_of=grads_of), {}, BOUNDS[dtype])
    memory = {parameter.untyped_storage().data_ptr() for parameter in problem.parameters()}
    leaves = [*getattr(call, "leaves", []), *(p for p in problem.parameters() if p.grad is not None)]
    assert {leaf.untyped_storage().data_ptr() for leaf in leaves} == memory, "nobody has a copy"


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_runs_the_implementation_that_the_peer_is_called_after(name, monkeypatch):
    from transformers.integrations.moe import ExpertsInterface

    ran = []
    for other, forward in list(ExpertsInterface._global_mapping.items()):
        spy = partial(lambda *args, other, forward: ran.append(other) or forward(*args), other=other, forward=forward)
        monkeypatch.setitem(ExpertsInterface._global_mapping, other, spy)
    problem = problem_of()
    run_once(problem, PEERS[name].build(problem))
    assert ran == ([] if name == "eager" else [name])


@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt-oss"])
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 4])], ids=["few", "given"])
def test_truth_is_the_reference_in_float64(shape, rows):
    problem = problem_of(shape, tokens=40, mode="fwd+bwd-fresh", routing="zipf")
    truth = truth_of(problem, rows)
    assert truth.rows.tolist() == ([0, 6, 11, 17, 22, 28, 33, 39] if rows is None else rows.tolist())
    tokens, weights = (t.detach().double().requires_grad_() for t in (problem.tokens, problem.weights))
    parameters = [weight.detach().double().requires_grad_() for weight in problem.parameters()]
    out = reference(tokens, problem.expert_ids, weights, ExpertWeights(*parameters), problem.spec)
    out.backward(problem.out_grad.double())
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(truth.out, out[truth.rows])
    close(truth.token_grad, tokens.grad[truth.rows])
    close(truth.weight_grad, weights.grad[truth.rows])
    assert len(truth.expert_grads) >= 2
    for expert, grads in truth.expert_grads.items():
        close(grads, [parameter.grad[expert] for parameter in parameters])


@pytest.mark.parametrize("mode", TIMED)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda ids, weights: (ids.roll(1, 1), weights),
        lambda ids, weights: (ids, weights * 1.01),
        lambda ids, weights: (ids, weights * math.nan),
    ],
    ids=["slots mixed up", "one percent off", "not a number"],
)
def test_a_wrong_engine_has_no_speed(mode, wrong):
    right = our_engine("grouped")

    def build(problem):
        call = right.build(problem)
        return lambda tokens, ids, weights: call(tokens, *wrong(ids, weights))

    cell = Cell("tiny", 12, "float32", mode)
    contenders = [PEERS["eager"], Contender("ours: wrong", "ours", build), right]
    result = run_cell(cell, make_experts("tiny", "float32"), contenders, CEILING, rounds=1)
    row = result.row("ours: wrong")
    assert (row.note, row.median_ms, row.ratio) == ("wrong", None, None)
    assert result.row("ours: grouped").median_ms > 0


def test_a_gradient_that_is_missing_or_wrong_is_found():
    right = our_engine("grouped")

    def without_weights(problem):
        experts = problem.experts
        frozen = experts._replace(up=experts.up.detach(), down=experts.down.detach())
        return right.build(replace(problem, experts=frozen))

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, grad):
            return 2 * grad

    def doubled(problem):
        call = right.build(problem)
        return lambda tokens, ids, weights: call(Doubled.apply(tokens), ids, weights)

    problem = problem_of(mode="fwd+bwd-fresh")
    truth = truth_of(problem)
    for build, what in ((without_weights, "expert_grad"), (doubled, "token_grad")):
        problem.forget_gradients(weights_too=True)
        errors = errors_of(problem, truth, run_once(problem, build(problem)))
        assert [name for name, error in errors.items() if error > 1e-5] == [what]
        assert not is_right(errors, {}, BOUNDS["float32"])


def test_a_missing_gradient_is_null_in_json_and_infinite_when_read_again():
    row = Row("broken", "peer", errors={"out": 1e-7, "token_grad": math.inf, "weight_grad": math.nan})
    line = json.dumps(Result(Cell("tiny", 12, "float32", "fwd+bwd-fresh"), [row]).to_dict(), allow_nan=False)
    assert Result.of(json.loads(line)).rows[0].errors == {"out": 1e-7, "token_grad": math.inf, "weight_grad": math.inf}


def test_accumulating_is_judged_by_two_passes():
    def overwrites(problem):
        call = our_engine("grouped").build(problem)

        def run(tokens, ids, weights):
            problem.forget_gradients(weights_too=True)
            return call(tokens, ids, weights)

        return run

    cell = Cell("tiny", 12, "float32", "fwd+bwd-accumulate")
    contenders = [our_engine("grouped"), Contender("ours: overwrites", "ours", overwrites)]
    result = run_cell(cell, make_experts("tiny", "float32"), contenders, CEILING, rounds=1)
    assert result.row("ours: grouped").note == ""
    assert result.row("ours: overwrites").note == "wrong"


def test_an_eager_that_is_wrong_has_no_speed_and_is_no_measure_for_others():
    right = our_engine("grouped")

    def off_by(factor):
        def build(problem):
            call = right.build(problem)
            return lambda tokens, ids, weights: factor * call(tokens, ids, weights)

        return build

    eager = Contender(PEERS["eager"].name, "peer", off_by(1.5))
    contenders = [Contender("ours: wrong", "ours", off_by(1.01)), right, eager]
    result = run_cell(
        Cell("tiny", 12, "float32", "forward"), make_experts("tiny", "float32"), contenders, CEILING, rounds=1
    )
    assert [(row.name, row.note) for row in result.rows[:3]] == [
        (eager.name, "wrong"),
        ("ours: wrong", "wrong"),
        ("ours: grouped", ""),
    ]


@pytest.mark.parametrize("where", ["build", "call"])
def test_who_raises_says_so_and_the_others_are_measured(where):
    def boom(*_):
        raise RuntimeError("no kernel for that\nand a long story")

    contenders = [
        Contender("breaks", "peer", boom if where == "build" else lambda _problem: boom),
        our_engine("grouped"),
    ]
    result = run_cell(
        Cell("tiny", 12, "float32", "forward"), make_experts("tiny", "float32"), contenders, CEILING, rounds=1
    )
    assert result.row("breaks").note == "failed: RuntimeError: no kernel for that"
    assert result.row("ours: grouped").median_ms > 0


def test_the_gradient_of_the_most_loaded_expert_is_looked_at():
    problem = problem_of(mode="fwd+bwd-fresh", routing="zipf", tokens=40)
    truth = truth_of(problem)
    hot = max(range(len(problem.counts)), key=problem.counts.__getitem__)
    out = run_once(problem, our_engine("grouped").build(problem))
    problem.experts.down.grad[hot] *= 1.01
    assert errors_of(problem, truth, out)["expert_grad"] > 1e-3


def test_eager_may_be_as_wrong_as_it_is_and_half_as_much_again():
    assert is_right({"out": 0.14}, {"out": 0.1}, 0.02)
    assert not is_right({"out": 0.16}, {"out": 0.1}, 0.02)
    assert not is_right({"out": math.nan}, {"out": 0.1}, 0.02)


@pytest.mark.parametrize(
    ("limit", "used", "stat"),
    [
        ("memory.max", "memory.current", "anon 1\ninactive_file 300\n"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 1\ntotal_inactive_file 300\n"),
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_a_container_leaves_less_memory_than_the_machine(tmp_path, monkeypatch, limit, used, stat):
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:  4 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CONTAINERS", [(tmp_path, limit, used)])
    assert machine.available_bytes() == 4096
    for name, text in ((limit, "2000\n"), (used, "900\n"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text)
    assert machine.available_bytes() == 2000 - 900 + 300
    (tmp_path / limit).write_text("max\n")
    assert machine.available_bytes() == 4096
