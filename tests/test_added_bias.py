"""A selection bias for families that have none: steers picks, reaches no weight, and is saved with the model."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from commands import runner
from hf_models import tiny, token_ids
from safetensors.torch import load_file, save_file
from traces import check_layer
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

import moesaic as ms
from moesaic.cli.trace import trace
from moesaic.hf.added_bias import BIAS, add_bias, lost, restore_bias
from moesaic.hf.load import TINY, load_model
from moesaic.hf.modules import moe_layers
from moesaic.hf.outputs import read_router
from moesaic.trace.file.reader import load
from moesaic.train.bias_balance import BiasBalance

# a rule each: softmax then top-k, with and without normalisation; top-k then softmax; groups by their maximum
WITHOUT_BIAS = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v2")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def picks_and_weights(model, ids):
    with torch.no_grad(), ms.record(model) as rec:
        logits = model(ids).logits
    arrays = rec.trace.to_arrays()
    return logits, arrays["picks"], arrays["weights"]


@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_a_bias_of_zeros_changes_nothing_and_a_large_one_only_the_choice(family):
    model, ids = tiny(family), token_ids()
    before, picks, weights = picks_and_weights(model, ids)
    names = add_bias(model)
    assert names == [layer.name for layer in moe_layers(model)]
    after, same_picks, same_weights = picks_and_weights(model, ids)
    if family == "deepseek_v2":  # its picks come in no order, and ours best first: sums are rounded otherwise
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
        picks, same_picks, weights, same_weights = map(np.sort, (picks, same_picks, weights, same_weights))
    else:
        assert torch.equal(before, after)
    assert (picks == same_picks).all()
    np.testing.assert_allclose(weights, same_weights, rtol=1e-4 if family == "deepseek_v2" else 0)
    k = picks.shape[-1]
    for layer in moe_layers(model):
        layer.bias[:k] = 100.0  # with groups: inside the first one
    _, forced, _ = picks_and_weights(model, ids)
    assert (forced < k).all(), "the bias chooses"
    for layer in moe_layers(model):
        layer.bias.fill_(100.0)  # a constant changes no choice, so it must change no weight
    _, forced, _ = picks_and_weights(model, ids)
    assert (np.sort(forced) == np.sort(picks)).all()


@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_the_bias_reaches_no_weight(family):
    model = tiny(family)
    add_bias(model)
    router, rule = moe_layers(model)[0].router, moe_layers(model)[0].config
    tokens = torch.randn(50, rule.hidden_size)
    router.get_buffer(BIAS).normal_(std=0.03)
    with torch.no_grad():
        biased = read_router(router, router(tokens))
        router.get_buffer(BIAS).zero_()
        plain = read_router(router, router(tokens))
    changed = (biased.ids.sort(-1).values != plain.ids.sort(-1).values).any(-1)
    assert changed.any()
    assert not changed.all()
    dense = [torch.zeros(50, rule.n_routed_experts).scatter(1, r.ids, r.weights) for r in (biased, plain)]
    # not bitwise: in another order of preference the sum that normalises is rounded otherwise
    torch.testing.assert_close(dense[0][~changed], dense[1][~changed], rtol=1e-6, atol=0)


def test_groups_that_a_greedy_rule_does_not_use_stay_unused():
    model, ids = tiny("deepseek_v2", topk_method="greedy"), token_ids()
    assert model.config.n_group > 1
    _, picks, _ = picks_and_weights(model, ids)
    add_bias(model)
    _, same, _ = picks_and_weights(model, ids)
    assert (np.sort(picks) == np.sort(same)).all()


def test_gradients_reach_the_router_through_the_weights():
    model, ids = tiny("qwen3_moe").train(), token_ids()
    add_bias(model)
    for layer in moe_layers(model):
        layer.bias.normal_(std=0.1)
    model(ids, labels=ids).loss.backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad.abs().sum() > 0
        assert not layer.bias.requires_grad


@pytest.mark.parametrize(
    ("family", "reason"),
    [("phimoe", "how PhimoeTopKRouter selects is not known here"), ("gemma4", "how Gemma4TextRouter selects")],
)
def test_a_router_whose_rule_is_not_known_is_refused_and_nothing_changed(family, reason):
    model = tiny(family)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        add_bias(model)
    assert set(model.state_dict()) == before
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


def test_a_speed_that_fits_no_layer_is_refused_before_a_bias_is_added():
    model = tiny("qwen3_moe")
    with pytest.raises(ValueError, match=r"no speed fits layer 'model\.layers\.1\.mlp'"):
        BiasBalance({"model.layers.0.*": 0.1}, add_bias=True).attach(model)
    assert all(layer.bias is None for layer in moe_layers(model))
    assert "moesaic_added_bias" not in model.config.to_dict()


def test_a_router_that_does_otherwise_than_its_family_is_refused():
    model = tiny("qwen3_moe")
    router = moe_layers(model)[1].router
    plain = type(router).forward
    type(router).forward = lambda self, x: (out := plain(self, x)) and (out[0], out[1] * 1.5, out[2])
    try:
        with pytest.raises(ValueError, match="does not select as the rule of its family says"):
            add_bias(model)
    finally:
        type(router).forward = plain
    assert all(layer.bias is None for layer in moe_layers(model)), "nothing was changed, in no layer"


def test_models_that_have_their_biases_are_left_alone():
    model = tiny("deepseek_v3")
    assert add_bias(model) == []
    assert "moesaic_added_bias" not in model.config.to_dict()


def test_our_own_router_gets_one_too():
    layer = ms.DeepseekV3MoE(ms.MoEConfig.preset("qwen3-moe", hidden_size=16, moe_intermediate_size=8)).eval()
    x = torch.randn(9, 16)
    before = layer(x)
    add_bias(layer)
    assert torch.equal(layer(x), before)
    layer.gate.e_score_correction_bias[5] = 10.0
    assert (layer.gate(x).expert_ids == 5).any(-1).all()
    assert moe_layers(layer)[0].config == layer.gate.config, "not the block's, which has no bias"


class Gate(torch.nn.Module):
    """A router of one's own, which returns a Routing."""

    def __init__(self, config):
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return ms.route(x @ self.weight.T, None, self.config)


