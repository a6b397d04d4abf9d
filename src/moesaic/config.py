"""What an MoE layer is, in sizes and rules: DeepSeek / Hugging Face field names, checked once, at construction."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

from moesaic.families import CONVENTIONS, PRESETS
from moesaic.hf_config import read_config_json, read_family

CHOICES = {
    "scoring_func": ("sigmoid", "softmax", "sqrtsoftplus"),
    "topk_method": ("noaux_tc", "group_limited_greedy", "greedy", "balanced", "unknown"),
    "group_score": (None, "top2_sum", "max", "k_over_m_sum"),
    "group_mask": ("-inf", "zero"),
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"),
    "router_dtype": ("float32", "model"),
    "score_dtype": ("float32", "model"),
    "weights_dtype": ("float32", "model"),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and rules of one MoE layer. The defaults are the rules of DeepSeek-V3 without groups or shared experts.

    Raises ValueError, in one line that names field, value, rule and a way out, for anything that cannot be routed.
    """

    # sizes
    hidden_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int | None = None  # None = a gate without experts
    output_size: int | None = None  # None = hidden_size

    # shared experts
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None  # None = n_shared_experts * moe_intermediate_size
    shared_expert_gate: bool = False  # Qwen2: a sigmoid gate on the shared expert

    # selection
    scoring_func: str = "sigmoid"
    score_after_topk: bool = False  # rank logits, score the K kept ones (gpt-oss, classic MoE)
    topk_method: str = "noaux_tc"  # noaux_tc = with the correction bias; unknown = sizes only, as of a foreign record
    n_group: int = 1  # 1 = no group limit
    topk_group: int = 1
    group_score: str | None = None  # None = top2_sum with a bias, max without
    group_mask: str = "-inf"  # what masked experts are filled with; "zero" is an old bug, kept for comparison
    router_bias: bool = False  # a bias in the gate's linear (gpt-oss); reaches the weights, unlike the correction bias
    router_jitter_noise: float = 0.0  # training: the router sees its input times U(1 - noise, 1 + noise)

    # weights
    norm_topk_prob: bool = True
    norm_single_expert: bool = True  # False: with K=1 the raw score is the weight, so the router keeps a gradient
    norm_eps: float = 1e-20
    routed_scaling_factor: float = 1.0

    # dtypes of the router: "model" = that of the hidden states
    router_dtype: str = "float32"  # the gate's linear
    score_dtype: str = "float32"  # scores and weights while they are computed
    weights_dtype: str = "float32"  # weights as returned

    # experts
    hidden_act: str = "silu"
    gated: bool = True  # two projections up, one of them through the activation
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0  # slope inside the sigmoid of SiLU
    swiglu_up_offset: float = 0.0
    interleaved: bool = False  # gate and up rows alternate instead of lying one after the other
    transposed: bool = False  # weights stored [E, in, out]

    def __post_init__(self) -> None:
        self._check_types()
        self._check_names()
        self._check_sizes()
        self._check_groups()
        self._check_experts()

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def limits_groups(self) -> bool:
        """Whether the rule keeps some groups and shuts the others."""
        return self.n_group > 1 and self.topk_method in ("noaux_tc", "group_limited_greedy")

    @property
    def has_correction_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def rule_is_known(self) -> bool:
        """Whether picks can be derived from logits; False where only the sizes of a foreign layer are known."""
        return self.topk_method != "unknown"

    @property
    def group_score_rule(self) -> str:
        return self.group_score or ("top2_sum" if self.has_correction_bias else "max")

    @property
    def scores_of_group(self) -> int:
        """How many scores of a group, the best ones, make its own."""
        by_rule = {"max": 1, "top2_sum": 2, "k_over_m_sum": self.num_experts_per_tok // self.topk_group}
        return by_rule[self.group_score_rule]

    @property
    def normalises(self) -> bool:
        """Whether the weights of a token are divided by their sum."""
        return self.norm_topk_prob and (self.num_experts_per_tok > 1 or self.norm_single_expert)

    @property
    def mask_fill(self) -> float:
        return {"-inf": -math.inf, "zero": 0.0}[self.group_mask]

    @property
    def shared_width(self) -> int:
        """Intermediate size of the shared MLP: N_s experts are one MLP of N_s times the width."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * (self.moe_intermediate_size or 0)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MoEConfig":
        """A released model's layer by name; keyword arguments replace its fields."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown: use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_hf(cls, source: Any, **overrides: Any) -> "MoEConfig":
        """Read the layer out of a Hugging Face config: an object, a dict, or a folder with a config.json."""
        if isinstance(source, str | Path):
            source = read_config_json(Path(source))
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{**read_family(source, known), **overrides})

    @classmethod
    def of_sizes(cls, hidden_size: int, n_experts: int, k: int) -> "MoEConfig":
        """A layer of which the rule is not known: nothing may be derived from it."""
        return cls(hidden_size=hidden_size, n_routed_experts=n_experts, num_experts_per_tok=k, topk_method="unknown")

    def with_convention(self, name: str) -> "MoEConfig":
        """The same layer as another official code would route it, where official codes disagree (docs: parity)."""
        if name not in CONVENTIONS:
            raise ValueError(f"convention={name!r} is unknown: use one of {', '.join(CONVENTIONS)}")
        change = CONVENTIONS[name]
        return dataclasses.replace(self, **(change(self) if callable(change) else change))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Twelve hexadecimal digits that name this config in reports, and in logs that a later version may go on with:
        a field that is added must not change them where it has its default."""
        return digest_of(self.to_dict())

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            kinds: tuple[Any, ...] = get_args(field.type) or (field.type,)
            kind, *optional = kinds
            if value is None:
                if not optional:
                    raise ValueError(f"{name}=None is not allowed: give {KINDS[kind]}")
            elif kind is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a bool: use True or False")
            elif kind is int and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ValueError(f"{name}={value!r} is not an integer: give a whole number, unquoted")
            elif kind is float and (isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value)):
                raise ValueError(f"{name}={value!r} is not a finite number: give one such as 1.0")
            else:
                object.__setattr__(self, name, kind(value))  # numpy's integers, or 1 for 1.0: one spelling, one digest

    def _check_names(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {allowed}")

    def _check_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            least = 0 if name == "n_shared_experts" else 1
            if value is not None and value < least:
                raise ValueError(
                    f"{name}={value} must be at least {least}: give a {'count' if least == 0 else 'positive size'}"
                )
        for name in ("router_jitter_noise", "norm_eps"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1): use 0.0 to switch it off")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}: "
                f"use at most {self.n_routed_experts}"
            )

    def _check_groups(self) -> None:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if experts % groups:
            raise ValueError(
                f"n_routed_experts={experts} is not a multiple of n_group={groups}: "
                f"use {-(-experts // groups) * groups} experts or n_group={_divisor_near(experts, groups)}"
            )
        if kept > groups:
            raise ValueError(f"topk_group={kept} exceeds n_group={groups}: use at most {groups}")
        if groups == 1 or self.topk_method in ("greedy", "balanced"):
            return
        if self.group_score_rule == "top2_sum" and self.experts_per_group < 2:
            raise ValueError(
                f"n_group={groups} leaves one expert per group and group_score='top2_sum' needs two: "
                f"use n_group={_divisor_near(experts, groups // 2)} or group_score='max'"
            )
        k, within_reach = self.num_experts_per_tok, kept * self.experts_per_group
        if k > within_reach:
            raise ValueError(
                f"num_experts_per_tok={k} exceeds the {within_reach} experts of topk_group={kept} groups: "
                f"use topk_group={-(-k // self.experts_per_group)} or num_experts_per_tok={within_reach}"
            )
        if self.group_score_rule == "k_over_m_sum" and not 1 <= k // kept <= self.experts_per_group:
            raise ValueError(
                f"group_score='k_over_m_sum' sums num_experts_per_tok//topk_group={k // kept} scores of a group of "
                f"{self.experts_per_group}: use another topk_group or group_score='top2_sum'"
            )

    def _check_experts(self) -> None:
        """Refuse what would be ignored."""
        if self.swiglu_limit is not None and self.swiglu_limit <= 0:
            raise ValueError(f"swiglu_limit={self.swiglu_limit} clamps everything away: use None for no limit")
        plain = {"swiglu_limit": None, "swiglu_alpha": 1.0, "swiglu_up_offset": 0.0, "interleaved": False}
        special = [name for name, default in plain.items() if getattr(self, name) != default]
        if special and not self.gated:
            raise ValueError(
                f"{special[0]}={getattr(self, special[0])} is for gated experts: use gated=True or leave it"
            )
        if self.swiglu_alpha != 1.0 and self.hidden_act != "silu":
            raise ValueError(
                f"swiglu_alpha={self.swiglu_alpha} is the slope of SiLU: use hidden_act='silu' or leave it"
            )
        if self.n_shared_experts:
            if special or not self.gated:
                what = special[0] if special else "gated"
                raise ValueError(f"{what}={getattr(self, what)} is not known to shared experts: use n_shared_experts=0")
        elif self.shared_expert_gate or self.shared_expert_intermediate_size is not None:
            raise ValueError("n_shared_experts=0 has nothing to gate or to size: use n_shared_experts=1")


def check_is_config(config: object) -> None:
    """ValueError for a Hugging Face config or the article's, whose missing fields would else be named one by one."""
    if not isinstance(config, MoEConfig):
        raise ValueError(
            f"config is of class {type(config).__name__}: give MoEConfig.from_hf(config), for a layer of a config that "
            "has no size of its experts with moe_intermediate_size=..."
        )


def digest_of(fields: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of fields as they stand, whether this version has more of them or not."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


KINDS: dict[Any, str] = {bool: "True or False", int: "an integer", float: "a number", str: "a name"}
SIZES = (
    "hidden_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "output_size",
    "n_shared_experts", "shared_expert_intermediate_size", "n_group", "topk_group",
)  # fmt: skip


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _divisor_near(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller one of two. Beyond 65,536 none is looked for: n may be
    a stranger's. Beyond twice `wanted` none is nearer than 1."""
    return min((d for d in range(1, min(n, 2 * wanted, 1 << 16) + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
