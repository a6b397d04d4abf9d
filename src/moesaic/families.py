"""Released models as data: presets, how each Hugging Face family spells, routes and computes, where codes disagree."""

from collections.abc import Callable
from typing import Any

# How families route: only what their config.json does not say itself.

V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
IN_MODEL_DTYPE = {"router_dtype": "model", "weights_dtype": "model"}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", **IN_MODEL_DTYPE}
GPT_OSS = {
    **SOFTMAX, "score_after_topk": True, "norm_topk_prob": False, "score_dtype": "model", "router_bias": True,
    "expert_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "swiglu_up_offset": 1.0,
    "interleaved": True, "transposed": True,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": V3,
    "glm4_moe": V3,
    "dots1": V3,
    "kimi_k2": V3,
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    "mixtral": {**SOFTMAX, "norm_topk_prob": True, "weights_dtype": "float32"},
    "qwen2_moe": {**SOFTMAX, "norm_topk_prob": False, "n_shared_experts": 1, "shared_expert_gate": True},
    "qwen3_moe": {**SOFTMAX, "norm_topk_prob": False},
    "olmoe": {**SOFTMAX, "norm_topk_prob": False},
    "gpt_oss": GPT_OSS,
}

# More families whose routing is one of ours: rules, and which of them config.json decides. Only the routing is claimed,
# so MoEConfig.from_hf makes a gate of them, without experts. Each is proven by tests/test_trace_families.py: what the
# rule derives from the logits of a random model is what that model picked.
ALL_IN_MODEL_DTYPE = {**IN_MODEL_DTYPE, "score_dtype": "model"}
GROUPS = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
SOFTMAX_OF_KEPT = {**SOFTMAX, "score_after_topk": True, "norm_topk_prob": False}
ALWAYS_NORMALISED = {"norm_topk_prob": True, "norm_eps": 0.0}
ROUTING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "axk1", "bailing_hybrid", "deepseek_v32", "dots3_note_text", "exaone_moe", "glm4_moe_lite",
            "glm_moe_dsa", "hy_v4", "kimi_linear", "nemotron_h",
            "solar_open",
        ),
        (V3, GROUPS),
    ),
    "afmoe": ({**V3, "norm_topk_prob": True, "router_dtype": "model"}, ("routed_scaling_factor",)),
    "aria_text": ({**SOFTMAX_OF_KEPT, "score_dtype": "model"}, ()),
    "axk2": ({**V3, "group_mask": "zero"}, GROUPS),
    "beam": (V3, ("n_group", "topk_group", "norm_topk_prob")),
    "cohere2_moe": (SOFTMAX_OF_KEPT, ("scoring_func", "norm_topk_prob")),
    **dict.fromkeys(
        ("deepseek_ocr2_text", "unlimited_ocr_text"),
        ({"scoring_func": "softmax", "norm_topk_prob": False}, ("topk_method", *GROUPS[:2], "routed_scaling_factor")),
    ),
    "deepseek_v4": (
        {"topk_method": "noaux_tc", "norm_topk_prob": True, **ALL_IN_MODEL_DTYPE},
        ("scoring_func", "routed_scaling_factor"),
    ),
    "inkling2_text": (
        {"topk_method": "noaux_tc", "norm_topk_prob": True, **ALL_IN_MODEL_DTYPE, "router_dtype": "float32"},
        ("scoring_func", "routed_scaling_factor"),
    ),
    "ernie4_5_moe": (
        {"scoring_func": "softmax", "topk_method": "noaux_tc", "weights_dtype": "model", **ALWAYS_NORMALISED}, (),
    ),
    "flint": ({"scoring_func": "sigmoid", "topk_method": "greedy", "norm_eps": 0.0}, ("norm_topk_prob",)),
    **dict.fromkeys(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), (SOFTMAX_OF_KEPT, ())
    ),
    "hunyuan_v1_moe": ({"scoring_func": "softmax", "topk_method": "greedy", **ALWAYS_NORMALISED}, ()),
    "hy_v3": ({**V3, "norm_topk_prob": True}, ("routed_scaling_factor",)),
    "inkling2_loop_text": (
        {"topk_method": "noaux_tc", "norm_topk_prob": True}, ("scoring_func", "routed_scaling_factor"),
    ),
    "jamba": ({**SOFTMAX, "norm_topk_prob": False}, ()),
    "kolibri1": ({**V3, "score_after_topk": True, "norm_eps": 0.0}, ("norm_topk_prob",)),
    "laguna": ({**V3, **ALWAYS_NORMALISED, **IN_MODEL_DTYPE}, ()),
    "lara_mini": ({**SOFTMAX, "router_dtype": "float32"}, ("norm_topk_prob",)),
    "lfm2_moe": ({**V3, "norm_eps": 1e-6, **ALL_IN_MODEL_DTYPE}, ("norm_topk_prob", "routed_scaling_factor")),
    "minimax": ({**SOFTMAX, "norm_topk_prob": True, "weights_dtype": "float32"}, ()),
    **dict.fromkeys(
        ("minimax_m2", "minimax_m3_vl_text"), ({**V3, **ALWAYS_NORMALISED, "router_dtype": "model"}, ())
    ),
    "mistral4": (
        {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "group_score": "top2_sum",
         "group_mask": "zero", **ALL_IN_MODEL_DTYPE},
        GROUPS,
    ),
    "mistral_large4_text": (
        {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "group_score": "top2_sum",
         "group_mask": "zero", "norm_topk_prob": True},
        ("n_group", "topk_group", "routed_scaling_factor"),
    ),
    "muse_spark_text": ({**V3, "norm_topk_prob": True, "norm_eps": 1e-15}, ("routed_scaling_factor",)),
    "openai_privacy_filter": (  # the weights of gpt-oss, divided by K
        {**SOFTMAX_OF_KEPT, "router_dtype": "float32", "router_bias": True, "routed_scaling_factor": "1/K"}, (),
    ),
    **dict.fromkeys(
        ("flex_olmo", "mellum", "qwen3_next"),
        (SOFTMAX, ("norm_topk_prob",)),
    ),
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"), ({**SOFTMAX, "norm_topk_prob": True}, ())
    ),
}  # fmt: skip
GATE_SIZES = ("hidden_size", "n_routed_experts", "num_experts_per_tok")  # what a gate needs, whatever its rules

