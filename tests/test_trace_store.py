import dataclasses
import json

import numpy as np
import pytest
import torch
from cases import configs, v3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesaic.rules import route
from moesaic.trace import store
from moesaic.trace.store import Trace, load
from moesaic.types import Routing


def made(config, n_tokens=12, layers=2, seed=0, **fields) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    routings, biases = {}, {}
    for layer in range(layers):
        logits = torch.randn(n_tokens, config.n_routed_experts, generator=generator)
        bias = torch.randn(config.n_routed_experts, generator=generator)
        routings[f"layers.{layer}"], biases[f"layers.{layer}"] = route(logits, bias, config), bias
    return Trace.from_routings(routings, config, biases, **fields)


def assert_equal(a: Trace, b: Trace) -> None:
    for field in dataclasses.fields(Trace):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@given(
    configs(), st.integers(0, 20), st.integers(1, 3), st.integers(0, 99),
    st.booleans(), st.sampled_from(["", "模型 “x”\n"]),
)  # fmt: skip
def test_a_trace_written_and_read_is_equal(tmp_path_factory, config, n_tokens, layers, seed, with_ids, model):
    path = tmp_path_factory.mktemp("trace") / "run.safetensors"
    sequences = torch.arange(n_tokens) // 5
    trace = made(config, n_tokens, layers, seed)
    trace = dataclasses.replace(
        trace, model=model, seed=seed, sequences=sequences, labels=tuple("诗abc"),
        input_ids=torch.arange(n_tokens) if with_ids else None,
    )  # fmt: skip
    trace.save(path)
    assert_equal(load(path), trace)
    picks_only = dataclasses.replace(trace, logits=None, bias=None, labels=None)
    picks_only.save(path)
    assert_equal(load(path), picks_only)


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
    assert trace.with_labels(["a", "b", "c"]).labels == ("a", "b", "c")
    with pytest.raises(ValueError, match="2 labels for 3 sequences"):
        trace.with_labels(["a", "b"])


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
    with pytest.raises(ValueError, match="layer=2 is not in the trace: it has layers 0 to 1"):
        made(v3(8, 1, 1, 2)).layer(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": torch.zeros(1)}, r"weights of the trace has shape \(1,\), not \(2, 12, 2\)"),
        ({"picks": torch.full((2, 12, 2), 9, dtype=torch.int16)}, r"picks of the trace lie outside 0\.\.8"),
        ({"layers": ("a",)}, "2 layers of picks, 1 names and 2 configs"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(v3(8, 1, 1, 2)), **fields)


def test_the_id_for_no_expert_may_be_recorded():
    ids = torch.tensor([[0, 8], [8, 8]])
    assert made(v3(8, 1, 1, 2)).n_experts == 8
    assert Trace.from_routings({"a": Routing(None, torch.ones(2, 2), ids)}, v3(8, 1, 1, 2)).picks.max() == 8


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_files_that_are_no_trace_are_refused_in_one_line(tmp_path):
    path = tmp_path / "run.safetensors"
    refused(path, "no such file")
    refused(tmp_path, "no such file")
    path.write_bytes(b"")
    refused(path, "not a readable safetensors file")
    made(v3(8, 1, 1, 2)).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "not a readable safetensors file")
    save_file({"picks": torch.zeros(1)}, path)
    refused(path, "a safetensors file, but not a recorded trace")


def trace_header(trace, folder):
    trace.save(folder / "whole.safetensors")
    with safe_open(folder / "whole.safetensors", framework="pt") as file:
        return file.metadata()


def test_a_damaged_or_newer_trace_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    trace = made(v3(8, 1, 1, 2))
    trace.save(path)
    tensors = load_file(path)
    header = {"format": store.FORMAT, "format_version": "0", "about": "{}"}
    save_file(tensors, path, metadata=header)
    refused(path, "a damaged trace")
    save_file(tensors, path, metadata={**header, "about": json.dumps({"configs": [{"hidden_size": 0}]})})
    refused(path, "a damaged trace")
    whole = trace_header(trace, tmp_path)
    for broken in ({"format_version": "x"}, {"format_version": ""}, {"about": '"text"'}, {"about": "["}):
        save_file(tensors, path, metadata={**whole, **broken})
        refused(path, "a damaged trace")
    monkeypatch.setattr(store, "FORMAT_VERSION", 99)
    trace.save(path)
    monkeypatch.undo()
    refused(path, "trace format 99 is newer than 0, which moesaic .* reads: update moesaic")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    first, second = made(v3(8, 1, 1, 2)), made(v3(8, 1, 1, 2), seed=1)
    first.save(path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(ValueError, match=r"run.safetensors: cannot be written \(No space left on device\)"):
            second.save(path)
    assert_equal(load(path), first)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    second.save(path)
    assert_equal(load(path), second)
    with pytest.raises(ValueError, match="cannot be written"):
        first.save(tmp_path / "nowhere" / "run.safetensors")
