"""Routing configs, inputs and circumstances that tests share."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from moesaic.config import MoEConfig
from moesaic.engine.matmul_forms import onednn_linear
from moesaic.types import ExpertWeights, Routing

# E, G, M, K: the article's, odd sizes, one group, every group kept, one expert per token
GRID = [
    (256, 8, 4, 8),
    (64, 8, 4, 6),
    (64, 8, 2, 8),
    (64, 8, 8, 8),
    (160, 8, 3, 6),
    (16, 4, 2, 4),
    (33, 3, 2, 5),
    (8, 1, 1, 2),
    (64, 4, 2, 1),
]


def v3(experts: int, groups: int, kept: int, k: int, **fields) -> MoEConfig:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "routed_scaling_factor": 2.5, **fields}
    return MoEConfig(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=k, **sizes)


@st.composite
def configs(draw: st.DrawFn, **fields) -> MoEConfig:
    """Any lawful V3-like config with up to 48 experts."""
    groups = draw(st.integers(1, 6))
    per_group = draw(st.integers(2, 8))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(8, kept * per_group)))
    return v3(groups * per_group, groups, kept, k, **fields)


# ways to choose, and to score and weigh, each a change of V3's
METHODS = {
    "noaux_tc": {},
    "noaux_tc by the best": {"group_score": "max"},
    "noaux_tc by K/M": {"group_score": "k_over_m_sum"},
    "group_limited_greedy": {"topk_method": "group_limited_greedy"},
    "greedy": {"topk_method": "greedy"},
}
RULES = {
    "V3": {},
    "not normalised": {"norm_topk_prob": False},
    "without eps": {"norm_eps": 0.0},
    "with a large eps": {"norm_eps": 0.25},
    "without scale": {"routed_scaling_factor": 1.0},
    "zero mask": {"group_mask": "zero"},
    "softmax": {"scoring_func": "softmax"},
    "softmax, not normalised": {"scoring_func": "softmax", "norm_topk_prob": False},
    "softmax after": {"scoring_func": "softmax", "score_after_topk": True, "norm_topk_prob": False},
    "softmax after, normalised": {"scoring_func": "softmax", "score_after_topk": True},
    "sigmoid after": {"score_after_topk": True},
    "sigmoid after, not normalised": {"score_after_topk": True, "norm_topk_prob": False},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
    "sqrtsoftplus after, not normalised": {
        "scoring_func": "sqrtsoftplus",
        "score_after_topk": True,
        "norm_topk_prob": False,
    },
}


def problem(tokens=20, d=16, width=8, n_experts=6, k=3, dtype=torch.float32, skew=None):
    """(x, ids, weights, experts) with leaves that want gradients; `skew` sends that share of slots to expert 2."""
    x = torch.randn(tokens, d, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)])
    if skew is not None:
        ids = torch.full((tokens, k), n_experts)
        ids[: math.ceil(tokens * skew), 0] = 2
    weights = torch.rand(tokens, k, dtype=dtype, requires_grad=True)
    up = nn.Parameter(torch.randn(n_experts, 2 * width, d, dtype=dtype) / d**0.5)
    down = nn.Parameter(torch.randn(n_experts, d, width, dtype=dtype) / width**0.5)
    return x, ids, weights, ExpertWeights(up, down)


def leaves_of(x, weights, experts):
    return [x, weights, *(w for w in experts if w is not None)]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where anything waits for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def in_every_way(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Each dtype with the `instructions` that it asks for: in 16 bits whether there are any, in bfloat16 AMX too."""
    asked = {torch.bfloat16: ("amx", "native", "none"), torch.float16: ("native", "none")}
    ways = [(dtype, instructions) for dtype in dtypes for instructions in asked.get(dtype, ("none",))]
    return pytest.mark.parametrize(("dtype", "instructions"), ways, indirect=["instructions"], ids=str)


HABITS = ["intel", "amd", "amd-avx2", "other"]  # of a BLAS, `moesaic.engine.processor.machine`
USE_ONEDNN = {"intel": [torch.float32], "amd": [torch.float32, torch.bfloat16]}


def needs_habit(habit: str, dtype: torch.dtype = torch.float32) -> None:
    """Skips where what a habit leaves to oneDNN, in a test of `dtype`, cannot run."""
    needs_onednn(*(used for used in USE_ONEDNN.get(habit, ()) if used in (torch.float32, dtype)))


def needs_onednn(*dtypes: torch.dtype) -> None:
    """Skips without oneDNN for these."""
    for dtype in dtypes:
        if not has_onednn(dtype):
            pytest.skip(f"no oneDNN for {dtype} here")


def has_onednn(dtype: torch.dtype) -> bool:
    """Not in every build of torch, and not on every CPU: it refuses bfloat16 without AVX-512."""
    try:
        onednn_linear(torch.ones(2, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


def check_routing(routing: Routing, num_experts: int) -> Routing:
    """Raise AssertionError unless shapes, dtypes and ids of a routing are lawful.

    jaxtyping does not look into the fields of a NamedTuple.
    """
    logits, weights, ids = routing
    assert weights.shape == ids.shape, f"weights {tuple(weights.shape)} and expert_ids {tuple(ids.shape)} differ"
    assert ids.dtype == torch.int64, f"expert_ids are {ids.dtype}, not int64"
    assert weights.is_floating_point(), f"weights are {weights.dtype}"
    if logits is not None:
        assert logits.shape == (len(ids), num_experts), f"logits {tuple(logits.shape)} for {num_experts} experts"
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        assert 0 <= low <= high <= num_experts, f"ids reach from {low} to {high} with {num_experts} experts"
        real = ids.sort(dim=-1).values
        twice = (real[:, 1:] == real[:, :-1]) & (real[:, 1:] < num_experts)
        assert not twice.any(), "a token chose the same expert twice"
    return routing
