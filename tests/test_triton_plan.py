"""The sort by expert and the layout of tiles: whole numbers, so they are equal or wrong."""

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import DEVICE, poisoned  # noqa: F401

from moesaic.engine.plan import Plan
from moesaic.engine.plan import group_by_expert as twin_of_sort
from moesaic.engine.triton import plan, twins
from moesaic.engine.triton.layout import layout, most_tiles
from moesaic.engine.triton.plan import group_by_expert

pytestmark = pytest.mark.usefixtures("poisoned")


WAYS = {"three-launches": (0, 1024), "one-launch": (4096, 1024), "in-steps": (4096, 64)}
SIZES = ((1, 1, 1), (1, 8, 64), (40, 3, 5), (130, 2, 3))
MANY = {"three-launches": (97, 4, 300), "one-launch": (97, 4, 300), "in-steps": (97, 4, 70)}  # a program an expert


@pytest.mark.parametrize(("way", "size"), [(way, size) for way in WAYS for size in (*SIZES, MANY[way])], ids=str)
def test_the_sort_is_the_stable_one(monkeypatch, way, size):
    (few, at_once), (tokens, k, experts) = WAYS[way], size
    monkeypatch.setattr(plan, "ONE_LAUNCH", few)
    monkeypatch.setattr(plan, "AT_ONCE", at_once)
    ids = torch.randint(0, experts + 1, (tokens, k))
    got, expected = group_by_expert(ids.to(DEVICE), experts), twin_of_sort(ids, experts)
    assert torch.equal(got.assignments.cpu(), expected.assignments)
    assert torch.equal(got.counts.cpu(), expected.counts)
    assert (got.assignments.dtype, got.counts.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("few", [0, 4096], ids=["three-launches", "one-launch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_every_width(monkeypatch, few, dtype):
    monkeypatch.setattr(plan, "ONE_LAUNCH", few)
    ids = torch.randint(0, 8, (70, 2)).to(dtype)
    got, expected = group_by_expert(ids.to(DEVICE), 7), twin_of_sort(ids, 7)
    assert torch.equal(got.assignments.cpu(), expected.assignments)
    assert torch.equal(got.counts.cpu(), expected.counts)


@pytest.mark.parametrize("few", [0, 4096], ids=["three-launches", "one-launch"])
def test_what_names_no_expert_comes_last(monkeypatch, few):
    monkeypatch.setattr(plan, "ONE_LAUNCH", few)
    ids = torch.tensor([[4, -1], [0, 99], [2, 3], [3, -(2**31)]])
    got = group_by_expert(ids.to(DEVICE), 4)
    assert got.counts.tolist() == [1, 0, 1, 2]
    assert got.assignments.tolist() == [2, 4, 5, 6, 0, 1, 3, 7]


@pytest.mark.parametrize("few", [0, 4096], ids=["three-launches", "one-launch"])
def test_ids_that_do_not_lie_in_a_row(monkeypatch, few):
    monkeypatch.setattr(plan, "ONE_LAUNCH", few)
    ids = torch.randint(0, 9, (3, 50)).to(DEVICE).mT[::2]
    got, expected = group_by_expert(ids, 8), twin_of_sort(ids.cpu(), 8)
    assert torch.equal(got.assignments.cpu(), expected.assignments)


@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize(
    "counts",
    [[0, 0, 5, 0], [16, 17, 0, 33, 1, 0], [1], [64, 128], [1] * 130, [0, 3] * 150],
    ids=lambda counts: f"{len(counts)}-experts-{sum(counts)}-rows",
)
@pytest.mark.parametrize("absent", [0, 3])
def test_tiles_cover_the_rows_of_every_expert(counts, block_rows, absent):
    made = Plan(torch.randperm(sum(counts) + absent), torch.tensor(counts))
    got, expected = layout(Plan(*(t.to(DEVICE) for t in made)), 2, block_rows), twins.layout(made, 2, block_rows)
    needed = expected.expert_of_tile < len(counts)
    assert torch.equal(got.ends.cpu(), expected.ends)
    assert torch.equal(got.row_of.cpu(), expected.row_of)
    assert torch.equal(got.expert_of_tile.cpu()[needed], expected.expert_of_tile[needed])
    assert torch.equal(got.start_of_tile.cpu()[needed], expected.start_of_tile[needed])
    assert (got.expert_of_tile.cpu()[~needed] >= len(counts)).all(), "a tile that is not needed names no expert"
    assert (expected.row_of < 0).sum() == absent


def test_as_many_tiles_are_launched_as_the_worst_routing_needs():
    for n in range(1, 40):
        for experts in (1, 3, 8):
            for rows in (1, 4, 16):
                # the worst: one row in each of some experts, and all the rest in whole tiles
                worst = max(used + (n - used) // rows for used in range(1, min(experts, n) + 1))
                assert most_tiles(n, experts, rows) == worst
