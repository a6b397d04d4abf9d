"""What the generator scripts share: the grid of cases, their inputs, the count of ties, and the writer."""

import json
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).parent
TOKENS = 32
HIDDEN = 16

# E, G, M, K. 64/8/2/8 and 64/8/4/4 tell a top-2 group score from a top-(K/M) one; in 8/4/3/4 and 32/4/3/10 there are
# fewer closed experts than picks, so a mask of 0.0 and negative scores give a unique wrong answer instead of ties.
SHAPES = [
    (256, 8, 4, 8),
    (160, 8, 3, 6),
    (64, 8, 4, 6),
    (64, 8, 2, 8),
    (64, 8, 4, 4),
    (64, 8, 8, 8),
    (16, 4, 2, 4),
    (12, 3, 2, 5),
    (8, 4, 3, 4),
    (32, 4, 3, 10),
    (32, 4, 4, 1),
    (64, 1, 1, 8),
    (384, 1, 1, 8),
]
WIDE, MIDDLE, SMALL = SHAPES[0], SHAPES[2], SHAPES[6]


class Trial(NamedTuple):
    """One planned call: what is given to the official gate."""

    shape: tuple[int, int, int, int]
    bias: str | None = "small"
    dtype: str = "float32"
    norm: bool = True
    scale: float = 2.5
    scoring: str = "sigmoid"
    ties: bool = False  # every other token scores all experts alike
    faint: bool = False  # all scores near 1e-28, where 1e-20 in a denominator shows
    softmax_last: bool = False  # scoring after top-k, over the K chosen logits; only some gates can
    wide_router: bool = True  # logits in float32 where the gate leaves that to its caller

    @property
    def name(self) -> str:
        said = {" ties": self.ties, " faint": self.faint, " softmax_last": self.softmax_last}
        said[" narrow_router"] = not self.wide_router
        flags = f"norm={self.norm} scale={self.scale}" + "".join(word for word, true in said.items() if true)
        return f"{'/'.join(map(str, self.shape))} {self.scoring} bias={self.bias} {self.dtype} {flags}"


class Inputs(NamedTuple):
    x: Tensor  # [T, D], in the trial's dtype
    weight: Tensor  # [E, D], same
    bias: Tensor | None  # float32 [E]


Gate = Callable[[Trial, Inputs], tuple[Tensor, Tensor, dict[str, Any]]]


def v3_grid() -> Iterator[Trial]:
    """Sigmoid gates with a correction bias: every shape, then biases, dtypes and flags on a few of them."""
    yield from (Trial(shape) for shape in SHAPES)
    yield from (Trial(shape, bias=kind) for shape in (WIDE, MIDDLE, SMALL) for kind in ("zeros", "minus2", "wide"))
    yield from (Trial(shape, bias="minus2") for shape in (SHAPES[8], SHAPES[9]))
    yield from (Trial(shape, bias=kind, dtype="bfloat16") for shape in (WIDE, MIDDLE) for kind in ("zeros", "small"))
    yield from (Trial(shape, dtype="bfloat16") for shape in (SHAPES[1], SHAPES[-1]))
    yield Trial(SMALL, bias="wide", dtype="bfloat16")
    yield Trial(MIDDLE, scale=1.0)
    yield Trial(MIDDLE, norm=False)
    yield Trial(MIDDLE, norm=False, scale=1.0)
    yield Trial((32, 4, 4, 1), norm=False)
    yield Trial(SMALL, bias="zeros", ties=True)
    yield Trial(SMALL, bias="zeros", faint=True)


def softmax_grid(bias: str | None = None) -> Iterator[Trial]:
    """Softmax gates: DeepSeek-V2's shape and smaller ones, grouped and not, both flags of the norm."""
    shapes = [SHAPES[1], MIDDLE, (64, 8, 2, 8), (64, 8, 4, 4), SMALL, (32, 4, 4, 1), (64, 1, 1, 8)]
    for shape in shapes:
        yield from (Trial(shape, bias=bias, norm=norm, scale=16.0, scoring="softmax") for norm in (False, True))
    yield Trial(MIDDLE, bias=bias, dtype="bfloat16", norm=False, scale=1.0, scoring="softmax")
    yield Trial((64, 1, 1, 8), bias=bias, dtype="bfloat16", norm=True, scale=1.0, scoring="softmax")


