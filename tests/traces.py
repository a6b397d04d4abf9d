"""Traces that tests share."""

import dataclasses

import torch

from moesaic.rules import route
from moesaic.trace.rule.derive import (
    Check,
    bias_of,
    check_can_derive,
    compare,
    derive,
    dtype_of,
    logits_of,
    weight_tolerance,
)
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


def check_layer(trace: Trace, layer: int = 0) -> Check:
    """`compare` for every token of a recorded layer: the proof that config and record belong together."""
    check_can_derive(trace, layer)
    derived = derive(logits_of(trace, layer), bias_of(trace, layer), trace.configs[layer], trace.picks[layer].long())
    weights = None if trace.weights is None else trace.weights[layer]
    tolerance = weight_tolerance(dtype_of(trace.dtypes.get("weights")))
    return compare(derived, trace.picks[layer].long(), weights, trace.configs[layer], tolerance)
