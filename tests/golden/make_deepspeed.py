"""Golden vectors of DeepSpeed's TokenChoiceTopKRouter (AutoEP).

Run: `pip install --no-deps` with the names in INSTALL, then `python tests/golden/make_deepspeed.py`.
"""

from collections.abc import Iterator
from importlib.metadata import version

import record
from deepspeed.moe.ep_router import TokenChoiceTopKRouter

INSTALL = "deepspeed==0.19.8 psutil py-cpuinfo hjson msgpack ninja einops nvidia-ml-py"
CONVENTIONS = {
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_eps": 1e-20,
    "norm_single_expert": True,
    "router_dtype": "model",
    "score_dtype": "float32",
    "weights_dtype": "float32",
}


def trials() -> Iterator[record.Trial]:
    yield from record.v3_grid()
    yield from record.softmax_grid()
    yield record.Trial(record.MIDDLE, scoring="softmax", scale=1.0)


def run(trial: record.Trial, inputs: record.Inputs):
    """Softmax without bias is DeepSeek-V2's gate, whose groups this router scores by their best expert."""
    n_experts, n_group, topk_group, k = trial.shape
    rule = "max" if trial.bias is None else "top2_sum"
    router = TokenChoiceTopKRouter(
        dim=record.HIDDEN,
        num_experts=n_experts,
        num_expert_groups=n_group if n_group > 1 else None,
        num_limited_groups=topk_group if n_group > 1 else None,
        top_k=k,
        score_func=trial.scoring,
        route_norm=trial.norm,
        route_scale=trial.scale,
        gate_bias=False,
        group_score_func=rule,
    ).to(inputs.x.dtype)
    router.gate.weight.copy_(inputs.weight)
    router.e_score_correction_bias = inputs.bias
    weights, expert_ids, _ = router(inputs.x)
    return expert_ids, weights, {"group_score": rule}


def main() -> None:
    source = {
        "package": "deepspeed",
        "version": version("deepspeed"),
        "code": "deepspeed/moe/ep_router.py: TokenChoiceTopKRouter",
        "install": f"pip install --no-deps {INSTALL}",
        "command": "python tests/golden/make_deepspeed.py",
    }
    record.write("deepspeed", run, trials(), CONVENTIONS, source)


if __name__ == "__main__":
    main()
