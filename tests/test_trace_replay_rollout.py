"""Training on the experts that an engine chose: a record of its rollouts replayed in a forward of the model."""

import base64
import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cases import v3
from foreign import imported
from hf_models import tiny, token_ids
from torch.nn import functional

from moesaic.hf.modules import moe_layers
from moesaic.layer.moe import DeepseekV3MoE
from moesaic.trace.depth import same_layers
from moesaic.trace.imports import read_target
from moesaic.trace.recording.record import record
from moesaic.trace.reroute.replay import replay

LENGTHS = (6, 9, 4, 8)  # of the texts; an engine routes one token less
OPTIONS = {"last_unrecorded": True}


def rollouts(seed: int = 0) -> list[np.ndarray]:
    """What an engine chose, [tokens, 3 layers, 2 of 8 experts] for each text: not what the model would."""
    rng = np.random.default_rng(seed)
    return [rng.random((length - 1, 3, 8)).argsort(-1)[:, :, :2].astype(np.uint8) for length in LENGTHS]


@pytest.fixture
def model():
    return tiny("qwen3_moe")


@pytest.fixture
def trace(model, tmp_path):
    """The arrays as vLLM's, saved and imported."""
    files = [tmp_path / f"{index}.npy" for index in range(len(LENGTHS))]
    for file, array in zip(files, rollouts(), strict=True):
        np.save(file, array)
    model.config.save_pretrained(tmp_path)
    return imported("vllm", files, read_target(str(tmp_path)))[0]


def batch_of(rows: list[int], side: str = "right") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A padded batch of these texts, and their experts, [3 layers, rows * length, 2], -1 where no engine chose."""
    length = max(LENGTHS[row] for row in rows)
    ids, mask = token_ids(len(rows), length), torch.zeros(len(rows), length, dtype=torch.long)
    picks = torch.full((len(rows), length, 3, 2), -1)
    for index, row in enumerate(rows):
        start = length - LENGTHS[row] if side == "left" else 0
        mask[index, start : start + LENGTHS[row]] = 1
        picks[index, start : start + LENGTHS[row] - 1] = torch.from_numpy(rollouts()[row].astype(np.int64))
    return {"input_ids": ids, "attention_mask": mask}, picks.flatten(0, 1).transpose(0, 1)


def forced(model, picks):
    """The model with these experts by plain operations, and its own top-k where they are -1."""
    model = copy.deepcopy(model)
    for layer, ids in zip(moe_layers(model), picks, strict=True):

        def forward(x, router=layer.router, ids=ids):
            logits = functional.linear(x.flatten(0, -2), router.weight)
            scores = logits.softmax(-1)
            chosen = torch.where(ids < 0, scores.topk(2).indices, ids)
            weights = scores.gather(-1, chosen)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        layer.router.forward = forward
    return model


def checkpoint_layers(model) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def trained(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of all tokens that are none of the padding, and the gradients of a loss on them."""
    logits = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_imported_rollout_is_trained_on_in_a_shuffled_padded_batch(model, trace, side, checkpointed):
    assert trace.layers == ("layers.0", "layers.1", "layers.2")  # vLLM's numbers are all that it has
    rows = [3, 0, 1]
    batch, picks = batch_of(rows, side)
    expected, gradients = trained(forced(model, picks).train(), batch)
    model.train()
    if checkpointed:
        checkpoint_layers(model)
    with replay(model, trace, sequences=rows, **OPTIONS) as replayer:
        logits, found = trained(model, batch)
    assert replayer.tokens == sum(LENGTHS[row] - 1 for row in rows)
    torch.testing.assert_close(logits, expected)
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in moe_layers(model))
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_block_takes_several_batches_and_a_sequence_more_than_once(model, trace):
    plain = copy.deepcopy(model)
    with replay(model, trace, sequences=torch.tensor([2, 1, 1, 0]), **OPTIONS), torch.no_grad():
        for rows in ([2, 1], [1], [0]):
            batch, picks = batch_of(rows)
            mask = batch["attention_mask"].bool()
            torch.testing.assert_close(model(**batch).logits[mask], forced(plain, picks)(**batch).logits[mask])
        with pytest.raises(ValueError, match="sequences= names 4 and the model begins another: name every row's"):
            model(**batch)


