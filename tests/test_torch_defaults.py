"""Where and in what dtype torch is told to make tensors that do not say so changes no result of ours."""

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from dense_models import dense
from hf_models import loud
from torch import Tensor, nn

import moesaic as ms
from moesaic.conformance import check
from moesaic.hf.added_bias import add_bias
from moesaic.layer.balance import expert_load
from moesaic.trace.store import Trace

IDS = torch.arange(3, 43).view(2, 20)


def recorded(model: nn.Module) -> Trace:
    with ms.record(model, detail="scores", labels=["a", "b"]) as recorder, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return recorder.trace


def balanced(model: nn.Module) -> Tensor:
    model.train()
    balance = ms.BiasBalance(1e-3).attach(model)
    model(input_ids=IDS)
    balance.step()
    balance.detach()
    return torch.stack([bias for name, bias in model.named_buffers() if name.endswith("correction_bias")])


def with_a_loss(model: nn.Module) -> Tensor:
    loss = ms.BalanceLoss("switch", 0.5).attach(model.train())
    model(input_ids=IDS, labels=IDS).loss.backward()
    loss.detach()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")])


def with_a_bias(model: nn.Module) -> Tensor:
    add_bias(model)
    return model(input_ids=IDS).logits


@torch.no_grad()
def one_token(model: nn.Module) -> Tensor:
    return model(input_ids=IDS[:1, :1]).logits


WORK: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "attach": ("qwen3_moe", lambda model: ms.attach(model)(input_ids=IDS).logits),
    "attach, one token": ("qwen3_moe", lambda model: one_token(ms.attach(model, batch_invariant=True))),
    "record": ("deepseek_v3", lambda model: recorded(model).picks),
    "stats": ("deepseek_v3", lambda model: str(ms.stats(recorded(model)))),
    "diff": ("qwen3_moe", lambda model: str(ms.diff(recorded(model), recorded(model)))),
    "what_if": ("deepseek_v3", lambda model: str(ms.what_if(recorded(model), n_group=1, topk_group=1))),
    "what_if bias": ("deepseek_v3", lambda model: str(ms.what_if(recorded(model), bias={0: 0.5}))),
    "steps": ("deepseek_v3", lambda model: str(ms.steps(recorded(model)))),
    "BiasBalance": ("deepseek_v3", balanced),
    "BalanceLoss": ("qwen3_moe", with_a_loss),
    "add_bias": ("qwen3_moe", with_a_bias),
    "check": ("deepseek_v3", lambda model: [str(result) for result in check(model.model.layers[1]).results]),
}


@pytest.fixture(params=["device", "bfloat16", "float64"])
def other_default(request) -> Iterator[Callable[[], None]]:
    """A function that changes one of torch's defaults, which is changed back after the test."""
    dtype = torch.get_default_dtype()
    if request.param == "device":
        yield lambda: torch.set_default_device("meta")  # nothing can be read there
    else:
        yield lambda: torch.set_default_dtype(getattr(torch, request.param))
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


@cache
def by_own_defaults(work: str) -> tuple[nn.Module, object]:
    """A model, and what it gives under torch's own defaults."""
    family, run = WORK[work]
    torch.manual_seed(0)
    model = loud(family)
    return model, run(copy.deepcopy(model))


@pytest.mark.parametrize("work", WORK)
def test_what_models_give_is_the_same(work, other_default):
    model, expected = by_own_defaults(work)
    other_default()
    found = WORK[work][1](copy.deepcopy(model))
    assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def test_an_upcycled_model_is_the_same(other_default):
    model = dense()
    expected = ms.upcycle(model, experts=4, noise=0.5, seed=3)(input_ids=IDS).logits
    other_default()
    assert torch.equal(ms.upcycle(model, experts=4, noise=0.5, seed=3)(input_ids=IDS).logits, expected)


def test_many_assignments_are_counted(other_default):
    ids = torch.cat([torch.full((n,), expert) for expert, n in enumerate((4000, 1000, 300))])[:, None]
    other_default()
    assert expert_load(ids, 3).dtype == torch.float32
    assert expert_load(ids, 3).tolist() == [4000, 1000, 300]