# transformers hard-codes these for the family, whatever config.json says
FIXED: dict[str, tuple[str, ...]] = {
    "deepseek_v2": ("norm_topk_prob",),  # its router never normalises
    "mixtral": ("norm_topk_prob",),
    "gpt_oss": ("norm_topk_prob", "hidden_act"),
}

ALIASES: dict[str, tuple[str, ...]] = {
    "n_routed_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k", "top_k_experts",
    ),
    "routed_scaling_factor": ("routed_scaling_factor", "route_scale", "router_scaling_factor"),
    "scoring_func": ("scoring_func", "expert_selection_fn"),
    "n_group": ("n_group", "num_expert_group"),
    "norm_topk_prob": ("norm_topk_prob", "moe_renormalize"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
}  # fmt: skip

# parts of a layer that some families name otherwise in a state dict: gpt-oss the first, Qwen2-MoE the others
PART_ALIASES = {
    "router": "gate",
    "shared_expert": "shared_experts",
    "shared_expert_gate": "shared_experts.gate",
}


def rule_of(family: str) -> dict[str, Any] | None:
    """What a family of transformers routes by, beside what its config.json says; None where it is not known here."""
    if family in FAMILIES:
        return FAMILIES[family]
    rules, _ = ROUTING.get(family) or ROUTING.get(f"{family}_text") or (None, ())
    return rules


PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        **V3, "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "deepseek-v2": {
        "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
        "hidden_size": 5120, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_experts_per_tok": 6,
        "n_group": 8, "topk_group": 3, "n_shared_experts": 2, "routed_scaling_factor": 16.0,
    },
    "glm4-moe": {
        **V3, "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    },
    "mixtral": {
        **FAMILIES["mixtral"], "hidden_size": 4096, "moe_intermediate_size": 14336,
        "n_routed_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen3-moe": {
        **FAMILIES["qwen3_moe"], "hidden_size": 2048, "moe_intermediate_size": 768,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "olmoe": {
        **FAMILIES["olmoe"], "hidden_size": 2048, "moe_intermediate_size": 1024,
        "n_routed_experts": 64, "num_experts_per_tok": 8,
    },
    "gpt-oss": {
        **FAMILIES["gpt_oss"], "hidden_size": 2880, "moe_intermediate_size": 2880,
        "n_routed_experts": 128, "num_experts_per_tok": 4,
    },
    "classic": {
        "scoring_func": "softmax", "score_after_topk": True, "topk_method": "greedy", "norm_topk_prob": False,
        "gated": False, "hidden_act": "relu", "hidden_size": 32, "moe_intermediate_size": 64, "output_size": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip

# Where official codes disagree: what to change in a config, which routes as transformers does, to route as they do.
# Each is proven by vectors that the official code made: tests/golden/README.md.


def _deepseek_v3_inference(config: Any) -> dict[str, Any]:
    softmax = config.scoring_func == "softmax"  # computed in float32 and never normalised; sigmoid always is
    score_dtype = {"score_dtype": "float32"} if softmax else {}
    return {**ALL_IN_MODEL_DTYPE, **score_dtype, "norm_topk_prob": not softmax, "norm_eps": 0.0}


def _deepseek_v2_remote(config: Any) -> dict[str, Any]:
    normalised = config.norm_topk_prob and config.num_experts_per_tok > 1  # then its weights are not scaled
    scale = 1.0 if normalised else config.routed_scaling_factor
    return {"group_mask": "zero", "norm_single_expert": False, "routed_scaling_factor": scale}


def _megatron(config: Any) -> dict[str, Any]:
    rules = {"group_score": "k_over_m_sum", "norm_single_expert": False, "score_dtype": "model"}
    return {**rules, "norm_topk_prob": config.scoring_func != "softmax"}


CONVENTIONS: dict[str, dict[str, Any] | Callable[[Any], dict[str, Any]]] = {
    "article": {"norm_single_expert": False},
    "deepseek-v3-inference": _deepseek_v3_inference,
    "deepseek-v3-inference-first": lambda config: {**_deepseek_v3_inference(config), "group_mask": "zero"},
    "deepseek-v3-remote": {"group_mask": "zero", "norm_single_expert": False},
    "deepseek-v2-remote": _deepseek_v2_remote,
    "megatron": _megatron,
    "deepspeed": {"router_dtype": "model"},
    "torchtitan": {**ALL_IN_MODEL_DTYPE, "group_score": "top2_sum"},
}

# Preset -> its family in transformers; the classic MoE is none of them.
FAMILY_OF = {name: family for name in PRESETS if (family := name.replace("-", "_")) in FAMILIES}
# Family -> our field -> how its config.json of transformers 5.24 spells it; most fields of V3 have our own names.
SIZES = ("hidden_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_act")
OWN = dict.fromkeys(SIZES)  # spelled as ours
OWN_V3 = {
    **OWN,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")),
}
SPELLINGS: dict[str, dict[str, str | None]] = {
    "deepseek_v3": OWN_V3,
    "glm4_moe": OWN_V3,
    "dots1": OWN_V3,
    "deepseek_v2": {**{name: None for name in OWN_V3 if name != "norm_topk_prob"}, "topk_method": None},
    "mixtral": {
        **OWN, "n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size",
        "router_jitter_noise": None,
    },
    "qwen2_moe": {
        **OWN, "n_routed_experts": "num_experts", "norm_topk_prob": None, "shared_expert_intermediate_size": None,
    },
    "qwen3_moe": {**OWN, "n_routed_experts": "num_experts", "norm_topk_prob": None},
    "olmoe": {
        **OWN, "n_routed_experts": "num_experts", "moe_intermediate_size": "intermediate_size", "norm_topk_prob": None,
    },
    "gpt_oss": {
        **{name: None for name in SIZES if name != "hidden_act"}, "n_routed_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size", "swiglu_limit": None, "swiglu_alpha": None,
    },
}  # fmt: skip
# What our engines say of the experts of the families of transformers 5.24, as docs/en/hf-drop-in.md has it (tested).
EXPERTS = {
    "silu": """afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 dots1
        dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa
        granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 inkling jamba kimi_linear
        kolibri1 laguna lara_mini lfm2_moe mellum mimo_v2_flash minimax minimax_m2 mistral4 mistral_large4 mixtral olmoe
        phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open unlimited_ocr
        zaya""",
    "silu, limit=10": "deepseek_v4 glm5_next hy_v4 hy_v4_vl",
    "gelu_pytorch_tanh": "diffusion_gemma gemma4",
    "silu, gate_softcap=4, up_softcap=25": "inkling2 inkling2_loop",
    "relu2, not gated": "nemotron_h",
    "silu, limit=7, alpha=1.702, up_offset=1": "minimax_m3_vl",
    "silu, limit=7, alpha=1.702, up_offset=1, interleaved, transposed, biases": "gpt_oss",
    "silu, limit=7, alpha=1.702, up_offset=1, transposed, biases": "openai_privacy_filter",
    "silu, transposed": "aria",
    "refused: normalises the output of every expert before it is weighted": "muse_spark",
}
BY_THEMSELVES = ["dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"]
ENGINE = {family: verdict for verdict, names in EXPERTS.items() for family in names.split()}
