"""Golden vectors of Megatron-Core's routing function.

Run: `pip install --no-deps megatron-core==0.16.1`, then `python tests/golden/make_megatron.py`.
"""

from collections.abc import Iterator
from importlib.metadata import version

import record
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

CONVENTIONS = {
    "group_score": "k_over_m_sum",
    "group_mask": "-inf",
    "norm_eps": 1e-20,
    "norm_single_expert": False,
    "router_dtype": "float32",
    "score_dtype": "model",
    "weights_dtype": "float32",
}


def trials() -> Iterator[record.Trial]:
    """Here sigmoid always normalises and softmax never; K < M is left out, as K // M = 0 experts score no group."""
    for trial in [*record.v3_grid(), *record.softmax_grid()]:
        if trial.norm != (trial.scoring == "sigmoid") or trial.shape == (32, 4, 4, 1):
            continue
        yield trial
        if trial.scoring == "softmax":
            yield trial._replace(softmax_last=True)
        if trial.dtype == "bfloat16":
            yield trial._replace(wide_router=False)
    yield from (record.Trial((32, 1, 1, 1), bias=bias) for bias in (None, "small"))
    yield from (record.Trial(shape, bias=None) for shape in (record.MIDDLE, (64, 8, 4, 4)))


def run(trial: record.Trial, inputs: record.Inputs):
    """The caller makes the logits: in float32 with moe_router_dtype=fp32, in the model's dtype without."""
    _, n_group, topk_group, k = trial.shape
    x, weight = (inputs.x.float(), inputs.weight.float()) if trial.wide_router else (inputs.x, inputs.weight)
    probs, chosen = topk_routing_with_score_function(
        F.linear(x, weight),
        k,
        use_pre_softmax=not trial.softmax_last,
        num_groups=n_group if n_group > 1 else None,
        group_topk=topk_group if n_group > 1 else None,
        scaling_factor=trial.scale,
        score_function=trial.scoring,
        expert_bias=inputs.bias,
    )
    expert_ids = chosen.nonzero()[:, 1].view(-1, k)  # the map has no slot order: ids ascend
    dtype = "float32" if trial.wide_router else "model"
    return expert_ids, probs.gather(1, expert_ids), {"router_dtype": dtype, "weights_dtype": dtype}


def main() -> None:
    torch.use_deterministic_algorithms(True)
    source = {
        "package": "megatron-core",
        "version": version("megatron-core"),
        "code": "megatron/core/transformer/moe/moe_utils.py: topk_routing_with_score_function",
        "install": "pip install --no-deps megatron-core==0.16.1",
        "command": "python tests/golden/make_megatron.py",
    }
    record.write("megatron", run, trials(), CONVENTIONS, source)


if __name__ == "__main__":
    main()
