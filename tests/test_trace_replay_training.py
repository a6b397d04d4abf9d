"""Replay in training: beside a balancing loss, and in transformers' Trainer."""

from dataclasses import replace

import pytest
import torch
from cases import v3
from hf_models import tiny, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moesaic as ms
from moesaic.layer.losses import switch_loss
from moesaic.layer.moe import DeepseekV3MoE
from moesaic.types import Routing


def crowded(trace):
    """The same tokens, all of which chose the same experts."""
    return replace(trace, picks=torch.arange(trace.top_k, dtype=trace.picks.dtype).expand_as(trace.picks).clone())


def balanced(model):
    return ms.BalanceLoss("switch", 1.0).attach(model)


@pytest.mark.parametrize("weights", ["live", "recorded"])
def test_a_balance_loss_is_refused_where_the_router_keeps_its_own_picks(weights):
    model, ids = tiny("qwen3_moe").train(), token_ids(2, 8)
    with ms.record(model) as recorder, torch.no_grad():
        model(input_ids=ids)
    message = r"BalanceLoss\('switch'\) would balance what the router of layer 'model.layers.0.mlp' chooses"
    balance = balanced(model)
    with pytest.raises(ValueError, match=message), ms.replay(model, recorder.trace, weights=weights):
        model(input_ids=ids)
    with ms.replay(model.eval(), recorder.trace, weights=weights), torch.no_grad():
        model(input_ids=ids)  # where nothing is balanced
    balance.detach()
    model.train()
    with pytest.raises(ValueError, match=message), ms.replay(model, recorder.trace, weights=weights):  # noqa: PT012
        balance.attach(model)
        model(input_ids=ids)
    balance.detach()
    with ms.replay(model, recorder.trace, weights=weights):
        model(input_ids=ids)


@pytest.mark.parametrize("weights", ["live", "recorded"])
@pytest.mark.parametrize("first", ["balance", "replay"])
def test_the_replayed_picks_of_our_own_router_are_those_that_are_balanced(weights, first):
    layer, x, seen = DeepseekV3MoE(v3(16, 4, 2, 4)).double().train(), torch.randn(2, 8, 32, dtype=torch.float64), []
    with ms.record(layer) as recorder, torch.no_grad():
        layer(x)
    trace = crowded(recorder.trace)
    with ms.replay(layer, trace, weights=weights):
        handle = layer.gate.register_forward_hook(lambda _gate, _args, routing: seen.append(Routing(*routing)))
        task = layer(x).square().mean()
        handle.remove()
    (expected,) = torch.autograd.grad(task + switch_loss(seen[0], layer.gate.config), [layer.gate.weight])
    balance = balanced(layer) if first == "balance" else None
    with ms.replay(layer, trace, weights=weights):
        balance = balance or balanced(layer)
        balance(layer(x).square().mean()).backward()
    torch.testing.assert_close(layer.gate.weight.grad, expected)
    balance.step()
    torch.testing.assert_close(balance.values[""], switch_loss(seen[0], layer.gate.config).detach())


class Waits(TorchDispatchMode):
    """Counts the fractions that are read as Python numbers: on a GPU each of them waits for it."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_a_recomputation_with_one_forward_to_choose_from_waits_for_nothing():
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4)).train(), torch.randn(2, 8, 32, requires_grad=True)
    with ms.record(layer) as recorder, torch.no_grad():
        layer(x)
    with ms.replay(layer, recorder.trace):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
        with Waits() as waits:
            loss.backward()
    assert layer.gate.weight.grad is not None
    assert waits.n == 0
