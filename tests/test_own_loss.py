"""Models that balance by a loss of their own: whoever adds ours is told what turns theirs off."""

import warnings
from dataclasses import dataclass

import pytest
from balanced import model_of
from test_balance_loss_trainer import rows_of, run_trainer
from transformers import TrainingArguments

import moesaic as ms

BALANCING = {"bias": lambda: ms.BiasBalance(1e-3, add_bias=True), "loss": lambda: ms.BalanceLoss("switch", 0.1)}


@dataclass
class SFTConfig:
    """As in TRL, whose trainers turn the loss on by it."""

    router_aux_loss_coef: float | None = None


def begin(callback, model, args):
    """What is said when training begins."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.on_train_begin(args, None, None, model=model)
    callback.detach()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("balancing", BALANCING)
def test_the_models_own_loss_is_told_where_it_is_on(balancing):
    callback, args = BALANCING[balancing](), TrainingArguments("unused", use_cpu=True)
    model = model_of("qwen3_moe")
    assert not begin(callback, model, args)
    model.config.output_router_logits = True
    assert begin(callback, model, args) == [
        "Qwen3MoeForCausalLM adds a balancing loss of its own, router_aux_loss_coef is 0.001: set "
        "output_router_logits=False in its Qwen3MoeConfig, unless both are meant"
    ]
    model.router_aux_loss_coef = 0.0
    assert not begin(callback, model, args)


@pytest.mark.parametrize("balancing", BALANCING)
def test_with_trl_its_arguments_decide(balancing):
    callback, model = BALANCING[balancing](), model_of("qwen3_moe")
    model.config.router_aux_loss_coef = 0.002
    for on in (False, True):
        model.config.output_router_logits = on  # SFT sets it; DPO, KTO and GRPO ask in each call
        for given, coefficient in ((0.001, 0.001), (None, 0.002)):
            assert begin(callback, model, SFTConfig(given)) == [
                f"Qwen3MoeForCausalLM adds a balancing loss of its own, router_aux_loss_coef is {coefficient}: set "
                "router_aux_loss_coef=0.0 in SFTConfig, unless both are meant"
            ]
        assert not begin(callback, model, SFTConfig(0.0))
    assert not begin(callback, model_of("deepseek_v3"), SFTConfig())  # there is no such loss in its family


def test_the_trainer_says_it_and_z_is_no_balancing_loss(tmp_path):
    with pytest.warns(UserWarning, match="MixtralForCausalLM adds a balancing loss of its own"):
        run_trainer(model_of(output_router_logits=True), tmp_path, rows_of(2), BALANCING["loss"]())
    run_trainer(model_of(output_router_logits=True), tmp_path, rows_of(2), ms.BalanceLoss("z", 0.1))
