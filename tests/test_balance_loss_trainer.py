"""BalanceLoss as a callback of transformers' Trainer."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from balanced import ALPHA, OPTIONS, attached, batch_of, explicit, hooked, model_of
from hf_models import tiny, token_ids
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import moesaic as ms
from moesaic.hf.modules import moe_layers
from moesaic.train.balance_loss import BalanceLoss
from moesaic.train.balance_operators import _share


def run_trainer(model, folder, data, balance=None, *, kind=Trainer, **arguments):
    arguments = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1} | arguments
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = kind(
        model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=[balance] if balance else []
    )
    trainer.train()
    return model


class Interrupted(Trainer):
    """Its first step ends as by Ctrl-C, which the Trainer tells no callback."""

    def training_step(self, *_args, **_kwargs):
        raise KeyboardInterrupt


def rows_of(count, length=8):
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("kind", ["sequence", "z"])
def test_the_trainer_accumulates_to_the_same_step_as_one_large_batch(tmp_path, kind):
    """It divides by the tokens of the whole batch, not by the number of micro-batches: 1, 2 and 4 rows at a time."""
    plain = run_trainer(model_of(), tmp_path, rows_of(4), per_device_train_batch_size=4)
    moved = []
    for size in (4, 2, 1):
        balance = BalanceLoss(kind, ALPHA, **OPTIONS.get(kind, {}))
        model = run_trainer(
            model_of(), tmp_path, rows_of(4), balance,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        assert not hooked(model)
        moved.append(dict(model.named_parameters()))
    gate = "model.layers.1.mlp.gate.weight"
    assert (moved[0][gate] - dict(plain.named_parameters())[gate]).abs().max() > 1e-4
    for name, parameter in moved[0].items():
        for other in moved[1:]:
            torch.testing.assert_close(parameter, other[name], rtol=0, atol=1e-7)  # its loss is float32


def test_a_trainer_that_was_interrupted_leaves_the_model_to_the_next_one(tmp_path):
    """Whatever kind of loss that one has: the old loss is no part of its gradient."""
    model, left = model_of(), [BalanceLoss(kind, ALPHA) for kind in ("switch", "z")]
    for balance in left:
        with pytest.raises(KeyboardInterrupt):
            run_trainer(model, tmp_path, rows_of(2), balance, kind=Interrupted)
    again, expected = (run_trainer(m, tmp_path, rows_of(2), BalanceLoss("z", ALPHA)) for m in (model, model_of()))
    assert not hooked(again)
    for one, other in zip(again.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="attached to no model"):
        left[1].step()


def test_a_trainer_that_was_interrupted_and_is_dropped_takes_its_loss_with_it(tmp_path):
    """So that training without one goes on as if it had never been, and the model may go too."""
    model = model_of()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_trainer(model, tmp_path, rows_of(2), BalanceLoss("switch", ALPHA), kind=Interrupted)
        gc.collect()
        assert not hooked(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_trainer_leaves_a_loss_of_ones_own_loop_alone_and_refuses_a_second_of_its_kind(tmp_path):
    model = model_of()
    balance = attached("switch", model)
    run_trainer(model, tmp_path, rows_of(2), BalanceLoss("z", ALPHA))
    balance.step()
    with pytest.raises(ValueError, match="has a BalanceLoss of kind 'switch' already"):
        run_trainer(model, tmp_path, rows_of(2), BalanceLoss("switch", ALPHA))


def test_micro_batches_weigh_by_their_labels(tmp_path):
    """Under the Trainer a micro-batch with a third of the labels counts a third, for the task and for balance."""
    data = rows_of(2)
    data[0]["labels"] = data[0]["labels"].clone()
    data[0]["labels"][:4] = -100  # the loss counts 4 labels of row 0 and 7 of row 1
    balance = BalanceLoss("z", ALPHA)
    found = run_trainer(
        model_of(), tmp_path, data, balance, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    model = model_of()
    for row, share in zip(data, (4 / 11, 7 / 11), strict=True):
        batch = {name: value[None] for name, value in row.items()} | {"attention_mask": torch.ones(1, 8)}
        (explicit(model, batch, "z")[1] * share).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for (name, one), other in zip(found.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=name)


def test_a_decoder_beside_an_encoder_is_given_its_labels_shifted_so_that_all_of_them_count():
    config = hf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_heads=2,
        num_experts=4, num_decoder_layers=2, num_sparse_decoder_layers=1,
    )  # fmt: skip
    labels = token_ids(2, 8)
    given = {"labels": labels, "num_items_in_batch": labels.numel()}
    assert _share(hf.SwitchTransformersForConditionalGeneration(config), (), given) == 1
    assert _share(model_of(), (), given) == 14 / 16


class Outside(Trainer):
    """The loss is computed outside of the model, a mean of the micro-batch, and a reference runs beside: as in DPO."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ARG002
        labels = inputs.pop("labels")
        output = model(**inputs)
        with torch.no_grad():
            model(inputs["input_ids"].flip(0), attention_mask=torch.ones_like(inputs["input_ids"]).tril())
        loss = ForCausalLMLoss(output.logits, labels, 64)
        return (loss, output) if return_outputs else loss


def balanced(kind, balance, *, divided):
    """The trainer of the page on fine-tuning. divided: its loss is divided by accumulation already."""

    class Balanced(kind):
        def compute_loss(self, model, *args, **kwargs):
            loss = super().compute_loss(model, *args, **kwargs)
            share = 1 / self.current_gradient_accumulation_steps if divided else None
            return balance(loss, share=share) if model.training else loss

    return Balanced