@pytest.mark.parametrize("cut", [slice(3, None), slice(0, 6)], ids=["left", "right"])
def test_a_text_that_was_cut_is_refused_at_the_end_unless_its_record_is_cut_too(model, trace, cut):
    """At the left its tokens got the experts of others, and nothing in the forward could tell."""
    ids = token_ids(1, LENGTHS[1])[:, cut]
    message = "sequence 1 of the trace has 8 tokens and the model ran 6 of it: cut the record as the text was cut"
    with pytest.raises(ValueError, match=message), replay(model, trace, sequences=[1], **OPTIONS), torch.no_grad():
        model(input_ids=ids)
    place = torch.arange(len(trace)) - int((trace.sequences < 1).sum())
    part = trace.select((trace.sequences == 1) & (place >= (cut.start or 0)) & (place < (cut.stop or 8)))
    with replay(model, part, sequences=[1], **OPTIONS) as replayer, torch.no_grad():
        model(input_ids=ids)
    assert replayer.tokens == len(part)


@pytest.mark.parametrize("options", [{"sequences": [0, 1, 2]}, {}], ids=["named", "all"])
def test_a_text_that_was_asked_for_and_did_not_run_is_told_unless_an_error_ends_the_block(model, trace, options):
    batch, _ = batch_of([0, 1])
    message = "sequence 2 of the trace has 3 tokens and the model ran 0 of it: say with sequences= which run"
    with pytest.raises(ValueError, match=message), replay(model, trace, **options, **OPTIONS), torch.no_grad():
        model(**batch)
    with pytest.raises(KeyError, match="mine"), replay(model, trace, **options, **OPTIONS), torch.no_grad():  # noqa: PT012
        model(**batch)
        raise KeyError("mine")


