"""What a recorder finds wrong in a long record costs nothing that was recorded."""

import pytest
import torch
from hf_models import tiny, token_ids
from torch import nn

import moesaic as ms
from moesaic.layer.moe import MoE
from moesaic.trace.recording.record import record


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def recorded(model, path, run, detail="picks", **options):
    with record(model, detail, to=path, **options) as rec, torch.no_grad():
        run(rec)


def two_sizes():
    return nn.Sequential(MoE.classic(8, 8, 8, 4, 2), MoE.classic(8, 8, 8, 6, 2))


def test_layers_that_do_not_fit_the_first_are_left_out_of_the_file_and_stay_in_parts(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(
        ValueError, match=r"layer '1' has 6 experts and layer '0' has 4.*; 1: left out, and in"
    ) as caught:
        recorded(two_sizes(), path, lambda rec: rec.model(torch.randn(3, 8)))
    assert (ms.load(path).layers, ms.load(path).missing, len(ms.load(path))) == (("0",), ("1",), 3)
    (folder,) = (name for name in names_in(tmp_path) if name != path.name)
    assert folder in str(caught.value)
    assert names_in(tmp_path / folder), "what the file does not hold"


def test_layers_of_two_sizes_of_which_none_ran_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"has 4: record them one by one$"):
        recorded(two_sizes(), tmp_path / "run.safetensors", lambda _: None)
    assert names_in(tmp_path) == []


def test_a_layer_that_did_not_run_in_the_last_forward_takes_no_other_layer_with_it(tmp_path):
    layers = nn.ModuleList(MoE.classic(8, 8, 8, 4, 2) for _ in range(3))

    def run(_):
        for layer in (*layers, *layers[:2]):
            layer(torch.randn(3, 8))

    with pytest.raises(ValueError, match=r"layer '2' has 3 tokens and layer '0' has 6.*what was recorded is in"):
        recorded(layers, tmp_path / "run.safetensors", run)
    trace = ms.load(tmp_path / "run.safetensors")
    assert (trace.layers, trace.missing, len(trace)) == (("0", "1"), ("2",), 6)


def test_one_label_too_few_ends_the_forward_that_lacks_it_and_leaves_the_file_without_labels(tmp_path):
    path, done = tmp_path / "run.safetensors", []

    def run(rec):
        for step in range(4):
            rec.model(token_ids(1, 6))
            done.append(step)

    with pytest.raises(
        ValueError, match=r"2 labels for 3 sequences: .*its labels are left out; what was recorded is in"
    ):
        recorded(tiny(), path, run, labels=["a", "b"])
    assert done == [0, 1], "the third forward is told"
    assert (len(ms.load(path)), ms.load(path).labels) == (18, None)
    assert names_in(tmp_path) == [path.name]


def test_a_bias_that_moves_ends_its_forward_and_leaves_the_forwards_before_in_the_file(tmp_path):
    model, path, done = tiny(), tmp_path / "run.safetensors", []
    gate = next(module for module in model.modules() if hasattr(module, "e_score_correction_bias"))

    def run(_):
        for step in range(4):
            model(token_ids(1, 6))
            done.append(step)
            gate.e_score_correction_bias += step

    with pytest.raises(ValueError, match=r"changed while its scores were recorded.*what was recorded is in"):
        recorded(model, path, run, "scores")
    assert done == [0, 1]
    assert len(ms.load(path)) == 12
    assert names_in(tmp_path) == [path.name]


def test_what_cannot_be_put_together_at_all_stays_in_parts_that_are_named(tmp_path):
    def run(rec):
        rec.model(token_ids(1, 6))
        rec.describe(sequences=torch.zeros(2, dtype=torch.int64))

    with pytest.raises(ValueError, match=r"sequences of 2 tokens were given and 6 recorded.*lies in") as caught:
        recorded(tiny(), tmp_path / "run.safetensors", run)
    (folder,) = names_in(tmp_path)
    assert str(tmp_path / folder) in str(caught.value)
    assert names_in(tmp_path / folder)