def make_inputs(trial: Trial) -> Inputs:
    """Inputs of a trial: x and weight are 8-bit integers times a power of two, exact in float16, bfloat16 and float32.

    Sums of 16 products stay under 2^24, so logits (deviation about 2) are exact in float32 in any order of summation.
    """
    n_experts = trial.shape[0]
    generator = torch.Generator().manual_seed(n_experts)

    def integers(rows: int) -> Tensor:
        return (torch.randn(rows, HIDDEN, generator=generator) * 64).round().clamp(-255, 255)

    x, weight = integers(TOKENS) / 64, integers(n_experts) / 128
    small, wide = torch.randn(n_experts, generator=generator), torch.rand(n_experts, generator=generator)
    biases = {"zeros": 0 * small, "small": small / 10, "minus2": 0 * small - 2, "wide": 100 * wide - 50}
    if trial.ties:
        x[::2] = 0
    if trial.faint:
        x[:, -1], weight[:, -1] = 64, -1
    dtype = getattr(torch, trial.dtype)
    return Inputs(x.to(dtype), weight.to(dtype), None if trial.bias is None else biases[trial.bias])


def fields(trial: Trial, conventions: dict[str, Any]) -> dict[str, Any]:
    """The trial in MoEConfig's field names."""
    n_experts, n_group, topk_group, k = trial.shape
    plain = "greedy" if n_group == 1 else "group_limited_greedy"
    return {
        "hidden_size": HIDDEN,
        "n_routed_experts": n_experts,
        "num_experts_per_tok": k,
        "n_group": n_group,
        "topk_group": topk_group,
        "scoring_func": trial.scoring,
        "topk_method": plain if trial.bias is None else "noaux_tc",
        "norm_topk_prob": trial.norm,
        "routed_scaling_factor": trial.scale,
        "score_after_topk": trial.softmax_last,
        **conventions,
    }


def tied_rows(inputs: Inputs, settings: dict[str, Any], expert_ids: Tensor) -> Tensor:
    """Rows whose answer exact ties leave open: between a kept and a closed group, or a chosen and another expert.

    A row too many may be marked (equal groups that were both kept), never one too few.
    """
    wide = settings["router_dtype"] == "float32"
    logits = F.linear(inputs.x.float(), inputs.weight.float()) if wide else F.linear(inputs.x, inputs.weight)
    choice = logits.float() if settings["score_dtype"] == "float32" else logits
    if not settings["score_after_topk"]:
        choice = choice.sigmoid() if settings["scoring_func"] == "sigmoid" else choice.softmax(-1)
    if inputs.bias is not None:
        choice = choice + inputs.bias
    tied = torch.zeros(len(choice), dtype=torch.bool)
    if settings["n_group"] > 1:
        k_over_m = settings["num_experts_per_tok"] // settings["topk_group"]
        best = {"max": 1, "top2_sum": 2, "k_over_m_sum": k_over_m}[settings["group_score"]]
        by_group = choice.unflatten(-1, (settings["n_group"], -1))
        group_scores = by_group.topk(best, dim=-1).values.sum(-1)
        kept = group_scores.topk(settings["topk_group"], dim=-1).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        worst = group_scores.gather(1, kept).amin(-1, keepdim=True)
        tied = ((group_scores == worst) & closed).any(-1)
        fill = {"-inf": -torch.inf, "zero": 0.0}[settings["group_mask"]]
        choice = by_group.masked_fill(closed.unsqueeze(-1), fill).flatten(1)
    chosen = torch.zeros_like(choice, dtype=torch.bool).scatter(1, expert_ids, True)
    worst = choice.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    return tied | ((choice == worst) & ~chosen).any(-1)


def write(name: str, gate: Gate, trials: Iterable[Trial], conventions: dict[str, Any], source: dict[str, str]) -> None:
    """Run the official gate on every trial and store inputs, answers and provenance as NAME.npz and NAME.json.

    `gate` returns ids [T, K], weights [T, K] and the settings of this call that differ from `conventions`.
    """
    arrays: dict[str, np.ndarray] = {}
    described = []
    for i, trial in enumerate(trials):
        inputs = make_inputs(trial)
        with torch.no_grad():
            expert_ids, weights, own = gate(trial, inputs)
        settings = fields(trial, {**conventions, **own})
        tied = tied_rows(inputs, settings, expert_ids)
        kind = f"{trial.shape[0]}" + "/ties" * trial.ties + "/faint" * trial.faint
        keys = {"x": f"x/{kind}", "weight": f"weight/{kind}"}
        arrays |= {keys["x"]: inputs.x.half().numpy(), keys["weight"]: inputs.weight.half().numpy()}
        if inputs.bias is not None:
            keys["bias"] = f"bias/{trial.shape[0]}/{trial.bias}"
            arrays[keys["bias"]] = inputs.bias.numpy()
        answers = {"expert_ids": expert_ids.short(), "weights": weights.float(), "tied": tied}
        arrays |= {f"case_{i}/{key}": answer.numpy() for key, answer in answers.items()}
        about = {"name": trial.name, "bias": str(trial.bias), "weights_dtype": str(weights.dtype)}
        case = {"dtype": trial.dtype, "tied_rows": int(tied.sum()), "about": about, "inputs": keys}
        described.append({**case, "settings": settings})
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    made = {"made": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    record = {"name": name, **source, **made, "conventions": conventions, "cases": described}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
