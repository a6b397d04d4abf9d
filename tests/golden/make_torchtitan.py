"""Golden vectors of TorchTitan's TokenChoiceTopKRouter.

Run: `pip install --no-deps` with the names in INSTALL, then `python tests/golden/make_torchtitan.py`.
"""

import warnings
from collections.abc import Iterator
from importlib.metadata import version

import record
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import TokenChoiceTopKRouter

INSTALL = "torchtitan==0.3.0 spmd_types tyro torch_checkpointing docstring_parser typeguard shtab triton"
CONVENTIONS = {
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_eps": 1e-20,
    "norm_single_expert": True,
    "router_dtype": "model",
    "score_dtype": "model",
    "weights_dtype": "model",
}


def trials() -> Iterator[record.Trial]:
    yield from record.v3_grid()
    yield from record.softmax_grid()


def run(trial: record.Trial, inputs: record.Inputs):
    """On a CPU the router's autocast to float32 does nothing, so bfloat16 stays bfloat16 up to the bias."""
    n_experts, n_group, topk_group, k = trial.shape
    config = TokenChoiceTopKRouter.Config(
        num_experts=n_experts,
        gate=Linear.Config(in_features=record.HIDDEN, out_features=n_experts),
        num_expert_groups=n_group if n_group > 1 else None,
        num_limited_groups=topk_group if n_group > 1 else None,
        top_k=k,
        score_func=trial.scoring,
        route_norm=trial.norm,
        route_scale=trial.scale,
    )
    router = TokenChoiceTopKRouter(config).to(inputs.x.dtype)
    router.gate.weight.copy_(inputs.weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast")
        weights, expert_ids, _ = router(inputs.x.unsqueeze(0), inputs.bias)
    return expert_ids[0], weights[0], {}


def main() -> None:
    source = {
        "package": "torchtitan",
        "version": version("torchtitan"),
        "code": "torchtitan/models/common/moe.py: TokenChoiceTopKRouter",
        "install": f"pip install --no-deps {INSTALL}",
        "command": "python tests/golden/make_torchtitan.py",
    }
    record.write("torchtitan", run, trials(), CONVENTIONS, source)


if __name__ == "__main__":
    main()
