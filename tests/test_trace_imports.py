"""Records of other engines as traces: what they are read against, and what holds for all of them."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import (
    HF,
    KNOWN,
    E,
    K,
    config_file,
    encoded,
    megatron,
    megatron_lines,
    picked,
    refused,
    sglang_dump,
    sglang_record,
    vllm_array,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic
from moesaic.config import MoEConfig
from moesaic.trace.imports import READERS, read_target, responses, sglang
from moesaic.trace.imports import megatron as megatron_reader
from moesaic.trace.imports.target import moe_layer_numbers


def test_a_config_a_folder_a_preset_and_a_number_of_experts_are_targets(tmp_path):
    file = config_file(tmp_path)
    for given_as in (file, tmp_path):
        target = read_target(str(given_as))
        assert (target.n_experts, target.top_k, target.layers) == (E, K, (1, 2, 3, 4))
        assert target.config == MoEConfig.from_hf(HF)
    preset = read_target("deepseek-v3")
    assert (preset.n_experts, preset.top_k, preset.layers, preset.model) == (256, 8, None, "deepseek-v3")
    sizes = read_target(experts=60)
    assert (sizes.n_experts, sizes.top_k, sizes.layers) == (60, None, None)
    assert not sizes.config_of(6).rule_is_known
    assert sizes.config_of(6).num_experts_per_tok == 6


def test_a_family_without_a_known_rule_gives_its_sizes(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "new_moe", "hidden_size": 32, "moe_num_experts": 24, "moe_k": 3}))
    target = read_target(str(file))
    assert (target.n_experts, target.top_k) == (24, 3)
    assert not target.config.rule_is_known


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 4}, (0, 1, 2, 3)),
        ({"num_hidden_layers": 4, "first_k_dense_replace": 3}, (3,)),
        ({"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 2}, (2,)),
        ({"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 0, 1]}, (1, 3)),
        ({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5)),
        ({"num_hidden_layers": 4, "num_dense_layers": 2}, (2, 3)),
        ({"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}, (1, 2)),
        ({}, None),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": 10**12}, None),
        ({"num_hidden_layers": 4, "first_k_dense_replace": "3"}, None),
    ],
)
def test_a_config_says_which_layers_have_experts(config, layers):
    assert moe_layer_numbers(config) == layers


@pytest.mark.parametrize(
    ("config", "experts", "message"),
    [
        (None, None, "the largest id in a record is not the number of experts: give --config .* or --experts"),
        ("mixtral", 8, "one of them"),
        (None, 0, "0 experts: use 1 to"),
        (None, 10**9, "experts: use 1 to"),
        ("nowhere", None, "--config nowhere: neither a file, nor a folder .*, nor a preset"),
    ],
)
def test_what_is_no_model_is_refused(config, experts, message):
    with pytest.raises(ValueError, match=message):
        read_target(config, experts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n_routed_experts": 8, "n_routed_experts": 9}', "has the key .* twice"),
        ('{"hidden_size": 8, "n_routed_experts": NaN, "moe_k": 2}', "n_routed_experts=nan is not an integer"),
        ('{"n_routed_experts": 8', "not JSON, or cut short"),
        ("[" * 100_000, "not JSON, or cut short"),
        ("[1]", "not a JSON object"),
        ("\xff", "is not UTF-8"),
        ('{"hidden_size": 8, "model_type": "llama"}', "no n_routed_experts"),
        ('{"hidden_size": 8, "num_experts": true, "moe_k": 2, "model_type": "x"}', "n_routed_experts=True is not an"),
        ('{"hidden_size": 8, "num_experts": 1' + "0" * 5000 + "}", "a number that is too long"),
        ('{"hidden_size": 8, "num_experts": 10000000, "moe_k": 2, "model_type": "x"}', "experts: use 1 to 65536"),
        ("", "not JSON, or cut short"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        read_target(str(file))
    assert "\n" not in str(error.value)


def good_files(folder: Path) -> dict[str, Path]:
    np.save(folder / "a.npy", vllm_array(picked(5)))
    (folder / "a.json").write_text(json.dumps({"choices": [{"routed_experts": encoded(vllm_array(picked(5)))}]}))
    return {
        "sglang": sglang_dump(folder / "a.pt", [sglang_record(picked(5))]),
        "vllm": folder / "a.npy",
        "vllm json": folder / "a.json",
        "megatron": megatron(folder, megatron_lines(picked(5))),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in good_files(tmp_path_factory.mktemp("good")).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", ["sglang", "vllm", "vllm json", "megatron"])
@settings(max_examples=300)
@given(data=st.data())
def test_a_fuzzed_file_gives_a_lawful_trace_or_one_line(folder, whole, name, data):
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "repeat"]))
        if kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, len(content)))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=8))
        else:
            content[at:at] = content[max(0, at - 16) : at]
        if not content:
            break
    path = folder / "a"
    path.unlink(missing_ok=True)
    path.write_bytes(bytes(content))
    try:
        trace = READERS[name.split()[0]]([path], KNOWN).trace
    except ValueError:
        assert refused(name.split()[0], [path])
        return
    ids = trace.picks.sort(-1).values
    assert not ((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] < E)).any()
    assert len(trace) <= len(content)


@pytest.mark.parametrize("name", ["sglang", "vllm", "megatron"])
def test_nothing_missing_and_empty_files_are_refused(tmp_path, name):
    (tmp_path / "empty").touch()
    assert "no such file" in refused(name, [tmp_path / "nowhere"])
    assert "a folder, not a file" in refused(name, [tmp_path])
    assert "the file is empty" in refused(name, [tmp_path / "empty"])


def test_a_record_larger_than_a_trace_may_be_is_refused(tmp_path, monkeypatch):
    for module in (sglang, responses, megatron_reader):
        monkeypatch.setattr(module, "MOST_PICKS", 79)
    for name, path in good_files(tmp_path).items():
        assert "ids" in refused(name.split()[0], [path])


def test_an_imported_trace_is_saved_and_read_as_any_other(tmp_path):
    from moesaic.trace.file.reader import load

    trace = READERS["sglang"]([sglang_dump(tmp_path / "a.pt", [sglang_record(picked(9))])], KNOWN).trace
    trace.save(tmp_path / "run.safetensors")
    again = load(tmp_path / "run.safetensors")
    assert torch.equal(again.picks, trace.picks)
    assert (again.layers, again.configs, again.origins) == (trace.layers, trace.configs, trace.origins)
    assert again.weights is None
    assert torch.equal(again.sequences, trace.sequences)
    assert torch.equal(again.phases, trace.phases)


def test_nothing_in_the_package_runs_what_a_file_says():
    """Every torch.load reads tensors only, and pickle is asked for nothing but the name of its error."""
    source = Path(moesaic.__file__).parent
    seen = 0
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "np.load", "numpy.load"), path
            if name == "torch.load":
                seen += 1
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options["weights_only"] == "True", path
    assert seen == 1
