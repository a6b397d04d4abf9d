"""The shipped model has learnt and is balanced."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3Config

from moesaic.hf.modules import moe_layers
from moesaic.train.data import CORPUS, DOMAINS
from moesaic.train.evaluate import HeldOut
from moesaic.train.sizes import tiny_config

TINY = CORPUS.parent / "tiny"


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def held_out(shipped):
    return HeldOut(shipped[1], max_windows=16)


@pytest.fixture(scope="module")
def report(shipped, held_out):
    return held_out.judge(shipped[0])


def test_the_shipped_folder_is_a_deepseek_v3_model_for_plain_transformers(shipped):
    model, tokenizer = shipped
    config = model.config
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert model.dtype == torch.float32
    assert len(tokenizer) == config.vocab_size == 4096
    assert config.n_routed_experts >= 32
    assert config.n_group >= 4 > config.topk_group
    assert config.num_experts_per_tok >= 4
    assert config.n_shared_experts == 1
    layers = moe_layers(model)
    assert len(layers) >= 4
    for layer in layers:
        assert layer.bias.dtype == torch.float32
        assert layer.bias.any()
    names = {path.name for path in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= names


def test_its_config_is_the_one_that_training_it_again_uses():
    shipped = DeepseekV3Config.from_pretrained(TINY).to_dict()
    again = tiny_config().to_dict()
    assert shipped.keys() - again.keys() <= {"output_router_logits"}, "a field since transformers 5.23"
    differ = {name for name in shipped.keys() & again.keys() if shipped[name] != again[name]}
    assert differ <= {"_name_or_path", "architectures", "dtype"}


def test_parameters_are_stored_as_float16_and_the_bias_as_float32():
    with safe_open(TINY / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {dtype for name, dtype in dtypes.items() if name.endswith("e_score_correction_bias")} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("e_score_correction_bias")} == {"F16"}


def test_the_shipped_model_beats_kneser_ney_in_every_domain_and_is_balanced(report):
    assert set(report.domains) == set(DOMAINS)
    for domain, result in report.domains.items():
        assert result.margin >= 0.15, f"{domain}: {result}"
    assert len(report.max_violation) >= 4
    assert max(report.max_violation.values()) <= 0.3, report.max_violation


@pytest.mark.slow
def test_the_recorded_results_are_those_of_the_shipped_weights_on_all_held_out_text(shipped):
    model, tokenizer = shipped
    record = json.loads((TINY / "training.json").read_text("utf-8"))
    report = HeldOut(tokenizer).judge(model)
    for domain, result in report.domains.items():
        assert record["held_out"][domain]["tokens"] == result.tokens
        assert record["held_out"][domain]["loss"] == pytest.approx(result.loss, abs=1e-3)
        assert record["held_out"][domain]["kneser_ney"] == pytest.approx(result.kneser_ney, abs=1e-6)
    assert record["max_violation"] == pytest.approx(report.max_violation, abs=0.02)


def test_a_model_is_judged_without_leaving_a_trace(shipped, held_out, report):
    model, _ = shipped
    model.train()
    assert held_out.judge(model) == report
    assert model.training
    model.eval()
    assert not any(layer.experts._forward_pre_hooks for layer in moe_layers(model))
