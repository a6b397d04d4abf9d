"""Balancing losses: 1 at perfect balance, gradient through P alone, and the values that other libraries give."""

import pytest
import torch
from golden.make_losses import LENGTH, SEQUENCES, read
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.config import MoEConfig
from moesaic.layer.balance import expert_load
from moesaic.layer.losses import (
    LOSSES,
    chosen_share,
    communication_loss,
    device_loss,
    global_batch_loss,
    sequence_loss,
    switch_loss,
    to_library,
    z_loss,
)
from moesaic.rules import route
from moesaic.types import Routing

E, K, D, M = 16, 4, 4, 2


def config_of(n_experts=E, k=K, **fields):
    fields = {"scoring_func": "softmax", "topk_method": "greedy", **fields}
    return MoEConfig(hidden_size=1, n_routed_experts=n_experts, num_experts_per_tok=k, **fields)


def routed(logits, config, bias=None):
    return route(logits, bias, config)


def arguments(kind, routing, config, mask=None):
    """What a kind needs beside the tokens, for a batch of one sequence on its own."""
    ids = routing.expert_ids if mask is None else routing.expert_ids[mask]
    load = {"load": expert_load(ids, config.n_routed_experts)}
    devices = {"n_devices": D} if config.n_routed_experts % D == 0 else {"n_devices": 1}
    reach = {"max_devices": M}
    return {"global_batch": load, "device": devices, "communication": devices | reach}.get(kind, {})


