"""The article's own names, working as it shows them: MoEGate, create_moe_config, demo_moe_gate. This room prints.

Where the article's code was mended, docs/zh/2-moe-gate.md says how and why: the gate prints nothing, trains, takes any
leading shape, and the figure is drawn from the one forward that was recorded.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.config import MoEConfig
from moesaic.layer.balance import expert_load
from moesaic.layer.router import Router
from moesaic.rules import expand_groups, group_scores, kept_groups, score, weigh
from moesaic.trace.statistics.stats import layer_report
from moesaic.trace.store import Trace
from moesaic.types import Routing

MEASURES = {
    "max_over_mean": ("最大负载/平均负载", "max/mean load"),
    "max_vio": ("MaxVio (最大负载/平均负载 - 1)", "MaxVio (max/mean load - 1)"),
    "cv": ("变异系数 CV", "coefficient of variation CV"),
    "entropy": ("归一化熵", "normalised entropy"),
    "dead": ("死专家数", "dead experts"),
}
CHANCE = {"zh": "随机路由 5-95%:", "en": "chance 5-95%:"}
ASSETS = Path(__file__).parent / "assets"


class MoEGate(Router):
    """The article's gate: a Router that returns `(topk_idx, topk_weight)`, both [T, K].

    Takes a MoEConfig or any plain object with the article's fields. As in the article, one expert per token keeps its
    raw score (K=1 is not normalised). State-dict keys are those of Router and of transformers' DeepseekV3TopkRouter.
    """

    def __init__(self, config: Any, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        config = config if isinstance(config, MoEConfig) else MoEConfig.from_hf(config)
        super().__init__(config.with_convention("article"), device=device, dtype=dtype)

    def forward(  # pyrefly: ignore[bad-override]
        self, hidden_states: Float[Tensor, "*batch D"]
    ) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        routing = self.route(hidden_states)
        return routing.expert_ids, routing.weights

    def route(self, hidden_states: Float[Tensor, "*batch D"]) -> Routing:
        """The whole decision, logits included."""
        return super().forward(hidden_states)

    def visualize_routing_process(
        self,
        hidden_states: Float[Tensor, "*batch D"],
        save_path: str | Path = "moe_routing.png",
        *,
        lang: str = "zh",
        show: bool = False,
    ) -> Path:
        """Route once without gradients and save the 2x2 figure of that routing; returns where it was saved."""
        from moesaic.trace.figures.figure import routing_figure, save_figure

        with torch.no_grad():
            trace = self.trace(self.route(hidden_states))
        save_figure(routing_figure(trace, lang=lang, show=show), save_path)
        return Path(save_path)

    def trace(self, routing: Routing, seed: int | None = None) -> Trace:
        """A routing of this gate as a one-layer trace, for steps, statistics and figures."""
        return Trace.from_routings(
            {"gate": routing}, self.config, {"gate": self.e_score_correction_bias}, model="MoEGate", seed=seed
        )


def create_moe_config() -> Any:
    """The article's plain Config object: DeepSeek-V3's sizes with routed_scaling_factor 1.0 (released: 2.5)."""

    class Config:
        def __init__(self) -> None:
            self.num_experts_per_tok = 8
            self.n_routed_experts = 256
            self.routed_scaling_factor = 1.0
            self.scoring_func = "sigmoid"
            self.topk_method = "noaux_tc"
            self.n_group = 8
            self.topk_group = 4
            self.norm_topk_prob = True
            self.hidden_size = 7168

    return Config()


def demo_moe_gate(
    config: Any = None,
    *,
    title: str = "DeepSeek-V3",
    lang: str = "zh",
    seed: int = 0,
    batch_size: int = 4,
    seq_len: int = 64,
    save_path: str | Path = "moe_routing_visualization.png",
) -> Trace:
    """Print the article's transcript for a random gate on random input, save its figure, return what was recorded.

    Every number comes from one forward. The article's "负载均衡度" was 1.0 whatever happened; in its place stand
    measures that can fail, each beside what chance alone would give.
    """
    from moesaic.trace.figures.figure import routing_figure, save_figure

    template = _template(lang)
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        gate = MoEGate(create_moe_config() if config is None else config).eval()
        hidden_states = torch.randn(batch_size, seq_len, gate.config.hidden_size)
    finally:
        torch.set_rng_state(generator_state)
    with torch.no_grad():
        routing = gate.route(hidden_states)
    trace = gate.trace(routing, seed)
    shown = {"title": title, **_values(gate, hidden_states, routing, trace, lang)}
    before, after = template.split("{figure}\n")
    print(_fill(before, shown))
    save_figure(routing_figure(trace, lang=lang), save_path)
    print(_fill(after, {**shown, "path": save_path}))
    return trace


def _template(lang: str) -> str:
    if lang not in ("zh", "en"):
        raise ValueError(f"lang={lang!r} is unknown: use 'zh' or 'en'")
    return (ASSETS / f"transcript.{lang}.txt").read_text(encoding="utf-8")


def _fill(template: str, shown: dict[str, Any]) -> str:
    """The template's lines with their numbers; a line marked `[groups]` stays only where the gate has groups."""
    lines = []
    for line in template.splitlines():
        mark = re.match(r"\[(\w+)\]", line)
        if mark is None or mark[1] in shown["has"]:
            lines.append(line[mark.end() if mark else 0 :].format(**shown))
    return "\n".join(lines)


