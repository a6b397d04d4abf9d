"""Golden vectors of DeepSeek's own gates, executed from clones of DeepSeek's public repositories.

Run for each source: `python tests/golden/make_deepseek.py NAME CLONE`, with NAME a key of SOURCES and CLONE a clone (or
bare mirror) of its repository. Only the gate is executed, unchanged, at the commit given here; no code of it is stored.
"""

import __future__

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import nn

INFERENCE = {
    "group_score": "top2_sum",
    "group_mask": "-inf",
    "norm_eps": 0.0,
    "norm_single_expert": True,
    "router_dtype": "model",
    "score_dtype": "model",
    "weights_dtype": "model",
}
REMOTE = {
    "group_score": "top2_sum",
    "group_mask": "zero",
    "norm_eps": 1e-20,
    "norm_single_expert": False,
    "router_dtype": "float32",
    "score_dtype": "float32",
    "weights_dtype": "float32",
}
SOURCES: dict[str, dict[str, str]] = {
    "deepseek-v3-inference": {
        "repository": "https://github.com/deepseek-ai/DeepSeek-V3",
        "commit": "9b4e9788e4a3a731f7567338ed15d3ec549ce03b",
        "code": "inference/model.py: Gate, linear",
    },
    "deepseek-v3-inference-first": {
        "repository": "https://github.com/deepseek-ai/DeepSeek-V3",
        "commit": "4c2fdb8f55e049553b9f4f1a3241f86d739c8cf8",
        "code": "inference/model.py: Gate, linear",
    },
    "deepseek-v3-remote": {
        "repository": "https://github.com/deepseek-ai/DeepSeek-VL2",
        "commit": "faf18023f24b962b32d9f0a2d89e402a8d383a78",
        "code": "deepseek_vl2/models/modeling_deepseek.py: MoEGate",
        "note": 'calls itself "compatible with both DeepSeekV2 and DeepSeekV3"',
    },
    "deepseek-v2-remote": {
        "repository": "https://github.com/deepseek-ai/ESFT",
        "commit": "809d0e377e7c5ce3d4b29d6503d67c31fbb229c2",
        "code": "deepseek/modeling_deepseek.py: MoEGate",
        "note": "the authors' own copy of DeepSeek-V2's remote code",
    },
}


def official(clone: str, source: dict[str, str]) -> dict[str, Any]:
    """The named classes and functions of the official file, compiled alone: the rest of it needs GPU kernels."""
    path, names = source["code"].split(": ")
    show = ["git", "-C", clone, "show", f"{source['commit']}:{path}"]
    tree = ast.parse(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    wanted = [node for node in tree.body if getattr(node, "name", None) in names.split(", ")]
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math}
    code = compile(ast.Module(wanted, []), path, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, namespace)
    return namespace


def inference_gate(gate_class: Any) -> record.Gate:
    """Its groups are scored by two experts with a bias and by one without; only sigmoid is normalised, then always."""

    def run(trial: record.Trial, inputs: record.Inputs):
        n_experts, n_group, topk_group, k = trial.shape
        args = SimpleNamespace(
            dim=record.HIDDEN,
            n_routed_experts=n_experts,
            n_activated_experts=k,
            n_expert_groups=n_group,
            n_limited_groups=topk_group,
            score_func=trial.scoring,
            route_scale=trial.scale,
        )
        gate = gate_class(args)
        gate.weight = nn.Parameter(inputs.weight)
        gate.bias = None if inputs.bias is None else nn.Parameter(inputs.bias)  # its own rule: only if dim == 7168
        weights, expert_ids = gate(inputs.x)
        own = {"group_score": "max"} if inputs.bias is None else {}
        if trial.scoring == "softmax":
            own["score_dtype"] = "float32"
        return expert_ids, weights, own

    return run


def remote_gate(gate_class: Any, *, scales_normalised: bool) -> record.Gate:
    """The gate of the modelling files; V2's leaves normalised weights unscaled."""

    def run(trial: record.Trial, inputs: record.Inputs):
        own: dict[str, Any] = {"group_score": "max"} if inputs.bias is None else {}
        config = SimpleNamespace(**record.fields(trial, REMOTE), aux_loss_alpha=0.0, seq_aux=True)
        gate = gate_class(config).eval()
        gate.weight.copy_(inputs.weight)
        if inputs.bias is not None:
            gate.e_score_correction_bias.copy_(inputs.bias)
        expert_ids, weights, _ = gate(inputs.x.unsqueeze(0))
        if trial.norm and trial.shape[-1] > 1 and not scales_normalised:
            own["routed_scaling_factor"] = 1.0
        return expert_ids, weights, own

    return run


def inference_trials() -> Iterator[record.Trial]:
    """No flag for the norm: sigmoid always, softmax never."""
    yield from (trial for trial in record.v3_grid() if trial.norm)
    yield from (trial for trial in record.softmax_grid() if not trial.norm)
    yield from (record.Trial(shape, bias=None) for shape in (record.MIDDLE, (64, 1, 1, 8)))
    yield record.Trial(record.MIDDLE, scoring="softmax", norm=False)


def main(name: str, clone: str) -> None:
    source = SOURCES[name]
    names = official(clone, source)
    trials: Iterator[record.Trial]
    if name == "deepseek-v3-inference":
        gate, conventions, trials = inference_gate(names["Gate"]), INFERENCE, inference_trials()
    elif name == "deepseek-v3-inference-first":  # its bias had the model's dtype: only float32 cases are comparable
        gate, conventions = inference_gate(names["Gate"]), {**INFERENCE, "group_mask": "zero"}
        trials = (trial for trial in inference_trials() if trial.dtype == "float32")
    elif name == "deepseek-v3-remote":
        gate, conventions = remote_gate(names["MoEGate"], scales_normalised=True), REMOTE
        trials = iter([*record.v3_grid(), *record.softmax_grid(), record.Trial(record.MIDDLE, bias=None)])
    else:
        gate, conventions = remote_gate(names["MoEGate"], scales_normalised=False), {**REMOTE, "group_score": "max"}
        trials = record.softmax_grid()
    command = f"python tests/golden/make_deepseek.py {name} CLONE"
    record.write(name, gate, trials, conventions, {**source, "command": command})


if __name__ == "__main__":
    main(*sys.argv[1:])
