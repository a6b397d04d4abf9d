"""BalanceLoss where something runs twice, fails, or comes between: nothing of it is taken for the next."""

import pytest
import torch
from balanced import ALPHA, assert_same, attached, batch_of, checkpointed, gradients, model_of, part
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

import moesaic as ms
from moesaic.layer.balance import expert_load
from moesaic.layer.losses import LOSSES
from moesaic.train.injection import REMEMBERED


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


@pytest.mark.parametrize("reentrant", [None, True])
def test_a_forward_that_failed_is_in_no_load_and_in_no_value(reentrant):
    """A loop that catches it, for want of memory, say, goes on with a smaller batch."""
    batch, found = batch_of(), []

    def fail(*_):
        raise RuntimeError("out of memory")

    for disturbed in (False, True):
        model = model_of("deepseek_v3")
        if reentrant is not None:
            checkpointed(model, reentrant=reentrant)
        balance = attached("global_batch", model)
        model(**part(batch, slice(0, 1))).loss.backward()
        if disturbed:
            hook = model.lm_head.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**batch)
            hook.remove()
        found.append(gradients(model, lambda m=model, b=balance: b(m(**part(batch, slice(1, 3))).loss).backward()))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_routers_that_get_no_gradient_take_no_part_and_that_is_said():
    model, batch = model_of("deepseek_v3").requires_grad_(False), batch_of()
    model.lm_head.requires_grad_(True)
    balance = attached("switch", model)
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="BalanceLoss saw no router in this step"):
        balance.step()
    assert not balance.values


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch 2.11, of what runs without
@pytest.mark.parametrize("between", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["switch", "sequence", "global_batch"])
def test_a_forward_that_is_in_no_loss_is_not_taken_for_the_one_that_is_recomputed(kind, reentrant, between):
    """As references and teachers run, or what is only looked at: between a forward and the naming of its loss."""
    first, second = (part(batch_of(), rows) for rows in (slice(0, 2), slice(2, 4)))
    labels = first.pop("labels")
    del second["labels"]
    found = []
    for again in (False, True):
        model = model_of("deepseek_v3")
        if again:
            checkpointed(model, reentrant=reentrant)
        balance = attached(kind, model)

        def step(model=model, balance=balance):
            logits = model(**first).logits
            with between():
                model(**second)  # as many tokens, others of which are padding
            balance(ForCausalLMLoss(logits, labels, 64)).backward()

        found.append(gradients(model, step))
    assert_same(*found)