def test_the_output_of_a_router_keeps_its_kind():
    config = ms.MoEConfig.preset(
        "qwen3-moe", hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2
    )
    block = torch.nn.Module()
    block.gate, block.experts, block.config = Gate(config), ms.Experts(config), config
    add_bias(block)
    block.gate.get_buffer(BIAS)[5] = 10.0
    routing = block.gate(torch.randn(4, 16))
    assert isinstance(routing, ms.Routing)
    assert (routing.expert_ids == 5).any(-1).all()
    assert (routing.weights.sum(-1) - 1).abs().max() < 1e-6


def assert_derived(trace):
    """What was recorded follows from the recorded logits and biases by the rule that the record names."""
    assert trace.bias.any()
    for layer in range(trace.n_layers):
        check = check_layer(trace, layer)
        assert check.experts.all()
        assert check.weights.all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_record_of_a_model_with_added_biases_derives_its_own_picks(family):
    model, ids = tiny(family), token_ids()
    add_bias(model)
    for layer in moe_layers(model):
        layer.bias.normal_(std=0.03)
    with torch.no_grad(), ms.record(model, "scores") as rec:
        logits = model(ids).logits
    assert_derived(rec.trace)
    assert {config.limits_groups for config in rec.trace.configs} == {family == "deepseek_v2"}
    assert not ms.what_if(rec.trace).flipped.any()
    assert next(step for step in ms.steps(rec.trace, 0, 0) if step.stage.key == "biased").value is not None
    with torch.no_grad(), ms.replay(model, rec.trace):
        assert torch.equal(model(ids).logits, logits)


def trained(folder, family="qwen3_moe", **fields):
    """A model of a family without biases, saved with biases that moved."""
    model, ids = tiny(family, **fields).train(), token_ids()
    balance = BiasBalance(0.05, add_bias=True).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
    balance.detach()
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [1, 3])
def test_a_saved_bias_of_another_size_is_refused(tmp_path, size):
    trained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = next(name for name in saved if name.endswith("e_score_correction_bias"))
    save_file({**saved, name: torch.zeros(size)}, tmp_path / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"its saved bias has shape \({size},\)"):
        ms.attach(model)


