"""BiasBalance moves a bias by the sign rule, on the load of the whole optimizer step and of nothing else."""

import warnings

import pytest
import torch
from hf_models import tiny
from torch import nn
from transformers import (
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

import moesaic as ms
from moesaic.hf.modules import moe_layers
from moesaic.layer.balance import nudge_bias
from moesaic.train.bias_balance import BiasBalance
from moesaic.train.counting import counting_loads
from moesaic.train.schedules import fading, frozen_after, warming
from moesaic.train.sizes import tiny_config

E, K, STEPS, ROWS, LENGTH = 32, 4, 3, 4, 12


def small_model() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = tiny_config()
    config.num_hidden_layers, config.vocab_size, config.hidden_size = 3, 64, 32
    return DeepseekV3ForCausalLM(config)


def without_bias() -> nn.Module:
    torch.manual_seed(0)
    return tiny("qwen3_moe")


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Independent(BiasBalance):
    """Also keeps, for every step, the bias before and after and the ids that the routers returned."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.routers = [layer.router for layer in moe_layers(model)]
        self.returned = [[] for _ in self.routers]
        self.log = []
        for router, seen in zip(self.routers, self.returned, strict=True):
            router.register_forward_hook(lambda module, _, output, seen=seen: seen.append((module.training, output[2])))

    def on_optimizer_step(self, args, state, control, **kwargs):
        before = [router.e_score_correction_bias.clone() for router in self.routers]
        super().on_optimizer_step(args, state, control, **kwargs)
        after = [router.e_score_correction_bias.clone() for router in self.routers]
        self.log.append((before, after, list(self.load.values()), [list(seen) for seen in self.returned]))
        for seen in self.returned:
            seen.clear()


def run(model, callback, folder, *, data=None, more=(), resume_from_checkpoint=None, **arguments):
    arguments = {"per_device_train_batch_size": 2, "max_steps": STEPS} | arguments
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"learning_rate": 1e-3, "save_strategy": "no"} | arguments),
    )
    data = data or rows(64)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4], callbacks=[callback, *more])
    trainer.train(resume_from_checkpoint)
    return callback


def counted(ids) -> torch.Tensor:
    return torch.bincount(torch.cat([part.flatten() for part in ids]), minlength=E).double()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_load_is_that_of_all_micro_batches_and_the_bias_moves_by_the_sign_rule(tmp_path, accumulation):
    model = small_model()
    callback = run(model, Independent(model, speed=0.01), tmp_path, gradient_accumulation_steps=accumulation)
    assert len(callback.log) == STEPS
    for before, after, loads, returned in callback.log:
        for bias, moved, load, seen in zip(before, after, loads, returned, strict=True):
            assert len(seen) == accumulation
            assert load.sum() == accumulation * 2 * LENGTH * K
            assert torch.equal(load, counted(ids for _, ids in seen))
            assert torch.equal(moved, bias + 0.01 * torch.sign(load.mean() - load).float())
            assert moved.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_tokens_that_checkpointing_computes_again_count_once(tmp_path, reentrant):
    model = small_model()
    # transformers 5.23 renamed it; both spellings are in the range that moesaic supports.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    callback = run(model, Independent(model, speed=0.01), tmp_path)
    for _, _, loads, returned in callback.log:
        for load, seen in zip(loads, returned, strict=True):
            assert len(seen) == 2  # the router did run twice
            assert torch.equal(load, counted([seen[0][1]]))


def test_evaluation_between_steps_does_not_count(tmp_path):
    model = small_model()
    callback = run(model, Independent(model, speed=0.01), tmp_path, eval_strategy="steps", eval_steps=1)
    assert any(not training for *_, returned in callback.log for seen in returned for training, _ in seen)
    for *_, loads, _ in callback.log:
        assert all(load.sum() == 2 * LENGTH * K for load in loads)


def test_padding_does_not_count(tmp_path):
    model = small_model()
    mask = torch.ones(LENGTH, dtype=torch.long)
    mask[-5:] = 0
    data = [row | {"attention_mask": mask} for row in rows(64)]
    callback = run(model, Independent(model, speed=0.01), tmp_path, data=data)
    for _, _, loads, returned in callback.log:
        for load, seen in zip(loads, returned, strict=True):
            real = seen[0][1].reshape(2, LENGTH, K)[:, : LENGTH - 5]
            assert torch.equal(load, counted([real]))


def test_centring_keeps_the_mean_at_zero_and_changes_no_difference(tmp_path):
    plain, centred = small_model(), small_model()
    run(plain, BiasBalance(0.01), tmp_path)
    run(centred, BiasBalance(0.01, rule="centred"), tmp_path)
    for a, b in zip(moe_layers(plain), moe_layers(centred), strict=True):
        a, b = a.router.e_score_correction_bias, b.router.e_score_correction_bias
        assert b.mean().abs() < 1e-8
        torch.testing.assert_close(a - a.mean(), b, rtol=0, atol=1e-7)


def test_hooks_are_gone_after_training_and_after_an_error(tmp_path):
    model = small_model()
    layers = moe_layers(model)
    run(model, BiasBalance(0.01), tmp_path)
    assert not model._forward_pre_hooks
    assert not any(layer.experts._forward_pre_hooks for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), counting_loads(model, training=False):
        raise RuntimeError("stop")
    assert not any(layer.experts._forward_pre_hooks for layer in layers)


def test_a_fading_speed_is_constant_then_falls_to_zero():
    speed = fading(1e-3, start=0.5)
    assert [speed(progress) for progress in (0, 0.5, 0.75, 1)] == pytest.approx([1e-3, 1e-3, 5e-4, 0])


def test_schedules_begin_and_end_where_they_say():
    warm = warming(1e-3, 0.2)
    assert [warm(progress) for progress in (0, 0.1, 0.2, 1)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    recipe = frozen_after(1e-3, 14.3 / 14.8)  # DeepSeek-V3
    assert [recipe(tokens / 14.8) for tokens in (0, 14.2, 14.4, 14.8)] == [1e-3, 1e-3, 0, 0]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_of_training_that_is_none_is_refused(share):
    for schedule in (frozen_after, warming):
        with pytest.raises(ValueError, match=f"share={share} is no share of training: use a number above 0"):
            schedule(1e-3, share)
    start = 1.0 if share == 0 else share
    with pytest.raises(ValueError, match=f"start={start} is no share of training .*: use 0 to below 1"):
        fading(1e-3, start=start)


def test_a_schedule_that_gives_no_speed_is_refused_before_any_bias_moves():
    model = small_model().train()
    balance = BiasBalance({"model.layers.1.*": 0.01, "*": lambda _progress: -1.0}).attach(model)
    with pytest.raises(ValueError, match=r"speed=-1\.0 is no speed"):
        steps_of_a_plain_loop(model, balance, batches(1))
    assert not any(layer.bias.any() for layer in moe_layers(model))


def test_a_speed_of_zero_freezes_the_bias(tmp_path):
    model = small_model()
    callback = run(model, Independent(model, speed=lambda progress: 0.01 if progress == 0 else 0.0), tmp_path)
    first = callback.log[0][1]
    assert all(bias.any() for bias in first)
    for before, after, _, _ in callback.log[1:]:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_models_and_biases_that_cannot_be_balanced_are_refused(tmp_path):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no router with a selection bias .*add_bias=True"):
        run(MixtralForCausalLM(config), BiasBalance(), tmp_path)
    with pytest.raises(ValueError, match="Linear has no module with a gate and fused experts"):
        BiasBalance().attach(nn.Linear(2, 2))
    for speed in (-0.1, float("nan"), float("inf"), "0.001", None):
        with pytest.raises(ValueError, match=f"speed={speed!r} is no speed: use a positive number"):
            BiasBalance(speed)
        with pytest.raises(ValueError, match=f"speed={speed!r} is no speed: use a positive number"):
            BiasBalance({"*": speed})
    with pytest.raises(ValueError, match="speed=0 moves no bias: use a positive number"):
        BiasBalance(0.0)
    for rule in ("pid", None, 3):
        with pytest.raises(ValueError, match=f"rule={rule!r} is unknown: use sign, centred, proportional"):
            BiasBalance(rule=rule)
    with pytest.raises(ValueError, match="total_steps=0 is no length of training"):
        BiasBalance(total_steps=0)
    with pytest.raises(ValueError, match="attached to no model"):
        BiasBalance().step()
    model = small_model()
    first = BiasBalance().attach(model)
    with pytest.raises(ValueError, match="balanced by another BiasBalance already"):
        BiasBalance().attach(model)
    first.detach()
    BiasBalance().attach(model).detach()
    with pytest.raises(ValueError, match=r"no speed fits layer 'model\.layers\.1\.mlp': add '\*'"):
        BiasBalance({"model.layers.2.*": 0.1}).attach(model)
    assert not hooked(model)


def hooked(model: nn.Module) -> list[str]:
    """Modules with anything of ours still on them."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or any("_moesaic" in key for key in vars(module))
    ]