class Looped(nn.Module):
    """One layer that runs three times. again: what checkpointing runs again at once, a pass or all of them."""

    def __init__(self, again=None, *, reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        config = ms.MoEConfig(hidden_size=8, moe_intermediate_size=6, n_routed_experts=8, num_experts_per_tok=2)
        self.layer = ms.DeepseekV3MoE(config, engine="reference").double()
        nn.init.normal_(self.layer.gate.weight, std=0.5)
        self.again, self.reentrant = again, reentrant

    def once(self, x):
        return x + self.layer(x)

    def all(self, x):
        return self.once(self.once(self.once(x)))

    def forward(self, hidden_states):
        if self.again is None:
            return self.all(hidden_states)
        for _ in range(1 if self.again == "all" else 3):
            run = getattr(self, self.again)
            hidden_states = checkpoint(run, hidden_states, use_reentrant=self.reentrant)
        return hidden_states


@pytest.mark.parametrize("again", [None, "once", "all"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["switch", "global_batch"])
def test_each_pass_of_a_looped_layer_has_its_own_load_and_value(kind, reentrant, again):
    """f of the global batch counts the passes so far, as it counts micro-batches."""
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, routings = Looped(), []
    plain.layer.gate.register_forward_hook(lambda _module, _args, output: routings.append(output))
    values = []

    def by_hand():
        task, load = plain(x).square().mean(), torch.zeros(8, dtype=torch.float64)
        for routing in routings:
            load = load + expert_load(routing.expert_ids, 8)
            own = {"load": load} if kind == "global_batch" else {}
            values.append(LOSSES[kind](routing, plain.layer.config, **own))
        (task + ALPHA * sum(values)).backward()

    expected, model = gradients(plain, by_hand), Looped(again, reentrant=reentrant)
    balance = attached(kind, model)
    found = gradients(model, lambda: balance(model(x).square().mean()).backward())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14)
    balance.step()
    torch.testing.assert_close(balance.values["layer"], sum(values).detach() / 3, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch 2.11, of what runs without
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_that_chose_alike_are_recomputed_each_with_its_own_load(reentrant, named):
    """As the same batch twice in one backward: the global load that the second saw is that of both."""
    one, two = (part(batch_of(), rows) for rows in (slice(0, 2), slice(2, 4)))
    found = []
    for again in (False, True):
        model = model_of("deepseek_v3")
        if again:
            checkpointed(model, reentrant=reentrant)
        balance = attached("global_batch", model)

        def step(model=model, balance=balance):
            loss = sum(weight * model(**batch).loss for weight, batch in ((1, one), (3, two), (5, one)))
            (balance(loss) if named else loss).backward()

        found.append(gradients(model, step))
        step()  # once more, after what the first backward ran again
        found.append(gradients(model, step))
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_a_forward_waits_for_its_loss_through_any_number_of_calls_without_gradients():
    """As many as generating a text makes."""
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for n_calls in (0, REMEMBERED + 1):
        model = Looped()
        balance = attached("switch", model)

        def step(model=model, balance=balance, n_calls=n_calls):
            y = model(x)
            with torch.no_grad():
                for _ in range(n_calls):
                    model(x[:1, :1])
            balance(y.square().mean()).backward()

        found.append(gradients(model, step))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["switch", "global_batch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_may_be_in_a_checkpoint(reentrant, kind):
    """Reentrant ones run it without gradients first, its layer three times."""
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model, found = Looped(), []
    balance = attached(kind, model)
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        found.append(gradients(model, lambda run=run: balance(run(x).square().mean()).backward()))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


@pytest.mark.parametrize("between", [(1, 1), (3, 5)], ids=["of other sizes", "of the same size"])
def test_a_checkpoint_of_a_whole_model_that_is_forgotten_is_refused(between):
    """One that is reentrant runs without gradients first, so it is remembered as long as those that train nothing."""
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other = torch.randn(*between, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model, found = Looped(), []
    balance = attached("switch", model)

    def step(n_calls, *, reentrant=True):
        y = checkpoint(model, x, use_reentrant=reentrant)
        with torch.no_grad():
            for _ in range(n_calls):
                model(other)
        balance(y.square().mean()).backward()
        balance.step()

    for n_calls, reentrant in ((0, True), (REMEMBERED - 1, True), (REMEMBERED, False)):
        found.append(gradients(model, lambda n=n_calls, again=reentrant: step(n, reentrant=again)))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    with pytest.raises(ValueError, match="checkpoint with use_reentrant=False, or run them before"):
        step(REMEMBERED)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_forwards_in_a_loss_may_each_be_in_a_checkpoint_whole(reentrant):
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model, found = Looped(), []
    balance = attached("switch", model)
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):

        def step(run=run):
            balance((run(x) + run(-x) + model(x + 1)).square().mean()).backward()

        found.append(gradients(model, step))
        balance.step()
        found[-1] |= balance.values
    for name, value in found[0].items():  # added up in another order
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch 2.11, of what runs without
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_batch_without_gradients_is_not_taken_for_the_forward_that_is_recomputed(reentrant):
    """As GRPO asks for the probabilities of before: it is in no load, though it chose alike."""
    batch, found = batch_of(), []
    labels = batch.pop("labels")
    for asked in (False, True):
        model = checkpointed(model_of("deepseek_v3"), reentrant=reentrant)
        balance = attached("global_batch", model)

        def step(model=model, balance=balance, asked=asked):
            with torch.no_grad():
                for _ in range(asked):
                    model(**batch)
            balance(ForCausalLMLoss(model(**batch).logits, labels, 64)).backward()

        found.append(gradients(model, step))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])
