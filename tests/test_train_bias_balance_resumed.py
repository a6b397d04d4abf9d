"""BiasBalance where training is stopped, skipped, cast or gone on with."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from test_train_bias_balance import STEPS, K, batches, run, small_model, steps_of_a_plain_loop
from transformers import TrainerCallback

from moesaic.hf.modules import moe_layers
from moesaic.train.bias_balance import BiasBalance


class Interrupted(TrainerCallback):
    """Ends training as Ctrl-C or an error does, which the Trainer tells no callback."""

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step == 1:
            raise KeyboardInterrupt


class Late(TrainerCallback):
    """Another callback as add_callback has it: what happens as the Trainer is made passes it by."""

    def __init__(self, callback: TrainerCallback) -> None:
        self.on_train_begin, self.on_train_end = callback.on_train_begin, callback.on_train_end
        self.on_optimizer_step = callback.on_optimizer_step


def biases_of(model) -> list[torch.Tensor]:
    return [layer.bias.clone() for layer in moe_layers(model)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def test_a_trainer_that_was_interrupted_leaves_the_model_to_the_next_one(tmp_path):
    model, left = small_model(), BiasBalance(0.01)
    with pytest.raises(KeyboardInterrupt):
        run(model, left, tmp_path, more=[Interrupted()])
    again = run(model, BiasBalance(0.01), tmp_path)
    assert again.steps == STEPS
    with pytest.raises(ValueError, match="attached to no model"):
        left.step()


def test_two_in_one_trainer_are_refused_and_so_is_one_beside_a_loop_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="two would move each bias twice"):
        run(small_model(), BiasBalance(0.01), tmp_path, more=[BiasBalance(0.01)])
    model = small_model()
    balance = BiasBalance(0.01).attach(model)
    with pytest.raises(ValueError, match="two would move each bias twice"):
        run(model, BiasBalance(0.01), tmp_path)
    balance.detach()


def test_a_copy_of_a_balanced_model_is_balanced_by_itself():
    model = small_model().train()
    balance = BiasBalance(0.01).attach(model)
    other = copy.deepcopy(model)
    apart = BiasBalance(0.01).attach(other)
    (batch,) = batches(1)
    model(input_ids=batch)
    other(input_ids=batch[:1])
    balance.step()
    apart.step()
    assert all(load.sum() == batch.numel() * K for load in balance.load.values())
    assert all(load.sum() == batch[:1].numel() * K for load in apart.load.values())


def test_a_bias_is_resumed_to_the_last_bit_where_the_model_is_in_bfloat16(tmp_path):
    whole = small_model().bfloat16()
    run(whole, BiasBalance(0.0011), tmp_path / "whole", max_steps=2, save_strategy="steps", save_steps=2)
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    again = small_model().bfloat16()
    run(
        again, BiasBalance({"*": 0.0}), tmp_path / "again", max_steps=3,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )  # fmt: skip
    assert same(biases_of(again), biases_of(whole))
    for layer in moe_layers(again):
        bias = saved[f"{layer.name}.gate.e_score_correction_bias"]
        assert torch.equal(layer.bias, bias)
        assert not torch.equal(bias, bias.bfloat16().float()), "what bfloat16 would have lost"


def test_a_late_callback_warns_that_the_bias_of_a_checkpoint_was_rounded(tmp_path):
    run(small_model().bfloat16(), BiasBalance(0.0011), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    late = Late(BiasBalance(0.0011))
    with pytest.warns(UserWarning, match=r"lost their last bits: use Trainer\(model, callbacks="):
        run(
            small_model().bfloat16(), late, tmp_path / "again", max_steps=3,
            resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
        )  # fmt: skip


def test_a_model_that_is_cast_while_it_trains_has_its_bias_in_float32_again():
    model = small_model().train()
    balance = BiasBalance(1e-3).attach(model)
    for layer in moe_layers(model):
        layer.bias.fill_(0.5)
    model.bfloat16()
    (after,) = steps_of_a_plain_loop(model, balance, batches(1))
    for bias in after:
        assert bias.dtype == torch.float32
        assert ((bias - 0.5).abs().sub(1e-3).abs() < 1e-7).any()


def test_going_back_to_a_checkpoint_in_the_midst_of_accumulation_drops_what_was_counted():
    model = small_model().train()
    balance = BiasBalance(0.01).attach(model)
    first, second, third = batches(3)
    steps_of_a_plain_loop(model, balance, [first], lr=0.0)
    saved = balance.state_dict(), copy.deepcopy(model.state_dict())
    model(input_ids=second)
    model(input_ids=third)
    balance.step()
    expected, loads = biases_of(model), balance.load

    balance.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    model(input_ids=second)  # the step begins, and is begun anew
    balance.load_state_dict(saved[0])
    model(input_ids=second)
    model(input_ids=third)
    balance.step()
    assert balance.steps == 2
    assert same(list(balance.load.values()), list(loads.values()))
    assert same(biases_of(model), expected)


def test_the_trainer_is_asked_whether_the_step_was_skipped():
    Accelerator(cpu=True)  # as the Trainer has one; it knows no fp16 on the CPU
    model = small_model().train()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    balance = BiasBalance(0.01)
    balance.on_train_begin(None, None, None, model=model)
    before = model.lm_head.weight.clone()
    scaler.scale(model(input_ids=batches(1)[0]).logits.sum() * float("inf")).backward()
    optimizer.step()
    balance.on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    assert torch.equal(model.lm_head.weight, before)
    assert not any(layer.bias.any() for layer in moe_layers(model))
    optimizer.zero_grad()
    scaler.scale(model(input_ids=batches(1)[0]).logits.sum()).backward()
    optimizer.step()
    balance.on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    assert not torch.equal(model.lm_head.weight, before)
    assert all(load.sum() == batches(1)[0].numel() * K for load in balance.load.values()), "of the second step alone"
    assert all(layer.bias.any() for layer in moe_layers(model))


def test_a_loop_of_ones_own_reads_it_off_the_scale():
    model = small_model().train()
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.1)
    balance = BiasBalance(0.01).attach(model)
    for factor, moved in ((float("inf"), False), (1.0, True)):
        scaler.scale(model(input_ids=batches(1)[0]).logits.sum() * factor).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        balance.step(skipped=scaler.get_scale() < before)
        assert any(layer.bias.any() for layer in moe_layers(model)) == moved
    assert balance.steps == 1


def test_the_trainer_hands_its_own_optimizer_over(tmp_path):
    seen = []

    class Watching(BiasBalance):
        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(kwargs["optimizer"].step_was_skipped)
            super().on_optimizer_step(args, state, control, **kwargs)

    run(small_model(), Watching(0.01), tmp_path)
    assert seen == [False] * STEPS
