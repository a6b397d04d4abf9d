"""The shipped model has learnt and is balanced; a run is reproducible, can be resumed, and refuses what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import moesaic.train.data
from moesaic.train.data import CORPUS, DOMAINS, Document
from moesaic.train.evaluate import HeldOut
from moesaic.train.muon import orthogonal
from moesaic.train.routers import balanced_layers
from moesaic.train.tiny import Recipe, train

TINY = CORPUS.parent / "tiny"
SHORT = Recipe(steps=3, warmup_steps=1, evaluate_every=1, held_out_windows=1)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def small_corpus(monkeypatch):
    """The first documents of every domain, cut short: seconds instead of minutes."""
    whole = moesaic.train.data._documents

    def cut(domain, split):
        return tuple(Document(title, text[:2000]) for title, text in whole(domain, split)[:25])

    monkeypatch.setattr(moesaic.train.data, "_documents", cut)


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
    layers = balanced_layers(model)
    assert len(layers) >= 4
    for layer in layers.values():
        assert layer.bias.dtype == torch.float32
        assert layer.bias.any()
    names = {path.name for path in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= names


def test_parameters_are_stored_as_float16_and_the_bias_as_float32():
    with safe_open(TINY / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {dtype for name, dtype in dtypes.items() if name.endswith("e_score_correction_bias")} == {"F32"}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("e_score_correction_bias")} == {"F16"}


def test_the_shipped_model_beats_kneser_ney_in_every_domain_and_is_balanced(shipped):
    model, tokenizer = shipped
    report = HeldOut(tokenizer, max_windows=32).judge(model)
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


def test_a_model_is_judged_without_leaving_a_trace(shipped):
    model, tokenizer = shipped
    held_out = HeldOut(tokenizer, max_windows=1)
    model.train()
    assert held_out.judge(model) == held_out.judge(model)
    assert model.training
    model.eval()
    assert not any(layer.experts._forward_pre_hooks for layer in balanced_layers(model).values())


@pytest.fixture
def weights():
    def read(folder):
        from safetensors.torch import load_file

        return load_file(folder / "model.safetensors")

    return read


@pytest.mark.usefixtures("small_corpus")
def test_a_short_run_is_reproducible_resumable_and_writes_a_plain_folder(tmp_path, weights, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = train(tmp_path / "a", seed=3, recipe=SHORT)
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json",
    }  # fmt: skip
    record = json.loads((tmp_path / "a/training.json").read_text("utf-8"))
    assert record["finished"]
    assert record["seed"] == 3
    assert [line["step"] for line in record["history"]] == [1, 2, 3]
    assert record["best_step"] == max(record["history"], key=lambda line: line["worst_margin"])["step"]
    assert record["held_out"]["python"]["loss"] == report.domains["python"].loss
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    held_out = HeldOut(AutoTokenizer.from_pretrained(tmp_path / "a"))
    assert held_out.judge(again) == report

    train(tmp_path / "b", seed=3, recipe=SHORT)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    with pytest.raises(ValueError, match="has finished after 3 steps"):
        train(resume=tmp_path / "a")
    with pytest.raises(ValueError, match="is not empty"):
        train(tmp_path / "a", recipe=SHORT)


@pytest.mark.usefixtures("small_corpus")
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, weights, monkeypatch):
    from moesaic.train.keeping import KeepBest

    train(tmp_path / "whole", recipe=SHORT)

    go_on = KeepBest.on_step_end

    def stop_at_step_3(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return go_on(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "on_step_end", stop_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", recipe=SHORT)
    with pytest.raises(ValueError, match="use --resume to continue"):
        train(tmp_path / "cut", recipe=SHORT)
    train(resume=tmp_path / "cut")

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    history = [json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("whole", "cut")]
    assert history[0] == history[1]


def test_what_is_not_a_run_is_refused_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume=.*nowhere does not exist"):
        train(resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"resume=.* is not a run of `moesaic train` \(no readable training.json\)"):
        train(resume=tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match="is not a run of"):
        train(resume=tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 0, "recipe": {"pages": 3}, "history": []}')
    with pytest.raises(ValueError, match="is not a run of"):
        train(resume=tmp_path)
    with pytest.raises(ValueError, match="out=None: name a new folder"):
        train()
    with pytest.raises(ValueError, match="give one of them"):
        train(tmp_path / "new", resume=tmp_path)


def test_an_out_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"out=.*file is a file"):
        train(tmp_path / "file")
    with pytest.raises(ValueError, match=r"out=.*file/below cannot be written \(Not a directory\)"):
        train(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("field", ["steps", "batch_size", "evaluate_every", "held_out_windows"])
def test_a_recipe_without_steps_is_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(Recipe(), **{field: 0})


def test_a_batch_that_cannot_hold_the_shares_is_refused():
    with pytest.raises(
        ValueError, match="batch_size=7 does not hold whole windows of every domain: use a multiple of 10"
    ):
        Recipe(batch_size=7)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (3, 6, 6), (2, 3, 4, 9)])
def test_orthogonal_has_the_singular_vectors_of_its_input_and_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonal(matrices) @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-6)
    assert (values[s > 0.05 * s.amax(-1, keepdim=True)] - 0.95).abs().max() < 0.3