def test_a_generated_text_is_replayed_as_a_whole_and_its_last_token_is_the_models(model):
    with record(model) as recorder:
        text = model.generate(token_ids(2, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    trace = recorder.trace
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.neg_()
    with record(model) as own, torch.no_grad():
        model(input_ids=text)
    with replay(model, trace, sequences=[1, 0], **OPTIONS) as replayer, record(model) as again, torch.no_grad():
        model(input_ids=text.flip(0))
    assert replayer.tokens == 20
    picks = again.trace.picks.unflatten(1, (2, 11)).flip(1)
    recorded = trace.picks[:, trace.sequences.argsort(stable=True)].unflatten(1, (2, 10))
    assert torch.equal(picks[:, :, :10], recorded)
    chosen = own.trace.picks.unflatten(1, (2, 11))
    assert not torch.equal(chosen[:, :, :10], recorded)
    assert torch.equal(picks[0, :, 10], chosen[0, :, 10])  # in the first layer nothing has parted yet


class Cutting(torch.nn.Module):
    """Hands its layer no padding, as a model that packs its tokens does."""

    def __init__(self):
        super().__init__()
        self.embed, self.moe = torch.nn.Embedding(64, 32), DeepseekV3MoE(v3(16, 4, 2, 4))

    def forward(self, input_ids, attention_mask):
        return self.moe(self.embed(input_ids)[attention_mask.bool()])


def test_a_model_that_cuts_its_padding_out_keeps_the_token_that_no_engine_read():
    model, ids = Cutting(), token_ids(2, 6)
    mask = torch.ones_like(ids)
    with record(model) as recorder, torch.no_grad():
        expected = model(ids, mask)
        model(ids[:, :-1], mask[:, :-1])
    trace = recorder.trace.select(slice(12, None))
    padded, wider = functional.pad(ids, (3, 0)), functional.pad(mask, (3, 0))
    with replay(model, trace, sequences=[2, 3], **OPTIONS) as replayer, torch.no_grad():
        assert torch.equal(model(padded, wider), expected)
    assert replayer.tokens == 10


def test_what_does_not_belong_to_the_record_is_refused(model, trace):
    batch, _ = batch_of([0, 1])
    long = {"input_ids": token_ids(1, 8)}
    for options, call, message in (
        ({}, batch, "sequence 0 of the trace has 5 tokens and the model runs 6 of it: .* give last_unrecorded=True"),
        (OPTIONS, long, "sequence 0 of the trace has 5 tokens and the model runs 8 of it: it is of another run$"),
        ({**OPTIONS, "sequences": [1, 0]}, batch, "sequence 0 of the trace has 5 tokens and the model runs 9 of it"),
        ({**OPTIONS, "sequences": [1]}, batch, "sequences= names 1 and the model begins another"),
        ({"sequences": [4]}, batch, "sequences= names 4, of which the trace has no token: its sequences are 0 to 3"),
        ({"sequences": [0.5]}, batch, "are no numbers of sequences: give one whole number a row"),
    ):
        with pytest.raises(ValueError, match=message), replay(model, trace, **options):
            model(**call)
    part = trace.select(trace.sequences == 2)
    with pytest.raises(ValueError, match=r"sequence 0 .* has 0 tokens .* say with sequences= which the rows are"):  # noqa: SIM117
        with replay(model, part):
            model(**batch)
    one = replace(trace, sequences=torch.zeros_like(trace.sequences), labels=None)
    with pytest.raises(ValueError, match="last_unrecorded=True needs to know where texts end"):  # noqa: SIM117
        with replay(model, one, **OPTIONS):
            model(**batch)
    with pytest.raises(ValueError, match="a layer that runs alone does not say which tokens it has"):  # noqa: SIM117
        with replay(model, trace, sequences=[0]):
            model.model.layers[0].mlp(torch.randn(1, 3, 32))


def test_a_token_that_the_engine_left_out_is_not_taken_for_one_without_experts(model, trace):
    picks = trace.picks.clone()
    picks[1, 7] = 8
    holed = replace(trace, picks=picks)
    message = r"no experts of token 7 \(sequence 1\) in layer 'layers.1': leave that sequence out"
    with pytest.raises(ValueError, match=message), replay(model, holed, sequences=[1], **OPTIONS):
        model(**batch_of([1])[0])
    with replay(model, holed, sequences=[0, 3], **OPTIONS):
        model(**batch_of([0, 3])[0])


def test_token_ids_of_a_response_prove_that_it_is_the_same_text(model, tmp_path):
    file = io.BytesIO()
    np.save(file, rollouts()[0])
    response = {"prompt_token_ids": [5, 6, 7], "choices": [
        {"token_ids": [8, 9, 10], "routed_experts": base64.b64encode(file.getvalue()).decode()}
    ]}  # fmt: skip
    (tmp_path / "answer.json").write_text(json.dumps(response))
    model.config.save_pretrained(tmp_path)
    trace, _ = imported("vllm", [tmp_path / "answer.json"], read_target(str(tmp_path)))
    with replay(model, trace, **OPTIONS):
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]))
    with (
        pytest.raises(ValueError, match="token 0 of the trace has id 5 and the model is given 0: it is of another"),
        replay(model, trace, **OPTIONS),
    ):
        model(input_ids=torch.tensor([[0, 5, 6, 7, 8, 9]]))