BALANCING = [kind for kind in LOSSES if kind != "z"]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", BALANCING)
def test_every_balancing_loss_is_one_at_perfect_balance(kind, dtype, scoring):
    """Each of 16 tokens chooses two experts on one device of four and two on the next."""
    config = config_of(scoring_func=scoring)
    logits = torch.full((16, E), -3.0, dtype=dtype)
    pairs = [[4 * (t % 4) + t // 4, 4 * (t % 4) + (t // 4 + 1) % 4] for t in range(16)]  # of tokens on one device each
    ids = torch.tensor([pair + [(expert + 4) % E for expert in pair] for pair in pairs])  # and on the next one
    logits.scatter_(1, ids, 1.0)
    routing = Routing(logits, torch.ones(16, K, dtype=dtype), ids)
    value = LOSSES[kind](routing, config, **arguments(kind, routing, config))
    assert value.dtype == dtype
    assert value.shape == ()
    assert value.item() == pytest.approx(1.0, abs=1e-6 if dtype == torch.float32 else 1e-14)
    uneven = Routing(logits.roll(1, 0).where(torch.arange(E) > 7, 2.0), routing.weights, ids % 8)
    assert LOSSES[kind](uneven, config, **arguments(kind, uneven, config)).item() > 1.2


def test_the_z_loss_has_no_balanced_value():
    config = config_of()
    even = Routing(torch.zeros(5, E), torch.ones(5, K), torch.zeros(5, K, dtype=torch.int64))
    assert z_loss(even, config).item() == pytest.approx(torch.tensor(E).log().item() ** 2)
    assert z_loss(even._replace(logits=even.logits + 3), config) > z_loss(even, config)


def by_hand(p, ids, n_experts):
    """The Switch loss of token after token, without any of ours."""
    n_tokens, k = ids.shape
    f, mean = [0.0] * n_experts, [0.0] * n_experts
    for row, chosen in zip(p.tolist(), ids.tolist(), strict=True):
        for expert in chosen:
            f[expert] += n_experts / (k * n_tokens)
        for expert, score in enumerate(row):
            mean[expert] += score / sum(row) / n_tokens
    return sum(a * b for a, b in zip(f, mean, strict=True))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_switch_loss_is_its_definition(scoring):
    config = config_of(scoring_func=scoring)
    logits = torch.randn(21, E, dtype=torch.float64)
    routing = routed(logits, config)
    p = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    assert switch_loss(routing, config).item() == pytest.approx(by_hand(p, routing.expert_ids, E), abs=1e-13)


def test_the_sequence_loss_counts_the_unbiased_top_k_of_each_sequence():
    """Groups and bias choose other experts; they do not matter to it. The mean is over sequences, not over tokens."""
    config = config_of(scoring_func="sigmoid", topk_method="noaux_tc", n_group=4, topk_group=1)
    lengths = (3, 8, 1)
    logits = torch.randn(sum(lengths), E, dtype=torch.float64)
    routing = routed(logits, config, torch.randn(E, dtype=torch.float64))
    sequences = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    expected = []
    for part in logits.split(lengths):
        ids = part.sigmoid().topk(K).indices
        expected.append(by_hand(part.sigmoid(), ids, E))
    value = sequence_loss(routing, config, sequences=sequences)
    assert value.item() == pytest.approx(sum(expected) / 3, abs=1e-13)
    order = torch.randperm(sum(lengths))
    shuffled = Routing(logits[order], routing.weights[order], routing.expert_ids[order])
    assert sequence_loss(shuffled, config, sequences=sequences[order]).item() == pytest.approx(value.item(), abs=1e-13)


def test_the_global_batch_loss_of_parts_is_the_switch_loss_of_the_whole():
    config = config_of()
    logits = torch.randn(24, E, dtype=torch.float64) + torch.randn(E, dtype=torch.float64)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    one = switch_loss(routed(whole, config), config)
    load = expert_load(routed(logits, config).expert_ids, E)
    several = [global_batch_loss(routed(part, config), config, load=load) for part in parts.split(8)]
    mean = sum(several) / len(several)
    one.backward()
    mean.backward()
    assert mean.item() == pytest.approx(one.item(), abs=1e-13)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-15)
    locally = sum(switch_loss(routed(part, config), config) for part in logits.split(8)) / 3
    assert locally.item() - one.item() > 0.01  # what it forgives


def test_devices_count_as_deepseek_v2_says():
    config = config_of(k=3, topk_method="group_limited_greedy", n_group=4, topk_group=2)
    logits = torch.randn(13, E, dtype=torch.float64)
    p, routing = logits.softmax(-1), routed(logits, config)
    per_device = p.view(13, D, -1).sum(-1).mean(0)
    f = chosen_share(routing, config)
    assert device_loss(routing, config).item() == pytest.approx((f.view(D, -1).mean(-1) * per_device).sum().item())
    sent = torch.tensor([[any(e // 4 == d for e in row) for d in range(D)] for row in routing.expert_ids.tolist()])
    expected = (sent.double().sum(0) * D / (M * 13) * per_device).sum().item()
    assert communication_loss(routing, config).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="n_devices=3 does not divide n_routed_experts=16"):
        device_loss(routing, config, n_devices=3)


def test_a_token_may_reach_the_devices_that_its_experts_can_lie_on_unless_groups_or_you_say_fewer():
    """Each of 16 tokens has an expert on each of four devices, and every expert four tokens."""
    config = config_of()
    ids = torch.stack([torch.arange(4) * 4 + t % 4 for t in range(16)])
    routing = Routing(torch.zeros(16, E, dtype=torch.float64), torch.ones(16, K), ids)
    assert communication_loss(routing, config, n_devices=4).item() == pytest.approx(1.0)
    assert communication_loss(routing, config, n_devices=8).item() == pytest.approx(1.0)  # K reach four of them
    assert communication_loss(routing, config, n_devices=4, max_devices=2).item() == pytest.approx(2.0)
    named = config_of(n_group=4)  # devices that the rule does not limit
    assert communication_loss(routing, named).item() == pytest.approx(1.0)
    grouped = config_of(topk_method="group_limited_greedy", n_group=4, topk_group=2)
    assert communication_loss(routing, grouped).item() == pytest.approx(2.0)
    assert communication_loss(routing, grouped, n_devices=8).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="max_devices=5 of 4 devices cannot be: use 1 to 4, or leave it out"):
        communication_loss(routing, config, n_devices=4, max_devices=5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_changes_neither_value_nor_gradient_whatever_it_holds(kind, scoring):
    config = config_of(scoring_func=scoring)
    mask = torch.rand(20) < 0.6
    mask[:2] = torch.tensor([True, False])
    logits = torch.randn(20, E, dtype=torch.float64)
    dirty = logits.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    clean = logits[mask].requires_grad_()
    whole, kept = routed(dirty, config), routed(clean, config)
    value = LOSSES[kind](whole, config, mask=mask, **arguments(kind, whole, config, mask))
    expected = LOSSES[kind](kept, config, **arguments(kind, kept, config))
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(dirty.grad[mask], clean.grad, rtol=0, atol=1e-14)
    assert not dirty.grad[~mask].any()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_tokens_a_loss_and_its_gradient_are_zero(kind, tokens):
    config = config_of()
    logits = torch.randn(tokens, E, requires_grad=True)
    routing = Routing(logits, torch.ones(tokens, K), torch.zeros(tokens, K, dtype=torch.int64))
    mask = torch.zeros(tokens, dtype=torch.bool)
    value = LOSSES[kind](routing, config, mask=mask, **arguments(kind, routing, config, mask))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


def test_a_sequence_of_padding_alone_is_left_out_of_the_mean():
    config, logits = config_of(), torch.randn(12, E)
    mask = torch.arange(12) < 6
    routing = routed(logits, config)
    sequences = torch.arange(12) // 6
    kept = routed(logits[:6], config)
    assert sequence_loss(routing, config, mask=mask, sequences=sequences) == sequence_loss(kept, config)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_that_of_p_alone_and_finite_for_extreme_logits(kind):
    """f is a count: the gradient at fixed counts, by differences, is all there is."""
    config = config_of(scoring_func="sigmoid")
    logits = torch.randn(7, E, dtype=torch.float64)
    routing = routed(logits, config)

    def value(x):
        return LOSSES[kind](Routing(x, routing.weights, routing.expert_ids), config, **arguments(kind, routing, config))

    assert torch.autograd.gradcheck(value, logits.requires_grad_(), eps=1e-7, atol=1e-6)
    for extreme in (torch.full((7, E), -200.0), 200 * torch.randn(7, E)):
        extreme.requires_grad_()
        result = value(extreme)
        result.backward()
        assert result.isfinite()
        assert extreme.grad.isfinite().all()


def test_half_precision_logits_give_float32_losses():
    config, logits = config_of(), torch.randn(9, E).bfloat16()
    routing = routed(logits, config)
    value = switch_loss(routing, config)
    assert value.dtype == torch.float32
    assert value == switch_loss(routing._replace(logits=logits.float()), config)


def test_a_routing_without_logits_is_refused():
    routing = Routing(None, torch.ones(3, K), torch.zeros(3, K, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"routing\.logits is None"):
        switch_loss(routing, config_of())


# other libraries


def ours(case, logits):
    """The Routing of a golden case, and its config and mask."""
    config = config_of(case.n_experts, case.k, scoring_func=case.scoring)
    return routed(logits, config), config, case.mask() if case.padded else None


CASES = [pytest.param(name, *entry, id=f"{name}-{'-'.join(map(str, entry[0]))}")
         for name in ("megatron", "deepspeed", "transformers") for entry in read(name)]  # fmt: skip


@pytest.mark.parametrize(("name", "case", "logits", "values"), CASES)
def test_the_values_of_other_libraries_are_ours_in_their_scale(name, case, logits, values):
    routing, config, mask = ours(case, logits[0])
    value = switch_loss(routing, config, mask=mask)
    assert to_library(value, name, k=case.k).item() == pytest.approx(values["switch"], rel=1e-6)
    if "z" in values:
        assert z_loss(routing, config, mask=mask).item() == pytest.approx(values["z"], rel=1e-6)
    if "sequence" in values:
        sequences = torch.arange(SEQUENCES * LENGTH) // LENGTH
        value = sequence_loss(routing, config, sequences=sequences)
        assert value.item() == pytest.approx(values["sequence"], rel=1e-6)
    if "global_batch_second_half" in values:
        second, config, _ = ours(case, logits[0][len(logits[0]) // 2 :])
        load = expert_load(routing.expert_ids, case.n_experts)
        value = global_batch_loss(second, config, load=load)
        assert value.item() == pytest.approx(values["global_batch_second_half"], rel=1e-6)


@pytest.mark.parametrize(("case", "logits", "values"), read("transformers"))
def test_transformers_pools_layers_which_no_function_of_their_values_gives(case, logits, values):
    """Its value for several layers is that of one layer with the tokens of all."""
    config, mask = ours(case, logits[0])[1:]
    masks = None if mask is None else mask.repeat(len(logits))
    pooled = switch_loss(routed(torch.cat(logits), config), config, mask=masks)
    assert to_library(pooled, "transformers", k=case.k).item() == pytest.approx(values["pooled"], rel=1e-6)
    each = [to_library(switch_loss(routed(x, config), config, mask=mask), "transformers", k=case.k) for x in logits]
    if case.scale:  # where layers favour other experts, their loads even out before the product
        assert sum(each).item() / len(each) > 1.05 * values["pooled"]


def test_the_golden_values_of_transformers_are_those_of_the_version_here():
    for case, logits, values in read("transformers"):
        mask = case.mask().view(SEQUENCES, LENGTH) if case.padded else None
        value = load_balancing_loss_func(tuple(logits), case.n_experts, case.k, mask)
        assert value.item() == pytest.approx(values["pooled"], rel=1e-6)


def test_scales_that_cannot_be_converted_are_refused():
    assert to_library(1.5, "megablocks", k=2, n_layers=3) == 0.5
    assert to_library(1.5, "olmo-core", k=2, n_layers=3) == 1.5
    with pytest.raises(ValueError, match="library='tutel' has no known scale: use one of megatron"):
        to_library(1.0, "tutel", k=1)
    with pytest.raises(ValueError, match="n_layers=3: transformers pools f and P over layers"):
        to_library(1.0, "transformers", k=2, n_layers=3)