def steps_of_a_plain_loop(model, balance, batches, *, lr=1e-2, **kwargs):
    """Train by hand, one optimizer step a batch; returns the biases after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    biases = []
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step(**kwargs)
        biases.append([layer.bias.clone() for layer in moe_layers(model)])
    return biases


def batches(count: int, *, rows: int = 2) -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (count, rows, LENGTH), generator=torch.Generator().manual_seed(2)))


def test_a_plain_loop_moves_the_bias_as_the_trainer_does(tmp_path):
    by_trainer, by_hand = small_model(), small_model()
    data = rows(6)
    args = {"max_steps": 3, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "optim": "sgd"}
    run(by_trainer, BiasBalance(0.01), tmp_path, data=data, lr_scheduler_type="constant", **args)
    stacked = torch.stack([row["input_ids"] for row in data]).view(3, 2, LENGTH)
    by_hand.train()
    steps_of_a_plain_loop(by_hand, BiasBalance(0.01).attach(by_hand), stacked, lr=1e-3)
    for a, b in zip(moe_layers(by_trainer), moe_layers(by_hand), strict=True):
        assert torch.equal(a.bias, b.bias)
        assert a.bias.any()


def fail(*_):
    raise RuntimeError("late")


def test_forwards_that_do_not_train_do_not_count(monkeypatch):
    model = small_model().train()
    balance = BiasBalance(0.01).attach(model)
    (batch,) = batches(1)
    with torch.no_grad():
        model(input_ids=batch)  # a rollout in training mode
    model.eval()
    model(input_ids=batch)
    model.train()
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", fail)
        with pytest.raises(RuntimeError, match="late"):
            model(input_ids=batch)  # all layers ran, the forward failed
    model(input_ids=batch).logits.sum().backward()
    balance.step()
    assert all(load.sum() == batch.numel() * K for load in balance.load.values())


def test_a_step_without_a_token_warns_and_moves_nothing():
    model = small_model().eval()
    balance = BiasBalance(0.01).attach(model)
    model(input_ids=batches(1)[0])
    with pytest.warns(UserWarning, match="counted no token in step 1: .* in training mode"):
        balance.step()
    assert not any(layer.bias.any() for layer in moe_layers(model))


def test_steps_without_a_token_warn_once_each_time_that_they_begin():
    model = small_model()
    balance = BiasBalance(0.01).attach(model)
    ids = batches(1)[0]
    warned = []
    for step, training in enumerate([True, False, False, True, False, False], 1):
        model.train(training)(input_ids=ids)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")  # which shows one text of one place once
            balance.step()
        warned += [(step, str(warning.message).split(":")[0]) for warning in found]
    assert warned == [(step, f"BiasBalance counted no token in step {step}") for step in (2, 5)]


def test_what_a_skipped_step_counted_is_dropped():
    model = small_model().train()
    balance = BiasBalance(0.01).attach(model)
    first, second = batches(2)
    steps_of_a_plain_loop(model, balance, [first], lr=0.0, skipped=True)
    assert not any(layer.bias.any() for layer in moe_layers(model))
    assert balance.steps == 0
    steps_of_a_plain_loop(model, balance, [second], lr=0.0)
    assert all(load.sum() == second.numel() * K for load in balance.load.values())


def test_a_bias_in_bfloat16_becomes_float32_and_small_steps_arrive():
    model = small_model().bfloat16().train()
    for layer in moe_layers(model):
        home = layer.home
        home.put(torch.full_like(home.bias, 0.5))
        assert home.bias.dtype == torch.bfloat16
    balance = BiasBalance(1e-3).attach(model)
    (after,) = steps_of_a_plain_loop(model, balance, batches(1))
    for bias in after:
        assert bias.dtype == torch.float32
        moved = (bias - 0.5).abs()
        assert ((moved - 1e-3).abs() < 1e-7).logical_or(moved == 0).all()
        assert moved.any()


def test_layers_have_speeds_of_their_own_and_rules_may_be_functions():
    model = small_model().train()
    speeds = {"model.layers.1.*": 0.5, "*": lambda progress: 0.25 * progress}
    seen = []

    def rule(bias, load, *, speed):
        seen.append(speed)
        return nudge_bias(bias, load, speed=speed)

    balance = BiasBalance(speeds, rule=rule, total_steps=4).attach(model)
    steps_of_a_plain_loop(model, balance, batches(3))
    assert seen == [0.5, 0.0, 0.5, 0.0625, 0.5, 0.125]


def test_the_step_number_of_a_schedule_is_saved_and_resumed():
    model = small_model().train()
    balance = BiasBalance(frozen_after(0.01, 0.5), total_steps=4).attach(model)
    steps_of_a_plain_loop(model, balance, batches(2))
    again = BiasBalance(frozen_after(0.01, 0.5), total_steps=4)
    again.load_state_dict(balance.state_dict())
    balance.detach()
    before = [layer.bias.clone() for layer in moe_layers(model)]
    steps_of_a_plain_loop(model, again.attach(model), batches(1))
    assert all(torch.equal(a, layer.bias) for a, layer in zip(before, moe_layers(model), strict=True)), "frozen by now"


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
@pytest.mark.parametrize(("when", "make"), [("before", small_model), ("after", small_model), ("before", without_bias)])
def test_a_compiled_model_is_counted_too(when, make):
    plain, compiled = make().train(), make().train()
    steps = batches(2)
    expected = steps_of_a_plain_loop(plain, BiasBalance(0.01, add_bias=True).attach(plain), steps)
    assert all(bias.any() for bias in expected[-1])
    runs = torch.compile(compiled, backend="aot_eager") if when == "before" else compiled
    balance = BiasBalance(0.01, add_bias=True).attach(compiled)
    runs = torch.compile(compiled, backend="aot_eager") if when == "after" else runs
    found = steps_of_a_plain_loop(runs, balance, steps)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_our_own_layers_are_balanced_alike():
    config = ms.MoEConfig(
        hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, scoring_func="sigmoid",
        topk_method="noaux_tc",
    )  # fmt: skip
    torch.manual_seed(0)
    layer = ms.DeepseekV3MoE(config).train()
    balance = ms.BiasBalance(0.01).attach(layer)
    x = torch.randn(50, 16)
    ids = layer.gate(x).expert_ids
    layer(x).sum().backward()
    balance.step()
    load = torch.bincount(ids.flatten(), minlength=8).double()
    assert torch.equal(next(iter(balance.load.values())), load)
    assert torch.equal(layer.gate.e_score_correction_bias, 0.01 * (load.mean() - load).sign().float())


def test_a_bias_that_is_a_parameter_of_shape_1_by_e_moves_in_place():
    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, moe_num_experts=8, moe_k=2, moe_layer_start_index=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(config).train()
    assert moe_layers(model)[0].home.bias.shape == (1, 8)
    balance = BiasBalance(0.01).attach(model)
    steps_of_a_plain_loop(model, balance, batches(1))
    for layer, load in zip(moe_layers(model), balance.load.values(), strict=True):
        assert torch.equal(layer.bias, 0.01 * (load.mean() - load).sign().float())
        assert layer.bias.any()


def max_vio(model, ids) -> float:
    """The worst layer's busiest expert over the mean, less 1."""
    model.eval()
    with torch.no_grad(), counting_loads(model, training=False) as counter:
        model(ids)
        loads = counter.take().values()
    model.train()
    return max(float(load.max() / load.mean() - 1) for load in loads)


