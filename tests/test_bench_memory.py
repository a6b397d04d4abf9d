"""Memory and router cells of `moesaic bench`."""

from types import SimpleNamespace

import pytest
import torch

from moesaic.bench import gating, memory
from moesaic.bench.gating import refuses_router, run_router_cell
from moesaic.bench.memory import peak_of, peak_of_step, run_memory_cell
from moesaic.bench.problem import make_experts
from moesaic.bench.shapes import Cell
from moesaic.layer.router import Router

MIB = 1 << 20


def allocate(kept: int, passing: int) -> torch.Tensor:
    torch.ones(passing * MIB // 4)  # freed at once
    return torch.ones(kept * MIB // 4)


@pytest.mark.parametrize("sampled", [False, True], ids=["high-water mark", "sampled"])
def test_the_peak_sees_what_was_taken_even_if_it_was_given_back(sampled, monkeypatch, tmp_path):
    if sampled:
        monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    held = torch.ones(64 * MIB // 4)  # resident before: not counted
    kept, peak = peak_of(lambda: allocate(kept=32, passing=96))
    assert kept.nbytes == 32 * MIB
    # sampling once a millisecond may miss the last pages of what lives for ten
    assert (40 if sampled else 95) * MIB <= peak <= 100 * MIB
    _, peak = peak_of(lambda: allocate(kept=16, passing=8))
    # malloc may keep the 8 for itself, or have all of it from what was freed earlier in the process
    assert peak <= 28 * MIB, "an earlier peak, of 96, is forgotten"
    assert held is not None


def test_a_peak_in_forward_is_not_hidden_by_gradients_that_come_later():
    tokens, gradient = torch.ones(4, requires_grad=True), torch.empty(96 * MIB // 4, device="meta")
    problem = SimpleNamespace(
        tokens=tokens, expert_ids=None, weights=None, out_grad=torch.ones(4), parameters=lambda: [gradient]
    )
    extra, out = peak_of_step(problem, lambda tokens, *_: (allocate(kept=1, passing=64), 2 * tokens)[1])
    assert 60 * MIB <= extra <= 70 * MIB
    assert torch.equal(tokens.grad, torch.full((4,), 2.0))
    assert torch.equal(out.detach(), torch.full((4,), 2.0))


def test_contenders_are_measured_in_processes_of_their_own_and_compared():
    cell = Cell("tiny", 512, "float32", "memory")
    result = run_memory_cell(cell, ["grouped"], ["grouped_mm", "batched_mm"])
    ours, peer = result.ours, result.row("transformers grouped_mm")
    assert ours.extra_bytes > 0
    assert (ours.best_peer, ours.ratio) == (peer.name, pytest.approx(peer.cost / ours.cost))
    assert set(ours.errors) == {"out", "token_grad", "weight_grad", "expert_grad"}
    assert result.row("transformers batched_mm").note.startswith("copies the weights")


def test_a_wrong_or_dead_contender_has_no_memory(monkeypatch):
    found = {"ours: grouped": (5 * MIB, {"out": 1.0}), "transformers eager": None}
    monkeypatch.setattr(memory, "_in_a_process", lambda request: found[request.contender])
    result = run_memory_cell(Cell("tiny", 8, "float32", "memory"), ["grouped"], ["eager"])
    assert [(row.name, row.note, row.extra_bytes) for row in result.rows] == [
        ("transformers eager", "failed: its process died, perhaps out of memory", None),
        ("ours: grouped", "wrong", None),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routers_agree_and_the_share_of_the_layer_is_that_of_their_times(dtype):
    cell = Cell("tiny-dsv3", 40, dtype, "router")
    result = run_router_cell(cell, make_experts("tiny-dsv3", dtype), "grouped", rounds=2)
    times = {row.name: row.median_ms for row in result.rows}
    for what in ("selection", "router"):
        row = result.row(f"ours: {what}")
        assert row.errors == {"rows_that_differ": 0.0}
        assert row.ratio == pytest.approx(times[f"transformers {what}"] / times[row.name])
        assert row.of_layer == pytest.approx(times[row.name] / (times["ours: router"] + times["ours: experts"]))


def test_a_router_that_selects_otherwise_has_no_speed(monkeypatch):
    real = gating.route
    monkeypatch.setattr(gating, "route", lambda logits, _bias, config: real(logits, None, config))  # bias forgotten
    result = run_router_cell(
        Cell("tiny-dsv3", 40, "float32", "router"), make_experts("tiny-dsv3", "float32"), "grouped", rounds=1
    )
    assert {row.note for row in result.rows} == {"wrong"}
    assert {row.median_ms for row in result.rows} == {None}


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_row_with_another_weight_or_none_differs(wrong):
    ids, weights = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found = weights.clone()
    found[0, 1] = wrong
    assert gating.rows_that_differ((found, ids), (weights, ids), 4) == 0.5
    assert gating.rows_that_differ((weights.flip(1), ids.flip(1)), (weights, ids), 4) == 0.0


def test_their_selection_is_their_own_code_on_given_logits():
    config = gating.SHAPES["tiny-dsv3"].config()
    theirs = gating.Theirs(Router(config))
    x = torch.randn(30, config.hidden_size)
    with theirs.answering():
        logits, weights, ids = theirs.router(x)
        again = theirs.selection(logits)
    assert again[0] is logits
    assert torch.equal(again[1], weights)
    assert torch.equal(again[2], ids)


def test_routers_of_other_families_are_left_out():
    assert refuses_router(Cell("olmoe", 8, "float32", "router")) == "routers are compared for deepseek_v3 shapes only"
    assert not refuses_router(Cell("dsv3-quarter", 8, "float32", "router"))
