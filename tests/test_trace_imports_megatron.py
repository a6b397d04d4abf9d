"""Megatron-LM's router traces as traces: what was chosen, token for token."""

import json

import numpy as np
import pytest
from foreign import (
    KNOWN,
    SIZES,
    E,
    cases,
    equal,
    imported,
    megatron,
    megatron_lines,
    picked,
    refused,
)

import moesaic as ms
from moesaic.trace.imports import READERS, Target


def test_megatron_records_are_the_picks_of_the_tokens(tmp_path):
    file = megatron(tmp_path, *(megatron_lines(picked(6, seed=step), step=step) for step in (3, 4)))
    other = megatron(tmp_path, megatron_lines(picked(2, seed=9), step=3, rank=1), name="router_trace_rank1.jsonl")
    trace, notes = imported("megatron", [other, file], KNOWN)
    assert equal(trace, np.concatenate([picked(6, seed=3), picked(6, seed=4), picked(2, seed=9)], 1))
    assert trace.layers == tuple(f"decoder.layers.{i}" for i in range(1, 5))
    assert trace.sequences.tolist() == [0] * 6 + [1] * 6 + [2] * 2
    assert len(notes) == 1
    assert "the record has no documents" in notes[0]


def test_megatron_micro_batches_follow_and_recomputed_forwards_count_once(tmp_path):
    """Order of a step: forward 0, forward 1, and before the backward of each its recompute, last layer first; here
    the second micro-batch goes back before the first."""
    first, second = megatron_lines(picked(6, seed=0)), megatron_lines(picked(6, seed=1))
    trace, notes = imported("megatron", [megatron(tmp_path, first, second, second[::-1], first[::-1])], KNOWN)
    assert equal(trace, np.concatenate([picked(6, seed=0), picked(6, seed=1)], 1))
    assert notes[0].endswith("repeat one of their step and layer (a recomputed forward): 8")


def test_megatron_ranks_of_tensor_parallelism_count_once(tmp_path):
    files = [
        megatron(tmp_path, megatron_lines(picked(6), rank=rank), name=f"router_trace_rank{rank}.jsonl")
        for rank in range(3)
    ]
    trace, notes = imported("megatron", files, KNOWN)
    assert equal(trace, picked(6))
    assert notes[:2] == tuple(f"rank {r} repeats rank 0 (tensor parallelism) and is left out" for r in (1, 2))


def test_megatron_prediction_heads_and_incomplete_steps_are_left_out_and_said(tmp_path):
    heads = megatron_lines(picked(3, seed=5), block="mtp", mtp_idx=0)
    file = megatron(tmp_path, megatron_lines(picked(6)), heads, megatron_lines(picked(6, seed=1), step=1)[:-1])
    trace, notes = imported("megatron", [file], KNOWN)
    assert equal(trace, picked(6))
    assert notes[:2] == (
        "records of multi-token-prediction heads that are left out: 4",
        "micro-batches left out because they lack a layer: 1",
    )


def test_megatron_layers_that_count_from_1_are_put_right_where_the_config_says_so(tmp_path):
    file = megatron(tmp_path, megatron_lines(picked(6), first_layer=2))
    trace, notes = imported("megatron", [file], KNOWN)
    assert trace.layers == tuple(f"decoder.layers.{i}" for i in range(1, 5))
    assert "layers count from 1 in this record" in notes[0]
    assert READERS["megatron"]([file], SIZES).trace.layers == tuple(f"decoder.layers.{i}" for i in range(2, 6))


