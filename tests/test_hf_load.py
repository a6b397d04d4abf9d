import json
import re

import pytest
import torch
import transformers
from commands import runner
from hf_models import COMMON, seeing_model, tiny, token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

from moesaic.cli.steps import steps
from moesaic.cli.trace import trace
from moesaic.hf.load import load_model


def save_tokenizer(folder):
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the model folder to break."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_model_and_its_tokenizer_come_back_quietly(folder, capfd):
    torch.manual_seed(0)
    saved, verbosity = tiny(), logging.get_verbosity()
    model, tokenizer = load_model(folder)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert logging.get_verbosity() == verbosity
    assert logging.is_progress_bar_enabled()
    assert not model.training
    ids = token_ids()
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert tokenizer.decode(tokenizer("routing 路由")["input_ids"]) == "routing 路由"


def test_a_model_that_sees_is_loaded_to_read(tmp_path, monkeypatch, capsys):
    seeing_model(vocab_size=256).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    assert type(model) is transformers.Qwen3VLMoeForConditionalGeneration
    monkeypatch.chdir(tmp_path)
    run = runner(monkeypatch, capsys, trace=trace, steps=steps)
    code, out, _ = run("trace", "model", "--text", "routing", "--detail", "scores")
    assert (code, "model: 3 MoE layers, top 2 of 8 experts" in out) == (0, True)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "no such folder: give the folder of a Hugging Face model$")
    refused("Qwen/Qwen3-30B-A3B", "nothing is downloaded here: hf download Qwen/Qwen3-30B-A3B --local-dir FOLDER$")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file, not a folder")


def test_a_folder_without_a_model(tmp_path):
    refused(tmp_path, "not a model folder: it has no config.json: give the folder of a Hugging Face model$")
    (tmp_path / "config.json").write_text("{nonsense")
    refused(tmp_path, "config.json is not JSON, or cut short")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: not a JSON object")
    (tmp_path / "config.json").write_text('{"text_config": 5}')
    refused(tmp_path, "not an MoE model")


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path):
    transformers.LlamaConfig(**COMMON).save_pretrained(tmp_path)
    refused(tmp_path, "not an MoE model: the config of this 'llama' model names no experts")


def test_a_config_whose_layers_are_all_dense(tmp_path):
    tiny(first_k_dense_replace=3).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    refused(tmp_path, "not an MoE model: DeepseekV3ForCausalLM has no module with a gate")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[: len(b) // 2], lambda _: b"", lambda b: b"x" * len(b)]
)
def test_damaged_weights(broken, damage):
    weights = broken / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    refused(broken, "the model cannot be loaded")


def test_missing_weights(broken):
    (broken / "model.safetensors").unlink()
    refused(broken, "the model cannot be loaded")


def test_incomplete_weights_are_not_filled_with_noise(broken):
    from safetensors.torch import load_file, save_file

    state = load_file(broken / "model.safetensors")
    del state["model.layers.1.mlp.gate.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, "weights are incomplete, 1 are missing, such as model.layers.1.mlp.gate.weight")


def test_weights_of_another_config_are_named_with_both_sizes(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    there, wanted = ([config["vocab_size"] + more, config["hidden_size"]] for more in (0, 8))
    message = f": lm_head.weight is {there} in the weights and {wanted} by config.json, and others differ too: give the"
    refused(broken, re.escape(message))


def test_an_unknown_kind_of_model(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "never_heard_of"}))
    refused(broken, "the model cannot be loaded")


def test_a_missing_or_damaged_tokenizer(broken):
    (broken / "tokenizer.json").write_text("{}")
    refused(broken, "the tokenizer cannot be loaded")
    (broken / "tokenizer.json").unlink()
    refused(broken, "no tokenizer there")
