"""BalanceLoss where something runs twice, fails, or comes between: nothing of it is taken for the next."""

import pytest
import torch
from balanced import assert_same, attached, batch_of, gradients, model_of, part


def checkpointed(model, *, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def test_what_runs_without_gradients_between_micro_batches_is_in_no_load():
    """Whole models, and a layer alone after a model has returned."""
    batch, found = batch_of(), []
    for disturbed in (False, True):
        model = model_of("deepseek_v3")
        balance = attached("global_batch", model)

        def step(model=model, disturbed=disturbed):
            for rows in (slice(0, 2), slice(2, 4)):
                if disturbed:
                    with torch.no_grad():
                        model.model.layers[1].mlp(torch.randn(1, 5, 32, dtype=torch.float64))
                        model(**part(batch, slice(1, 2)))
                model(**part(batch, rows)).loss.backward()

        found.append(gradients(model, step))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_second_backward_recomputes_each_forward_as_the_first_did_and_counts_no_value_twice(reentrant):
    """Two forwards of as many tokens, of which other ones are padding; the first of them goes backward once more."""
    model, batch = model_of("deepseek_v3"), batch_of()
    if reentrant is not None:
        checkpointed(model, reentrant=reentrant)
    balance = attached("switch", model)
    halves = [part(batch, slice(0, 2)), part(batch, slice(2, 4))]

    def value(half):
        model(**half).loss.backward()
        balance.step()
        return balance.values

    one, two = map(value, halves)

    def once():
        balance(sum(model(**half).loss for half in halves)).backward()

    def again():
        loss = balance(sum(model(**half).loss for half in halves))
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()

    expected = gradients(model, once)
    balance.step()
    assert_same(gradients(model, again), expected)
    balance.step()
    first, second = (model(**half).loss for half in halves)
    first.backward(retain_graph=True)
    first.backward()
    second.backward()
    balance.step()
    assert balance.values == {name: (one[name] + two[name]) / 2 for name in one}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_backward_that_failed_leaves_no_scale_for_the_next(reentrant):
    model, batch = model_of("deepseek_v3"), batch_of()
    if reentrant is not None:
        checkpointed(model, reentrant=reentrant)
    attached("switch", model)

    def fail(_grad):
        raise RuntimeError("out of memory")

    hook = model.model.embed_tokens.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch).loss.backward()
    hook.remove()
    with pytest.raises(ValueError, match="does not know the scale of this backward"):
        model(**batch).logits.square().mean().backward()


def test_routers_that_get_no_gradient_take_no_part_and_that_is_said():
    model, batch = model_of("deepseek_v3").requires_grad_(False), batch_of()
    model.lm_head.requires_grad_(True)
    balance = attached("switch", model)
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="BalanceLoss saw no router in this step"):
        balance.step()
    assert not balance.values