def broken_megatron():
    lines = megatron_lines(picked(6))

    def changed(**fields):
        return [*lines[:1], json.dumps({**json.loads(lines[1]), **fields}), *lines[2:]]

    ragged = [*json.loads(lines[1])["top_indices"][:-1], [1, 2]]
    return [
        ("cut", [*lines[:-1], lines[-1][:40]], "line 4 is not JSON, or cut short"),
        ("no record", ["[1]"], "line 1: not a record of a router trace"),
        ("another file", ['{"loss": 1.0}'], "line 1: not a record of a router trace"),
        ("ragged", changed(top_indices=ragged), "line 2: rows of top_indices have 2 to 4 numbers"),
        ("not a table", changed(top_indices=[1, 2]), "line 2: top_indices is not a list of lists"),
        ("floats", changed(top_indices=[[0.5] * 4] * 6), "holds something that is not a whole number"),
        ("true", changed(top_indices=[[True, 2, 3, 4]] * 6), "holds something that is not a whole number"),
        ("text", changed(top_indices=[["1"] * 4] * 6), "holds something that is not a whole number"),
        ("huge", changed(top_indices=[[10**30] * 4] * 6), "holds something that is not a whole number"),
        ("too many", changed(top_indices=[[0, 1, 2, E]] * 6), "line 2: expert 16 was chosen, and there are 16"),
        ("negative", changed(top_indices=[[0, 1, 2, -1]] * 6), "line 2: expert -1 was chosen"),
        ("twice", changed(top_indices=[[0, 1, 2, 2]] * 6), "decoder.layers.2 chose one expert twice"),
        ("num_tokens", changed(num_tokens=7), r"has the shape \(6, 4\), and num_tokens and topk say \(7, 4\)"),
        ("topk", changed(topk=3), r"has the shape \(6, 4\), and num_tokens and topk say \(6, 3\)"),
        ("other tokens", changed(num_tokens=2, top_indices=[[0, 1, 2, 3]] * 2), "they must be of the same tokens"),
        ("step", changed(step="1"), "line 2: step is not a whole number"),
        ("rank", changed(rank=None), "line 2: rank is not a whole number"),
        ("stage", changed(stage="post"), "line 2: stage 'post' is unknown"),
        ("block", changed(block="vision"), "line 2: block 'vision' is unknown"),
        ("NaN", [lines[0].replace('"step": 0', '"step": NaN')], "line 1 holds NaN"),
        ("twice a key", [lines[0].replace('"step": 0', '"step": 0, "step": 0')], "line 1 has the key .* twice"),
        ("deep", ["[" * 100_000], "line 1 is not JSON"),
        ("one layer a step", [lines[0], *megatron_lines(picked(6), step=1)[1:]], "no step has all layers"),
        ("only heads", megatron_lines(picked(6), block="mtp", mtp_idx=0), "no decoder layer was traced"),
        ("nothing but lines", [""], "no decoder layer was traced"),
    ]


@pytest.mark.parametrize(("lines", "message"), cases(broken_megatron()))
def test_a_damaged_megatron_trace_is_refused_in_one_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        READERS["megatron"]([megatron(tmp_path, lines)], KNOWN)


def test_megatron_stages_and_repeated_files_are_refused(tmp_path):
    here = megatron(tmp_path, megatron_lines(picked(6)))
    stage = megatron(tmp_path, megatron_lines(picked(6), rank=1, first_layer=5), name="b.jsonl")
    assert "rank 0 has layers 1 to 4 (4) and rank 1 has 5 to 8 (4)" in refused("megatron", [here, stage], SIZES)
    again = megatron(tmp_path, megatron_lines(picked(6, seed=1)), name="c.jsonl")
    assert "step 0 of rank 0 is in" in refused("megatron", [here, again])


def calls(*layers_and_experts) -> list[str]:
    """Calls of one token, in the order of the file."""
    about = {"step": 0, "rank": 0, "num_tokens": 1, "topk": 2}
    return [json.dumps({**about, "layer": layer, "top_indices": [ids]}) for layer, ids in layers_and_experts]


def test_megatron_micro_batches_that_agree_in_one_layer_stay_apart(tmp_path):
    lines = calls((1, [0, 1]), (2, [0, 1]), (1, [0, 1]), (2, [4, 5]), (1, [2, 3]), (2, [6, 7]))
    trace, notes = imported("megatron", [megatron(tmp_path, lines)], Target(n_experts=8))
    assert trace.picks.tolist() == [[[0, 1], [0, 1], [2, 3]], [[0, 1], [4, 5], [6, 7]]]
    assert len(notes) == 1


def test_megatron_a_call_that_is_missing_in_the_middle_costs_its_micro_batch(tmp_path):
    first, second, third = (megatron_lines(picked(6, seed=seed)) for seed in range(3))
    trace, notes = imported("megatron", [megatron(tmp_path, first, second[:1] + second[2:], third)], KNOWN)
    assert equal(trace, np.concatenate([picked(6, seed=0), picked(6, seed=2)], 1))
    assert notes[0] == "micro-batches left out because they lack a layer: 1"


def test_megatron_recomputes_of_two_micro_batches_make_no_third(tmp_path):
    """Two layers, recomputed from the last one back: layer 1 of one recompute lies before layer 2 of the next."""
    first, second = [(1, [0, 1]), (2, [2, 3])], [(1, [4, 5]), (2, [6, 7])]
    file = megatron(tmp_path, calls(*first, *second, *first[::-1], *second[::-1]))
    trace, notes = imported("megatron", [file], Target(n_experts=8))
    assert trace.picks.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert notes[0].endswith("(a recomputed forward): 4")


def test_megatron_pipeline_stages_are_joined_along_layers(tmp_path):
    picks, lines = picked(6), (slice(0, 2), slice(2, 4))
    files = [megatron(tmp_path, megatron_lines(picks[s], first_layer=1 + s.start), name=f"{s.start}") for s in lines]
    stages = [imported("megatron", [file], KNOWN)[0] for file in files]
    assert stages[0].missing == ("decoder.layers.3", "decoder.layers.4")
    trace = ms.join(stages, along="layers")
    assert equal(trace, picks)
    assert trace.missing == ()
