"""Traces that tests share."""

import dataclasses

import torch

from moesaic.rules import route
from moesaic.trace.store import Trace


def made(config, n_tokens=12, layers=2, seed=0, **fields) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    routings, biases = {}, {}
    for layer in range(layers):
        logits = torch.randn(n_tokens, config.n_routed_experts, generator=generator)
        bias = torch.randn(config.n_routed_experts, generator=generator)
        routings[f"layers.{layer}"], biases[f"layers.{layer}"] = route(logits, bias, config), bias
    return Trace.from_routings(routings, config, biases, **fields)


def assert_equal(a: Trace, b: Trace) -> None:
    for field in dataclasses.fields(Trace):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name