def trainer_of(model, trace, batch, folder, rows):
    """The Trainer that the page shows, on two texts at a time, four a step."""
    page = Path(__file__).parents[1] / "docs" / "en" / "what-if-and-diff.md"
    code = next(c for c in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "ReplayTrainer" in c)
    exec(code, names := {"replay": replay, "rollouts": trace})
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    data = [{**{key: x[row] for key, x in batch.items()}, "labels": labels[row], "rollout": row} for row in rows]
    held_out = [{key: value for key, value in row.items() if key != "rollout"} for row in data[:2]]
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", optim="sgd",
        lr_scheduler_type="constant", learning_rate=1.0, max_grad_norm=0.0, num_train_epochs=1,
        dataloader_pin_memory=False, train_sampling_strategy="sequential", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, remove_unused_columns=False,
    )  # fmt: skip
    return names["ReplayTrainer"](model=model, args=args, train_dataset=data, eval_dataset=held_out)


def trained_by_hand(model, batch, picks, rows):
    """SGD on four texts a step, two at a time, with the experts of the rollouts."""
    picks = picks.unflatten(1, batch["input_ids"].shape)
    for step in (rows[:4], rows[4:]):
        n_labels = int(batch["attention_mask"][step, 1:].sum())
        for texts in (step[:2], step[2:]):
            other = forced(model, picks[:, texts].flatten(1, 2)).train()
            ids, mask = batch["input_ids"][texts], batch["attention_mask"][texts]
            logits = other(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][mask[:, 1:].bool()]
            (functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:].bool()], reduction="sum") / n_labels).backward()
            for mine, its in zip(model.parameters(), other.parameters(), strict=True):
                mine.grad = its.grad if mine.grad is None else mine.grad + its.grad
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        model.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_the_trainer_of_the_page_trains_as_a_loop_by_hand_and_evaluates(model, trace, tmp_path, checkpointed):
    rows = [3, 0, 1, 2, 1, 3, 2, 0]
    batch, picks = batch_of(range(len(LENGTHS)))
    expected = trained_by_hand(copy.deepcopy(model), batch, picks, rows)
    before = copy.deepcopy(dict(model.named_parameters()))
    if checkpointed:
        checkpoint_layers(model)
    trainer = trainer_of(model, trace, batch, tmp_path, rows)
    trainer.train()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
        assert not torch.allclose(parameter, before[name])
    ids, mask = batch["input_ids"][[3, 0]], batch["attention_mask"][[3, 0]]
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own)


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        (("layers.1", "layers.2"), ("model.layers.1.mlp", "model.layers.2.mlp"), {0: 0, 1: 1}),
        (("decoder.layers.2",), ("model.layers.1.mlp", "model.layers.2.mlp"), {0: 1}),
        (("a.1", "a.2"), ("a.2", "a.1"), {0: 1, 1: 0}),
        (("layers.1", "layers.9"), ("model.layers.1.mlp",), {0: 0}),
        (("layers.1",), ("encoder.layers.1.mlp", "decoder.layers.1.mlp"), {}),
        (("x.1.a", "x.1.b"), ("model.layers.1.mlp", "model.layers.2.mlp"), {}),
        (("moe",), ("model.layers.1.mlp",), {}),
    ],
)
def test_layers_of_an_engine_are_known_by_their_depth_where_it_says_which(here, there, same):
    assert same_layers(here, there) == {here[one]: there[two] for one, two in same.items()}


def test_layers_that_the_model_does_not_have_are_refused(model, trace):
    other = replace(trace, layers=("layers.0", "layers.1", "layers.5"))
    with pytest.raises(ValueError, match=r"it has a layer 'layers.5', and 'model.layers.0.mlp' is the first"):
        replay(model, other).__enter__()


def test_a_batch_that_is_refused_takes_nothing_from_the_record(model, trace):
    right, _ = batch_of([0, 1])
    wrong, _ = batch_of([1, 0])
    with torch.no_grad():
        with replay(model, trace, sequences=[0, 1], **OPTIONS):
            expected = model(**right).logits
        with replay(model, trace, sequences=[0, 1], **OPTIONS) as replayer:
            with pytest.raises(ValueError, match="sequence 0"):
                model(**wrong)
            assert not replayer.tokens
            assert torch.equal(model(**right).logits, expected)