def test_added_biases_are_saved_lost_by_a_plain_reload_and_restored_by_attach(tmp_path):
    model, ids = trained(tmp_path / "model"), token_ids()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["moesaic_added_bias"] is True
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert lost(plain)
    with pytest.raises(ValueError, match=r"loaded without them: call ms\.attach\(model\)"):
        BiasBalance().attach(plain)
    assert all(layer.bias is None for layer in moe_layers(plain))
    with pytest.raises(ValueError, match=r"loaded without them: call ms\.attach\(model\)"):
        trainer_of(plain, tmp_path / "run", BiasBalance(add_bias=True))
    assert lost(plain), "no bias of zeros stands for the one that was saved"
    ms.attach(plain)
    assert not lost(plain)
    for a, b in zip(moe_layers(model), moe_layers(plain), strict=True):
        assert torch.equal(a.bias, b.bias)
        assert a.bias.any()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert restore_bias(plain) == [], "nothing is restored twice"


def test_a_checkpoint_that_lacks_the_biases_it_speaks_of_is_named(tmp_path):
    trained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint with e_score_correction_bias, which config\.json says"):
        ms.attach(plain)


def test_a_checkpoint_that_lacks_one_of_them_leaves_the_model_as_it_was(tmp_path):
    trained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if key != f"model.layers.2.mlp.gate.{BIAS}"}, file)
    for _ in range(2):  # the second time too: no bias of zeros stands for the one that was saved
        with pytest.raises(ValueError, match=rf"no model\.layers\.2\.mlp\.gate\.{BIAS} in the checkpoint"):
            ms.attach(plain)
        assert lost(plain)


def test_where_transformers_refuses_to_switch_no_bias_is_added(tmp_path, monkeypatch):
    def locked(_name):
        raise RuntimeError("locked")

    trained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(plain, "set_experts_implementation", locked)
        with pytest.raises(ValueError, match="does not let this model change its experts: locked"):
            ms.attach(plain)
    assert lost(plain)
    ms.attach(plain)
    assert not lost(plain)


def test_where_a_saved_bias_cannot_be_added_the_model_stays_as_it_was(tmp_path):
    trained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = plain.get_experts_implementation()
    plain.model.layers[1].mlp.gate.to("meta")
    with pytest.raises(ValueError, match="Qwen3MoeTopKRouter has no weights yet to prove its rule with"):
        ms.attach(plain)
    assert plain.get_experts_implementation() == before
    assert lost(plain)


def test_a_router_that_deepspeed_shards_is_said_to_be_sharded():
    """Under ZeRO-3 a parameter is an empty vector that knows its id and its shape."""
    model = tiny("qwen3_moe")
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"Qwen3MoeTopKRouter is sharded.*add the bias before fully_shard or ZeRO-3"):
        add_bias(model)


def test_a_model_from_the_cache_of_the_hub_gets_its_biases_back(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--somebody--balanced" / "snapshots" / "0123abc"
    model = trained(snapshot)
    (tmp_path / "models--somebody--balanced" / "refs").mkdir()
    (tmp_path / "models--somebody--balanced" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(snapshot)
    plain.name_or_path = plain.config._name_or_path = "somebody/balanced"
    assert restore_bias(plain) == [layer.name for layer in moe_layers(model)]
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(moe_layers(model), moe_layers(plain), strict=True))


def test_the_model_without_its_head_finds_its_biases_in_the_checkpoint_of_the_whole(tmp_path):
    model = trained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    restore_bias(body)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(moe_layers(model), moe_layers(body), strict=True))


def test_a_model_inside_an_adapter_finds_them_under_its_own_names(tmp_path):
    model = trained(tmp_path)
    adapted = torch.nn.Module()  # as peft has it: base_model.model.model.layers...
    adapted.base_model = torch.nn.Module()
    adapted.base_model.model = plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted.config, adapted.name_or_path = plain.config, plain.name_or_path
    restore_bias(adapted)
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(moe_layers(model), moe_layers(plain), strict=True))


