"""What a record is told by its caller is checked where it is told."""

import dataclasses

import pytest
import torch
from cases import v3
from traces import made

import moesaic as ms
from moesaic.layer.moe import MoE
from moesaic.trace.recording.record import record


def layer():
    return MoE.classic(8, 8, 8, 4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model=None is no module"),
        ({"labels": [1, 2]}, "labels=.* are not names"),
        ({"labels": "play"}, "labels='play' is one name"),
        ({"labels": 3}, "labels=3 are not names"),
        ({"seed": "x"}, "seed='x' is not a whole number"),
        ({"seed": 1 << 64}, "seed=18446744073709551616 is not a whole number of 64 bits"),
        ({"seed": True}, "seed=True is not a whole number"),
    ],
)
def test_options_of_a_wrong_kind_are_refused_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message), record(**{"model": layer(), **options}):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"sequences": [0, -1, 0]}, "sequences reach from -1 to 0"),
        ({"sequences": [0, 0, 10**12]}, "sequences reach from 0 to 1000000000000"),
        ({"sequences": [0.5, 1.0, 2.0]}, r"sequences of float32 \[3\] were given"),
        ({"sequences": [[0, 0, 0]]}, r"sequences of int64 \[1, 3\] were given"),
        ({"sequences": [0, 0, 0], "labels": [1]}, "labels=.* are not names"),
        ({"sequences": [0, 0, 0], "offsets": [[3, 1]] * 3}, "offsets end before they begin"),
    ],
)
def test_what_is_told_of_tokens_is_refused_where_no_file_may_hold_it(told, message):
    with record(layer()) as rec:
        rec.model(torch.randn(3, 8))
        with pytest.raises(ValueError, match=message):
            rec.describe(**told)


def test_lists_of_numbers_are_as_good_as_tensors(tmp_path):
    with record(layer(), to=tmp_path / "run.safetensors") as rec:
        rec.model(torch.randn(3, 8))
        rec.describe(sequences=[0, 1, 1], labels=["a", "b"], offsets=[[0, 1], [0, 2], [2, 3]])
    trace = ms.load(tmp_path / "run.safetensors")
    assert trace.sequences.tolist() == [0, 1, 1]
    assert trace.offsets.tolist() == [[0, 1], [0, 2], [2, 3]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequences": torch.full((12,), 1 << 24)}, "sequences reach from 16777216 to 16777216: 0 to 16777215 is"),
        ({"sequences": -torch.ones(12).long()}, "sequences reach from -1 to -1"),
        ({"input_ids": -torch.ones(12).long()}, "input_ids reach from -1 to -1"),
        ({"phases": torch.full((12,), 2, dtype=torch.uint8)}, "phases reach from 2 to 2: 0 to 1 is allowed"),
        ({"sequences": torch.full((12,), 10**12)}, "sequences reach from 1000000000000 to"),
        ({"sequences": torch.zeros(12)}, "sequences of float32 were given: give whole numbers"),
    ],
)
def test_a_trace_takes_no_numbers_that_no_file_may_hold(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(v3(16, 4, 2, 4), n_tokens=12), **fields)
