import dataclasses

import numpy as np
import pytest
import torch
from cases import v3
from traces import made

from moesaic.rules import route
from moesaic.trace.rule.steps import steps
from moesaic.trace.slots import shared, twice
from moesaic.trace.store import PHASES, Trace
from moesaic.types import Routing


def test_arrays_are_integers_and_floats_in_the_order_of_the_layers():
    trace = made(v3(16, 4, 2, 4))
    arrays = trace.to_arrays()
    assert arrays["picks"].shape == arrays["weights"].shape == (2, 12, 4)
    assert np.issubdtype(arrays["picks"].dtype, np.integer)
    assert arrays["weights"].dtype == arrays["logits"].dtype == np.float32
    assert np.array_equal(arrays["picks"][1], trace.layer(1).expert_ids)
    assert "input_ids" not in arrays


def test_a_trace_says_what_it_is():
    trace = made(v3(16, 4, 2, 4), model="tiny")
    assert len(trace) == 12
    assert repr(trace) == "Trace(tiny: 2 layers, 12 tokens in 1 sequence, top 4 of 16 experts, detail='scores')"
    assert set(trace.versions) >= {"moesaic", "torch"}


@pytest.mark.parametrize("tokens", [slice(3, 9), [5, 0, 5], torch.arange(12) % 2 == 0])
def test_selecting_tokens_selects_them_everywhere(tokens):
    trace = made(v3(16, 4, 2, 4), sequences=torch.arange(12) // 4, input_ids=torch.arange(12), labels=("a", "b", "c"))
    part = trace.select(tokens)
    assert torch.equal(part.picks, trace.picks[:, tokens])
    assert torch.equal(part.logits, trace.logits[:, tokens])
    assert torch.equal(part.input_ids, trace.input_ids[tokens])
    assert torch.equal(part.sequences, part.input_ids // 4)
    assert part.labels == trace.labels


def test_labels_are_one_a_sequence():
    trace = made(v3(16, 4, 2, 4), sequences=torch.arange(12) // 4)
    assert dataclasses.replace(trace, labels=("a", "b", "c")).labels == ("a", "b", "c")
    with pytest.raises(ValueError, match="2 labels for 3 sequences"):
        dataclasses.replace(trace, labels=("a", "b"))


def test_layers_must_agree_and_the_odd_one_is_named():
    def routing(config, n_tokens=4):
        return route(torch.randn(n_tokens, config.n_routed_experts), None, config)

    small, large, more = v3(8, 1, 1, 2), v3(16, 1, 1, 2), v3(8, 1, 1, 3)
    with pytest.raises(ValueError, match="layer 'b' has 16 experts and layer 'a' has 8: record them one by one"):
        Trace.from_routings({"a": routing(small), "b": routing(large)}, [small, large])
    with pytest.raises(ValueError, match="layer 'b' has 3 experts per token and layer 'a' has 2"):
        Trace.from_routings({"a": routing(small), "b": routing(more)}, [small, more])
    with pytest.raises(ValueError, match="layer 'b' has 5 tokens and layer 'a' has 4"):
        Trace.from_routings({"a": routing(small), "b": routing(small, 5)}, small)
    with pytest.raises(ValueError, match="no layer was recorded"):
        Trace.from_routings({}, small)


def test_a_layer_that_is_not_there_is_named():
    trace = made(v3(8, 1, 1, 2))
    with pytest.raises(ValueError, match=r"layer=2 is not in the trace: it has layers 0 to 1, layers.0, layers.1"):
        trace.layer(2)
    with pytest.raises(ValueError, match=r"layer='layers.7' is not in the trace: it has layers 0 to 1, layers.0"):
        trace.layer("layers.7")
    with pytest.raises(ValueError, match=r"layer=0.5 is no whole number"):
        trace.layer(0.5)


def test_a_layer_is_found_by_its_name_and_by_what_reports_call_it():
    trace = dataclasses.replace(made(v3(8, 1, 1, 2)), layers=("model.layers.0.mlp", "model.layers.1.mlp"))
    for name in (1, -1, "layers.1", "model.layers.1.mlp"):
        assert torch.equal(trace.layer(name).weights, trace.weights[1])
        assert steps(trace, name).layer == "model.layers.1.mlp"
    blocks = dataclasses.replace(trace, layers=("encoder.block.1", "decoder.block.1"))
    assert steps(blocks, "decoder.block.1").layer == "decoder.block.1"
    with pytest.raises(ValueError, match=r"layer='block.1' is not in the trace"):
        blocks.layer("block.1")


def test_rows_are_the_assignments_with_all_that_is_known_of_their_tokens():
    trace = made(
        v3(16, 4, 2, 4), 6, sequences=torch.tensor([0, 0, 1, 1, 1, 1]), labels=("poem", "诗"), pieces={2: "a", 3: "b"},
        input_ids=torch.tensor([2, 3, 4, 2, 2, 3]), phases=torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.uint8),
    )  # fmt: skip
    rows, of_layer = trace.rows(), trace.rows("layers.1")
    assert list(rows) == [
        "layer",
        "token",
        "sequence",
        "label",
        "phase",
        "input_id",
        "piece",
        "slot",
        "expert",
        "weight",
    ]
    assert {len(column) for column in rows.values()} == {2 * 6 * 4}
    expected = [
        (trace.layers[i], t, s, trace.labels[s], PHASES[trace.phases[t]], trace.input_ids[t].item(),
         trace.pieces.get(trace.input_ids[t].item(), ""), k, trace.picks[i, t, k].item(), trace.weights[i, t, k].item())
        for i in range(2) for t, s in enumerate(trace.sequences.tolist()) for k in range(4)
    ]  # fmt: skip
    assert list(zip(*(column.tolist() for column in rows.values()), strict=True)) == expected
    assert list(zip(*(column.tolist() for column in of_layer.values()), strict=True)) == expected[6 * 4 :]
    bare = dataclasses.replace(made(v3(16, 4, 2, 4), 3), weights=None, logits=None)
    assert list(bare.rows()) == ["layer", "token", "sequence", "slot", "expert"]
    assert {len(column) for column in made(v3(16, 4, 2, 4), 0).rows().values()} == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": torch.zeros(1)}, r"weights of the trace has shape \(1,\), not \(2, 12, 2\)"),
        ({"picks": torch.full((2, 12, 2), 9, dtype=torch.int16)}, r"picks of the trace lie outside 0\.\.8"),
        ({"picks": torch.zeros(2, 12, dtype=torch.int16)}, r"picks of the trace have shape \(2, 12\): three axes"),
        ({"offsets": torch.tensor([[2, 1]] * 12)}, "offsets end before they begin"),
        ({"layers": ("a",)}, "2 layers of picks, 1 names and 2 configs"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(v3(8, 1, 1, 2)), **fields)


def test_a_layer_without_a_bias_among_layers_with_one_has_zeros_and_one_that_is_silent_leaves_none():
    biased, plain = v3(8, 1, 1, 2), v3(8, 1, 1, 2, topk_method="greedy")
    bias = torch.arange(8.0)
    routings = {name: route(torch.randn(4, 8), None, plain) for name in "ab"}
    assert torch.equal(
        Trace.from_routings(routings, [biased, plain], {"a": bias}).bias, torch.stack([bias, torch.zeros(8)])
    )
    assert Trace.from_routings(routings, [biased, biased], {"a": bias}).bias is None
    assert Trace.from_routings(routings, plain).bias is None


def test_the_id_for_no_expert_may_be_recorded():
    ids = torch.tensor([[0, 8], [8, 8]])
    assert made(v3(8, 1, 1, 2)).n_experts == 8
    assert Trace.from_routings({"a": Routing(None, torch.ones(2, 2), ids)}, v3(8, 1, 1, 2)).picks.max() == 8


@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_that_stand_twice_and_those_that_two_choices_share_are_those_of_sets(k):
    one, two = (torch.randint(0, 9, (300, n), dtype=torch.int16).numpy() for n in (k, k + 1))  # the id 8 is no expert
    sets = [[[e for e in row if e < 8] for row in picks.tolist()] for picks in (one, two)]
    assert twice(one, 8).tolist() == [len(set(row)) < len(row) for row in sets[0]]
    fine = [i for i in range(300) if all(len(set(rows[i])) == len(rows[i]) for rows in sets)]
    assert len(fine) > 3
    found = shared(one[fine], two[fine], 8).tolist()
    assert found == [len(set(sets[0][i]) & set(sets[1][i])) for i in fine]


def test_a_layer_has_data_if_any_token_has_and_repeats_are_of_its_tokens():
    trace = made(v3(16, 4, 2, 4), layers=3)
    picks = torch.full_like(trace.picks, 16)
    picks[1, 11, 3], picks[2, 0], picks[2, 5, 1:] = 2, trace.picks[2, 0], torch.tensor([7, 16, 7])
    trace = dataclasses.replace(trace, picks=picks, missing=("late",))
    assert trace.without_data == ("layers.0", "late")
    assert trace.repeats.tolist() == [0, 0, 1]
    assert trace.select([]).without_data == (*trace.layers, "late")