@pytest.mark.parametrize(("outside", "fields"), [(Outside, {}), (Trainer, {"label_smoothing_factor": 0.1})])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_whose_loss_is_outside_of_the_model_names_it(tmp_path, outside, fields, checkpointing):
    def step_of(model, kind, balance, **arguments):
        arguments = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1} | fields | arguments
        return dict(run_trainer(model, tmp_path, rows_of(4), balance, kind=kind, **arguments).named_parameters())

    with pytest.raises(ValueError, match="in a Trainer at the end of a compute_loss of your own"):
        step_of(model_of(), outside, BalanceLoss("z", ALPHA))
    plain = step_of(model_of(), outside, None)
    moved = []
    for size in (4, 2):
        balance = BalanceLoss("z", ALPHA)
        kind = balanced(outside, balance, divided=bool(fields))
        model = model_of()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        moved.append(step_of(model, kind, balance, **sizes))
    within = step_of(model_of(), Trainer, BalanceLoss("z", ALPHA), label_smoothing_factor=0.0)
    gate = "model.layers.1.mlp.gate.weight"
    assert (moved[0][gate] - plain[gate]).abs().max() > 1e-4
    for name, parameter in moved[0].items():
        torch.testing.assert_close(parameter, moved[1][name], rtol=0, atol=1e-7)
        if outside is Outside:
            torch.testing.assert_close(parameter, within[name], rtol=0, atol=1e-7)


class Fused(Trainer):
    """The loss is made of the log-probability of each label, a sum over the whole batch: as in TRL's SFT."""

    loss_type = "nll"

    def __init__(self, model, args, **kwargs):
        args.loss_type, args.remove_unused_columns = self.loss_type, False
        self.forward, model.forward = model.forward, self.log_probs_of
        super().__init__(model, args, **kwargs)

    def log_probs_of(self, *args, labels, **kwargs):
        logits, labels = self.forward(*args, **kwargs).logits[:, :-1].float(), labels[:, 1:]
        mask = labels != -100
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
        return FusedOutput(loss=-log_probs.sum() / mask.sum(), log_probs=log_probs, label_mask=mask)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        loss = -output.log_probs.sum() / num_items_in_batch
        return (loss, output) if return_outputs else loss


@dataclass
class FusedOutput(hf.utils.ModelOutput):
    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_that_sums_log_probs_balances_as_the_models_own(tmp_path, checkpointing):
    """Its scale is what their gradients add up to: a micro-batch with few labels counts less."""
    data = rows_of(4)
    data[0]["labels"] = data[0]["labels"].clone()
    data[0]["labels"][:4] = -100
    for size in (4, 2):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        expected, model = model_of(), model_of()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        run_trainer(expected, tmp_path, data, BalanceLoss("z", ALPHA), **sizes)
        run_trainer(model, tmp_path, data, BalanceLoss("z", ALPHA), kind=Fused, **sizes)
        for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=name)


def test_a_loop_after_such_a_trainer_has_the_models_own_loss(tmp_path):
    model, balance = model_of(), BalanceLoss("z", ALPHA)
    run_trainer(model, tmp_path, rows_of(2), balance, kind=Fused)
    balance.attach(model)
    model(**batch_of()).loss.backward()
    balance.step()
    assert len(balance.values) == len(moe_layers(model))
    balance.detach()


def test_log_probs_that_a_loss_weights_are_no_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(Fused, "loss_type", "dft")
    with pytest.raises(ValueError, match=r"with share=1 / self\.current_gradient_accumulation_steps where"):
        run_trainer(model_of(), tmp_path, rows_of(2), BalanceLoss("z", ALPHA), kind=Fused)


def test_a_call_that_hides_its_labels_is_an_error():
    model, batch = model_of(), batch_of()
    attached("switch", model)
    loss = model(**batch, num_items_in_batch=torch.tensor(60)).loss
    loss.backward()
    del batch["attention_mask"]

    class Hiding(nn.Module):
        def forward(self, input_ids, **_kwargs):
            return model(input_ids, labels=input_ids)

    hiding = Hiding()
    hiding.model = model
    balance = BalanceLoss("z", 0.1).attach(hiding)
    with pytest.raises(ValueError, match="num_items_in_batch and without labels, so its part of the batch"):
        hiding(batch["input_ids"], num_items_in_batch=60)
    balance.detach()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_moe"])
def test_the_trainer_brings_max_vio_down(tmp_path, family):
    def violation(model):
        """Of the worst layer."""
        with ms.record(model) as rec, torch.no_grad():
            model.eval()(ids)
        loads = [
            torch.bincount(torch.as_tensor(x).flatten(), minlength=n_experts) for x in rec.trace.to_arrays()["picks"]
        ]
        return max((load.max() / load.double().mean() - 1).item() for load in loads)

    fields = {"n_group": 1, "topk_group": 1} if family != "qwen3_moe" else {}
    model, ids = tiny(family, **fields), token_ids(16, 16)
    n_experts = moe_layers(model)[0].config.n_routed_experts
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.02  # what all tokens share makes some experts liked by nature
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    before = violation(model)
    balance = BalanceLoss("switch", 3.0)
    run_trainer(model.train(), tmp_path, rows_of(80, 16), balance, max_steps=40, per_device_train_batch_size=8)
    assert violation(model) < 0.5 * before
    assert set(balance.values) == {layer.name for layer in moe_layers(model)}