@pytest.mark.parametrize("loop", ["trainer", "plain"])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_balance_is_reached(tmp_path, family, loop):
    torch.manual_seed(0)
    model = tiny(family)
    ids = torch.randint(3, 12, (32, 32))  # few tokens, so that few experts are liked
    before = max_vio(model, ids)
    balance = BiasBalance(fading(0.02), add_bias=family == "qwen3_moe", total_steps=60)
    if loop == "trainer":
        data = [{"input_ids": row, "labels": row} for row in ids]
        run(model, balance, tmp_path, data=data, max_steps=60, per_device_train_batch_size=32, learning_rate=1e-4)
    else:
        model.train()
        steps_of_a_plain_loop(model, balance.attach(model), [ids] * 60, lr=1e-3)
        balance.detach()
    assert before > 1.0
    assert max_vio(model, ids) < 0.25


def test_counts_of_a_long_step_stay_exact():
    model = small_model().train()
    balance = BiasBalance(0.01).attach(model)
    counter, (name, *_) = balance._counter, balance._homes
    for load in (2.0**24, 1.0):
        running = counter._threads.here
        running.pending.append((name, torch.full((E,), load)))  # as forwards of so many tokens leave it
        counter._settle(running)
    assert set(counter.take()[name].tolist()) == {2.0**24 + 1}, "float32 has no such number"


def test_a_part_that_runs_alone_says_itself_whether_it_trains():
    model = small_model().train()
    block = moe_layers(model)[0].block
    balance = BiasBalance(0.01).attach(model)
    hidden = torch.randn(1, 7, model.config.hidden_size)
    block.eval()
    block(hidden)
    block.train()
    block(hidden[:, :3])
    balance.step()
    assert balance.load[moe_layers(model)[0].name].sum() == 3 * K


def test_a_trainer_that_goes_on_takes_the_schedule_where_it_was(tmp_path):
    progress = []

    def speed(done: float) -> float:
        progress.append(done)
        return 0.01

    model = small_model()
    run(model, BiasBalance(speed), tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    before, progress[:] = sorted(set(progress)), []
    checkpoint = str(tmp_path / "checkpoint-2")
    run(small_model(), BiasBalance(speed), tmp_path / "again", max_steps=4, resume_from_checkpoint=checkpoint)
    assert before == [0.0, 0.25, 0.5, 0.75]
    assert sorted(set(progress)) == [0.5, 0.75]
