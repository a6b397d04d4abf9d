"""BiasBalance on a model that PEFT adapts: modules stand for PEFT's, with the names and attributes of its 0.21."""

import copy
import warnings

import pytest
import torch
from hf_models import eager, loud, relative, tiny, token_ids
from torch import nn

import moesaic as ms
from moesaic.hf.added_bias import BIAS
from moesaic.hf.modules import moe_layers
from moesaic.train.bias_balance import BiasBalance


class ModulesToSaveWrapper(nn.Module):
    """Trains and saves a copy in the place of a module, and lends it its attributes."""

    active_adapters = ("default",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["modules_to_save"]["default"], name)

    def forward(self, *args, **kwargs):
        return self.modules_to_save["default"](*args, **kwargs)


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module, *, modules_to_save: str = "") -> None:
        super().__init__()
        for module in list(model.modules()):
            part = module._modules.get(modules_to_save)
            if part is not None and (modules_to_save != "mlp" or hasattr(part, "experts")):
                setattr(module, modules_to_save, ModulesToSaveWrapper(part))
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config, self.peft_config = model.config, {"default": None}

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT puts into a checkpoint beside its adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".modules_to_save.default." in name}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_the_copy_of_a_router_that_is_saved_is_the_one_whose_bias_moves(family):
    torch.manual_seed(0)
    model, ids = PeftModel(tiny(family).bfloat16(), modules_to_save="gate").train(), token_ids()
    names = [layer.name for layer in moe_layers(tiny(family))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance = BiasBalance({"model.layers.*": 1e-3}, add_bias=True).attach(model)
    for layer in moe_layers(model):
        layer.bias.fill_(0.5)
    model(input_ids=ids)
    balance.step()
    balance.detach()
    assert list(balance.load) == names
    biases = [tensor for name, tensor in saved(model).items() if name.endswith(BIAS)]
    assert len(biases) == len(names)
    for bias, load in zip(biases, balance.load.values(), strict=True):
        assert load.sum() > 0
        torch.testing.assert_close(bias, 0.5 + 1e-3 * (load.mean() - load).sign().float(), rtol=0, atol=1e-7)


def test_a_router_that_was_copied_since_is_an_error_where_its_bias_would_move_unread():
    model, ids = tiny("deepseek_v3").train(), token_ids()
    balance = BiasBalance(1e-3).attach(model)
    adapted = PeftModel(model, modules_to_save="gate").train()
    adapted(input_ids=ids)
    with pytest.raises(ValueError, match=r"1\.mlp: PEFT trains a copy of its router now.*after get_peft_model"):
        balance.step()
    balance.attach(adapted).step(skipped=True)


def test_a_block_that_is_saved_whole_is_one_layer():
    model, ids = PeftModel(tiny("deepseek_v3"), modules_to_save="mlp").train(), token_ids()
    balance = BiasBalance(1e-3).attach(model)
    model(input_ids=ids)
    balance.step()
    assert list(balance.load) == [layer.name for layer in moe_layers(tiny("deepseek_v3"))]
    assert all(load.sum() == ids.numel() * 4 for load in balance.load.values())


def test_experts_that_are_saved_whole_are_served():
    model, ids = PeftModel(eager(loud("qwen3_moe")), modules_to_save="experts"), token_ids()
    expected, copies = model(input_ids=ids).logits, [layer.experts for layer in moe_layers(model)]
    ms.attach(model)
    assert relative(model(input_ids=ids).logits, expected) < 1e-5
    assert len(copies) == 3
    assert all("_moesaic" in vars(copy) for copy in copies)


@pytest.mark.parametrize("wrapped", [False, True])
def test_biases_that_an_adapter_would_not_save_are_warned_of(wrapped):
    model = PeftModel(tiny("deepseek_v3"))
    if wrapped:
        outer = nn.Module()
        outer.module = model  # as DistributedDataParallel has it
        model = outer
    told = r"not in what PeftModel saves, and with its adapters off.*: name the routers in LoraConfig\(modules_to_save"
    with pytest.warns(UserWarning, match=told):
        BiasBalance(1e-3).attach(model).detach()


def test_a_bias_in_the_copy_is_found_where_it_lies():
    model = PeftModel(tiny("deepseek_v3"), modules_to_save="gate")
    homes = [layer.home for layer in moe_layers(model)]
    assert all(home.name in home.owner._buffers for home in homes)
