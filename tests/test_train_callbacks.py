"""BiasBalance moves a bias by the sign rule, on the load of the whole optimizer step and of nothing else."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from moesaic.train.callbacks import BiasBalance, fading
from moesaic.train.routers import balanced_layers, counting_loads
from moesaic.train.tiny import tiny_config

E, K, STEPS, ROWS, LENGTH = 32, 4, 3, 4, 12


def small_model() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = tiny_config()
    config.num_hidden_layers, config.vocab_size, config.hidden_size = 3, 64, 32
    return DeepseekV3ForCausalLM(config)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Independent(BiasBalance):
    """Also keeps, for every step, the bias before and after and the ids that the routers returned."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.routers = [layer.router for layer in balanced_layers(model).values()]
        self.returned = [[] for _ in self.routers]
        self.steps = []
        for router, seen in zip(self.routers, self.returned, strict=True):
            router.register_forward_hook(lambda module, _, output, seen=seen: seen.append((module.training, output[2])))

    def on_optimizer_step(self, args, state, control, **kwargs):
        before = [router.e_score_correction_bias.clone() for router in self.routers]
        super().on_optimizer_step(args, state, control, **kwargs)
        after = [router.e_score_correction_bias.clone() for router in self.routers]
        self.steps.append((before, after, list(self.load.values()), [list(seen) for seen in self.returned]))
        for seen in self.returned:
            seen.clear()


def run(model, callback, folder, *, data=None, **arguments):
    arguments = {"per_device_train_batch_size": 2, "max_steps": STEPS} | arguments
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
        dataloader_pin_memory=False,
        **arguments,
    )
    data = data or rows(64)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4], callbacks=[callback])
    trainer.train()
    return callback


def counted(ids) -> torch.Tensor:
    return torch.bincount(torch.cat([part.flatten() for part in ids]), minlength=E).float()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_load_is_that_of_all_micro_batches_and_the_bias_moves_by_the_sign_rule(tmp_path, accumulation):
    model = small_model()
    callback = run(model, Independent(model, speed=0.01), tmp_path, gradient_accumulation_steps=accumulation)
    assert len(callback.steps) == STEPS
    for before, after, loads, returned in callback.steps:
        for bias, moved, load, seen in zip(before, after, loads, returned, strict=True):
            assert len(seen) == accumulation
            assert load.sum() == accumulation * 2 * LENGTH * K
            assert torch.equal(load, counted(ids for _, ids in seen))
            assert torch.equal(moved, bias + 0.01 * torch.sign(load.mean() - load))
            assert moved.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_tokens_that_checkpointing_computes_again_count_once(tmp_path, reentrant):
    model = small_model()
    # transformers 5.23 renamed it; both spellings are in the range that moesaic supports.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    callback = run(model, Independent(model, speed=0.01), tmp_path)
    for _, _, loads, returned in callback.steps:
        for load, seen in zip(loads, returned, strict=True):
            assert len(seen) == 2  # the router did run twice
            assert torch.equal(load, counted([seen[0][1]]))


def test_evaluation_between_steps_does_not_count(tmp_path):
    model = small_model()
    callback = run(model, Independent(model, speed=0.01), tmp_path, eval_strategy="steps", eval_steps=1)
    assert any(not training for *_, returned in callback.steps for seen in returned for training, _ in seen)
    for *_, loads, _ in callback.steps:
        assert all(load.sum() == 2 * LENGTH * K for load in loads)


def test_padding_does_not_count(tmp_path):
    model = small_model()
    mask = torch.ones(LENGTH, dtype=torch.long)
    mask[-5:] = 0
    data = [row | {"attention_mask": mask} for row in rows(64)]
    callback = run(model, Independent(model, speed=0.01), tmp_path, data=data)
    for _, _, loads, returned in callback.steps:
        for load, seen in zip(loads, returned, strict=True):
            real = seen[0][1].reshape(2, LENGTH, K)[:, : LENGTH - 5]
            assert torch.equal(load, counted([real]))


def test_centring_keeps_the_mean_at_zero_and_changes_no_difference(tmp_path):
    plain, centred = small_model(), small_model()
    run(plain, BiasBalance(0.01), tmp_path)
    run(centred, BiasBalance(0.01, centred=True), tmp_path)
    for a, b in zip(balanced_layers(plain).values(), balanced_layers(centred).values(), strict=True):
        a, b = a.router.e_score_correction_bias, b.router.e_score_correction_bias
        assert b.mean().abs() < 1e-8
        torch.testing.assert_close(a - a.mean(), b, rtol=0, atol=1e-7)


def test_hooks_are_gone_after_training_and_after_an_error(tmp_path):
    model = small_model()
    layers = balanced_layers(model).values()
    run(model, BiasBalance(0.01), tmp_path)
    assert not model._forward_pre_hooks
    assert not any(layer.experts._forward_pre_hooks for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), counting_loads(model, training=False):
        raise RuntimeError("stop")
    assert not any(layer.experts._forward_pre_hooks for layer in layers)


def test_a_fading_speed_is_constant_then_falls_to_zero():
    speed = fading(1e-3, start=0.5)
    assert [speed(progress) for progress in (0, 0.5, 0.75, 1)] == pytest.approx([1e-3, 1e-3, 5e-4, 0])


def test_a_speed_of_zero_freezes_the_bias(tmp_path):
    model = small_model()
    callback = run(model, Independent(model, speed=lambda progress: 0.01 if progress == 0 else 0.0), tmp_path)
    first = callback.steps[0][1]
    assert all(bias.any() for bias in first)
    for before, after, _, _ in callback.steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_models_and_biases_that_cannot_be_balanced_are_refused(tmp_path):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="MixtralForCausalLM has no router with a buffer e_score_correction_bias"):
        run(MixtralForCausalLM(config), BiasBalance(), tmp_path)
    with pytest.raises(ValueError, match="Linear has no router"):
        balanced_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"speed=-0\.1 would drive experts apart"):
        BiasBalance(-0.1)
    with pytest.raises(ValueError, match=r"e_score_correction_bias is torch\.bfloat16, where steps of 0\.001 are lost"):
        run(small_model().bfloat16(), BiasBalance(), tmp_path)
