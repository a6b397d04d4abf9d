"""Every family of the installed transformers that has a bias: found, wherever it is, and moved by what was counted."""

import pytest
import torch
from hf_every_family import MODELS, families, tiny_of, token_ids
from torch import nn

from moesaic.hf.modules import moe_layers
from moesaic.train.bias_balance import BiasBalance

NAMES = ("e_score_correction_bias", "expert_bias")  # as their code has them


def has_a_bias(family: str) -> bool:
    code = (MODELS / family / f"modeling_{family}.py").read_text("utf-8")
    return any(name in code for name in NAMES)


def small(family: str) -> nn.Module:
    found = tiny_of(family)
    if found.model is None:
        pytest.skip(f"{family} was not built: {found.reasons[0][:150]}")
    return found.model


@pytest.mark.parametrize("family", [family for family in families() if has_a_bias(family)])
def test_every_bias_of_a_family_is_found_moved_by_the_load_and_moves_the_choice(family):
    model, ids = small(family), token_ids()
    tensors = [*model.named_buffers(), *model.named_parameters()]
    names = [name for name, _ in tensors if name.endswith(NAMES)]
    if not names:
        pytest.skip(f"a small {family} has no layer with a bias")
    layers = [layer for layer in moe_layers(model) if layer.has_bias]
    assert len(layers) == len(names)
    before = [layer.bias.clone() for layer in layers]
    balance = BiasBalance(0.25).attach(model.train())
    try:
        model(input_ids=ids)
        balance.step()
        for layer, bias in zip(layers, before, strict=True):
            load = balance.load[layer.name]
            assert load.sum() == ids.numel() * layer.config.num_experts_per_tok
            assert load.unique().numel() > 1
            torch.testing.assert_close(layer.bias - bias, 0.25 * (load.mean() - load).sign().float())
            layer.home.bias.data.flatten()[0] = 100.0
        model(input_ids=ids)
        balance.step()
        for layer in layers:
            assert balance.load[layer.name][0] == ids.numel(), "every token chooses it, once"
    finally:
        balance.detach()
        for layer, bias in zip(layers, before, strict=True):
            layer.home.bias.data.flatten().copy_(bias)
        model.eval()


def test_a_family_whose_tokens_may_skip_all_experts_is_refused():
    model = small("zaya")
    with pytest.raises(ValueError, match=r"lets tokens skip all experts .* no load tells how to move its balancing_b"):
        BiasBalance().attach(model)