def _values(gate: MoEGate, x: Tensor, routing: Routing, trace: Trace, lang: str) -> dict[str, Any]:
    """Everything the transcript shows, from the recorded routing; `has` says which of its lines apply."""
    config, (logits, weights, ids) = gate.config, routing
    assert logits is not None  # our own router always has them
    scores = score(logits, config)
    bias = gate.e_score_correction_bias
    choice = scores if bias is None else scores + bias
    load = expert_load(ids, config.n_routed_experts)
    shown: dict[str, Any] = {
        "c": config, "x": x, "n": len(ids), "batch": x.shape[0], "seq": x.shape[1], "logits": logits,
        "choice": choice, "ids": ids, "weights": weights, "score_name": config.scoring_func.capitalize(),
        "x_range": f"[{x.min():.4f}, {x.max():.4f}]", "logits_stat": _stat(logits, mean=True),
        "scores_stat": _stat(scores, mean=True), "masked_stat": _stat(choice), "scaled_stat": _stat(weights),
        "unscaled_stat": _stat(weigh(scores, ids, dataclasses.replace(config, routed_scaling_factor=1.0))),
        "used": int((load > 0).sum()), "most": int(load.argmax()), "most_load": load.max().item(),
        "least": int(load.argmin()), "least_load": load.min().item(), "total": load.sum().item(),
        "expected": ids.numel(), "w_min": weights.min(), "w_max": weights.max(), "w_mean": weights.mean(),
        "w_std": weights.std(), "balance": _balance(trace, lang),
        "has": {
            name for name, there in {
                "bias": bias is not None, "groups": config.limits_groups, "scored": not config.score_after_topk,
                "norm": config.norm_topk_prob and ids.shape[1] > 1,
            }.items() if there
        },
    }  # fmt: skip
    if bias is not None:
        shown["bias_stat"] = _stat(bias)
    if config.limits_groups:
        by_group = group_scores(choice, config)
        kept = kept_groups(by_group, config)
        experts = expand_groups(kept, config)
        kept_ids = kept.nonzero()[:, 1].view(len(ids), config.topk_group)
        shown |= {
            "groups": by_group, "groups_stat": _stat(by_group), "kept": kept, "kept_ids": kept_ids,
            "first_group": int(kept_ids.min()), "last_group": int(kept_ids.max()), "kept_sum": float(kept.sum()),
            "open": experts, "open_sum": float(experts.sum()),
            "masked_stat": _stat(choice.masked_fill(~experts, config.mask_fill)),
        }  # fmt: skip
    return shown


def _balance(trace: Trace, lang: str) -> str:
    """What stands where the article printed "负载均衡度": measures that can fail, each beside chance."""
    report = layer_report(trace)
    lines = []
    for name, (zh, en) in MEASURES.items():
        value, band = report.measures[name].value, report.measures[name].band
        chance = "" if band is None else f"{CHANCE[lang]} {band.low:.4g} - {band.high:.4g}"
        lines.append(f"   - {zh if lang == 'zh' else en}: {value:.4g} ({chance})")
    verdict = {"zh": "结论", "en": "verdict"}[lang]
    return "\n".join([*lines, f"   - {verdict}: {report.verdict(lang)}"])


def _stat(values: Tensor, *, mean: bool = False) -> str:
    stat = f"min={values.min():.4f}, max={values.max():.4f}"
    return stat + f", mean={values.mean():.4f}" if mean else stat


if __name__ == "__main__":
    demo_moe_gate()
