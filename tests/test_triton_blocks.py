"""The choice of tiles on a device."""

import pytest
import torch

pytest.importorskip("triton")

from moesaic.engine.triton import blocks as table
from moesaic.engine.triton import tuned
from moesaic.engine.triton.blocks import Blocks, Tiles, built_in, tiles_for

HOPPER = (9, 0)
OTHER = Tiles(*[Blocks(32, 64, 64)] * 4)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if a GPU had begun to compute. Yields what its file of tiles holds when it is read."""
    file = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "some GPU")
    monkeypatch.setattr(table, "capability_of", lambda _device: HOPPER)
    monkeypatch.setattr(tuned, "read_tuned", lambda _name: dict(file))
    table._tuned.cache_clear()
    yield file
    table._tuned.cache_clear()


@pytest.mark.usefixtures("on_a_gpu")
def test_tiles_are_chosen_once(monkeypatch):
    first = tiles_for(8, torch.bfloat16, HOPPER)
    monkeypatch.setattr(table, "built_in", lambda *_: pytest.fail("chosen again"))
    monkeypatch.setattr(table, "_row", lambda *_: pytest.fail("looked up again"))
    assert tiles_for(8, torch.bfloat16, HOPPER) is first


def test_what_was_chosen_is_forgotten_when_a_tuned_file_is_read(on_a_gpu):
    own = built_in(8, torch.bfloat16, HOPPER)
    assert tiles_for(8, torch.bfloat16, HOPPER) == own
    on_a_gpu["bfloat16"] = {16: OTHER}
    assert tiles_for(8, torch.bfloat16, HOPPER) == own, "not read yet"
    table._tuned.cache_clear()
    assert tiles_for(8, torch.bfloat16, HOPPER) == OTHER
    assert tiles_for(8, torch.bfloat16, HOPPER, torch.float32) != OTHER, "tuned for weights as wide as the rows"


def test_two_gpus_of_one_kind_may_be_tuned_apart(on_a_gpu, monkeypatch):
    on_a_gpu["bfloat16"] = {16: OTHER}
    assert tiles_for(8, torch.bfloat16, HOPPER) == OTHER
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(tuned, "read_tuned", lambda _name: {})
    assert tiles_for(8, torch.bfloat16, HOPPER) == built_in(8, torch.bfloat16, HOPPER)