def test_plain_transformers_says_that_it_leaves_the_bias_out_and_our_commands_read_it(tmp_path, caplog):
    model, ids, before = trained(tmp_path), token_ids(), logging.get_verbosity()
    logging.enable_propagation()
    logging.set_verbosity_warning()
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
        logging.set_verbosity(before)
    assert re.search(rf"{BIAS}.*UNEXPECTED", caplog.text)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    loaded, _ = load_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(layer.bias.any() for layer in moe_layers(loaded))


def test_a_saved_model_is_recorded_by_its_own_rule_after_attach_and_by_the_command(tmp_path, monkeypatch, capsys):
    trained(tmp_path, vocab_size=4096)  # of the tokenizer
    attached = ms.attach(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad(), ms.record(attached, "scores") as rec:
        attached(token_ids())
    assert_derived(rec.trace)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # the progress of saving
    code, out, err = runner(monkeypatch, capsys, trace=trace)("trace", ".", "--text", "To be", "--detail", "scores")
    assert (code, err) == (0, "")
    assert "moesaic steps --trace" in out, "which is offered where the rule is known"
    assert_derived(load("run.safetensors"))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
def test_a_graph_that_was_compiled_before_the_bias_is_made_again():
    model, ids = tiny("qwen3_moe"), token_ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(ids).logits
        balance = BiasBalance(0.1, add_bias=True).attach(model)
        for layer in moe_layers(model):
            layer.bias[:2] = 100.0
        for _ in range(2):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
            assert not torch.allclose(compiled(ids).logits, before)
            balance.detach()  # the second round: that graph is none from before the bias


def trainer_of(model, folder, callback, **kwargs):
    ids = torch.randint(3, 64, (32, 10), generator=torch.Generator().manual_seed(3))
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", save_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-2, **kwargs,
    )  # fmt: skip
    return Trainer(
        model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in ids], callbacks=[callback]
    )


def test_a_trainer_goes_on_from_a_checkpoint_with_the_added_biases(tmp_path):
    whole = tiny("qwen3_moe")
    trainer_of(whole, tmp_path / "whole", BiasBalance(0.05, add_bias=True), max_steps=4).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    # transformers' Trainer (5.23) restores all but the experts, so the model is loaded before
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    restore_bias(again)
    trainer_of(again, tmp_path / "again", BiasBalance(0.05, add_bias=True), max_steps=4).train(str(checkpoint))
    for a, b in zip(moe_layers(whole), moe_layers(again), strict=True):
        assert a.bias.any()
        assert torch.equal(a.bias, b.bias)


def test_a_trainer_puts_the_biases_of_a_checkpoint_into_a_model_without_them(tmp_path):
    trainer_of(tiny("qwen3_moe"), tmp_path, BiasBalance(0.05, add_bias=True), max_steps=2).train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    again = tiny("qwen3_moe")
    trainer = trainer_of(again, tmp_path / "again", BiasBalance({"*": 0.0}, add_bias=True), max_steps=4)
    trainer.train(str(tmp_path / "checkpoint-2"))
    for layer in moe_layers(again):
        assert layer.bias.any()
        assert torch.equal(layer.bias, saved[f"{layer.name}.gate.{BIAS}"])


def test_a_late_callback_with_a_checkpoint_is_told_where_it_belongs(tmp_path):
    model = tiny("qwen3_moe")
    trainer_of(model, tmp_path, BiasBalance(0.05, add_bias=True), max_steps=2).train()
    trainer = trainer_of(tiny("qwen3_moe"), tmp_path, BiasBalance({"*": 0.0}, add_bias=True), max_steps=4)
    late = BiasBalance(0.05, add_bias=True)
    given = {"args": trainer.args, "train_dataset": trainer.train_dataset}
    added = Trainer(model=tiny("qwen3_moe"), **given)
    added.add_callback(late)
    for trainer in (added, Trainer(model_init=lambda: tiny("qwen3_moe"), callbacks=[late], **given)):
        with pytest.raises(ValueError, match=r"use Trainer\(model, callbacks=.*without model_init and add_callback"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
