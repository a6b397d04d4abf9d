"""BalanceLoss in compiled models: the eager model's gradient, bit for bit."""

import copy

import pytest
import torch
from balanced import assert_same, attached, batch_of, checkpointed, gradients, hooked, model_of, part, unbroken
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.loss.loss_utils import ForCausalLMLoss

from moesaic.hf.modules import moe_layers


@pytest.fixture
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_by_layer(model):
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager")
    return model


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("whole", "global_batch"), ("attached after compiling", "switch"), ("by layer", "sequence"),
        ("reentrant", "switch"), ("not reentrant", "z"),
        pytest.param("whole, its graph broken", "global_batch", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_compiled_model_gets_the_same_gradient(way, kind):
    batch, new = batch_of(), model_of if way in ("by layer", "whole, its graph broken") else unbroken
    eager = new("deepseek_v3", num_hidden_layers=2)
    attached(kind, eager)
    expected = gradients(eager, lambda: eager(**batch).loss.backward())
    model = new("deepseek_v3", num_hidden_layers=2)
    if "reentrant" in way:
        checkpointed(model, reentrant=way == "reentrant")
    run = layer_by_layer(model) if way == "by layer" else torch.compile(model, backend="aot_eager")
    plain = None
    if way == "attached after compiling":
        plain = gradients(model, lambda: run(**batch).loss.backward())
    balance = attached(kind, model)
    assert_same(gradients(model, lambda: run(**batch).loss.backward()), expected)
    once = gradients(model, lambda: (run(**batch).loss * 2).backward())  # the same graph, another scale
    assert_same(expected, once, factor=2)
    balance.step()
    assert list(balance.values) == ["model.layers.1.mlp"]
    balance.detach()
    if plain is not None:
        assert_same(gradients(model, lambda: run(**batch).loss.backward()), plain)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
def test_layers_share_one_graph_which_goes_with_the_last_loss():
    model, batch = unbroken("deepseek_v3", num_hidden_layers=4), batch_of()
    plain = gradients(model, lambda: model(**batch).loss.backward())
    losses = [attached(kind, model) for kind in ("switch", "global_batch")]
    expected = gradients(model, lambda: model(**batch).loss.backward())
    values = {}
    for loss in losses:
        loss.step()
        values[loss.kind] = loss.values
    counter = CompileCounterWithBackend("aot_eager")
    for layer in moe_layers(model):
        layer.block.compile(backend=counter, fullgraph=True)
    assert_same(gradients(model, lambda: model(**batch).loss.backward()), expected)
    for loss in losses:
        loss.step()
        assert loss.values == values[loss.kind]
        loss.detach()
    assert len(values["switch"]) == 3
    assert counter.frame_count == 1
    assert_same(gradients(model, lambda: model(**batch).loss.backward()), plain)
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_a_call_of_a_model_without_its_head_is_a_call_of_the_model(compiled):
    """It has its own padding and its own sequences, after an evaluation of the whole model too."""
    model, batch = unbroken("deepseek_v3", num_hidden_layers=2), batch_of()
    padded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole, body = (torch.compile(m, backend="aot_eager") if compiled else m for m in (model, model.model))
    balance = attached("sequence", model)

    def gradient(call, given):
        return gradients(model, lambda: balance(call(**given)[0].square().mean()).backward())

    for given in (padded, {"input_ids": batch["input_ids"]}):
        expected = gradient(model, given)
        model.eval()
        whole(**padded)
        model.train()
        assert_same(gradient(lambda **given: [model.lm_head(body(**given)[0])], given), expected)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
def test_compiled_layers_that_checkpointing_runs_again_are_told_apart():
    """Two forwards of as many tokens, of which other ones are padding, in one backward; before them one in no loss."""
    halves = [part(batch_of(), rows) for rows in (slice(0, 2), slice(2, 4))]
    labels = [half.pop("labels") for half in halves]
    found = []
    for compiled in (False, True):
        model = model_of("deepseek_v3", num_hidden_layers=2)
        if compiled:
            model = layer_by_layer(checkpointed(model, reentrant=True))
        balance = attached("global_batch", model)

        def step(model=model, balance=balance):
            with torch.no_grad():
                model(**halves[1])
            logits = [model(**half).logits for half in halves]
            balance(sum(ForCausalLMLoss(*pair, 64) for pair in zip(logits, labels, strict=True))).backward()

        found.append(gradients(model, step))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_a_copy_of_a_balanced_model_takes_no_part_until_it_has_a_loss_of_its_own(compiled):
    model, batch = model_of("deepseek_v3", num_hidden_layers=2), batch_of()
    other = batch | {"input_ids": batch["input_ids"].flip(1)}
    plain = gradients(model, lambda: model(**other).loss.backward())
    balance = attached("sequence", model)
    copied, teacher = copy.deepcopy(model), copy.deepcopy(model)
    for each in (model, copied, teacher) if compiled else ():
        layer_by_layer(each)
    expected = gradients(model, lambda: model(**batch).loss.backward())
    assert_same(gradients(copied, lambda: copied(**other).loss.backward()), plain)
    balance.step()
    own = attached("sequence", copied)
    balance.detach()
    assert_same(gradients(copied, lambda: copied(**batch).loss.backward()), expected)
    own.step()
    assert own.values == balance.values
    own.detach()
    assert not hooked(copied)
    with torch.no_grad():
        assert torch.isfinite(teacher(**batch).loss)
