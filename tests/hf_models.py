"""Tiny random Hugging Face models, one a family."""

import inspect

import pytest
import torch
import transformers as hf
from torch import nn

from moesaic.hf.experts import is_on_seam

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED = {
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}  # fmt: skip
NARROW = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, {**LATENT, **GROUPED}),
    "deepseek_v2": (
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        {**LATENT, **GROUPED, "topk_method": "group_limited_greedy"},
    ),
    "glm4_moe": (hf.Glm4MoeConfig, hf.Glm4MoeForCausalLM, {**GROUPED, "head_dim": 16}),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {"num_local_experts": 8}),
    "qwen2_moe": (hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, {**NARROW, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, {**NARROW, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": (hf.OlmoeConfig, hf.OlmoeForCausalLM, {"num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM, {"num_local_experts": 8, "head_dim": 16}),
}

# more families on transformers' experts interface, each for something of its own; skipped where transformers lacks it
MORE_FAMILIES = {
    "aria": ("AriaTextConfig", "AriaTextForCausalLM", {"moe_num_experts": 8, "moe_topk": 2}),  # transposed
    "beam": (  # gate times up in float32
        "BeamConfig",
        "BeamForCausalLM",
        {**NARROW, "n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "deepseek_v4": (  # a limit
        "DeepseekV4Config",
        "DeepseekV4ForCausalLM",
        {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hash_layers": 0},
    ),
    "gemma4": (  # GELU
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **NARROW, "enable_moe_block": True, "top_k_experts": 2, "head_dim": 16, "global_head_dim": 16,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "lfm2_moe": (  # a plain function as activation
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {**NARROW, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    ),
    "nemotron_h": (  # no gate, relu2, experts narrower than the model
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16, "n_group": 1,
            "topk_group": 1, "moe_latent_size": 16, "moe_shared_expert_intermediate_size": 24,
            "layers_block_type": ["attention", "moe", "moe"],
        },
    ),
    "openai_privacy_filter": (  # gpt-oss's gate, not interleaved
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterForTokenClassification",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"num_local_experts": 8}),
}  # fmt: skip


CACHE = "cache" if "cache" in inspect.signature(hf.Qwen3MoeForCausalLM.forward).parameters else "past_key_values"


def tiny(family: str = "deepseek_v3", **fields) -> torch.nn.Module:
    """A random model in eval mode whose correction bias, where it has one, is not zero."""
    config_class, model_class, own = FAMILIES.get(family) or _named(*MORE_FAMILIES[family])
    model = model_class(config_class(**{**COMMON, **own, **fields})).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05)
    for name, weight in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(weight, std=0.3)
    return model


def _named(config_class: str, model_class: str, own: dict) -> tuple:
    if not hasattr(hf, model_class):
        pytest.skip(f"transformers {hf.__version__} has no {model_class}")
    return getattr(hf, config_class), getattr(hf, model_class), own


def seeing_model(**fields):
    """A tiny Qwen3-VL-MoE, whose language model is inside of it."""
    text = {
        **COMMON, **NARROW, "head_dim": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        **fields,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return hf.Qwen3VLMoeForConditionalGeneration(config).eval()


def token_ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length))


def loud(family="deepseek_v3", **fields):
    """A tiny model whose experts matter: with the usual small weights their share of the logits is lost in rounding."""
    model = tiny(family, **fields)
    if not experts_of(model):
        pytest.skip(f"{family} of transformers {hf.__version__} computes its experts itself")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def eager(model):
    model.set_experts_implementation("eager")
    return model


def experts_of(model):
    return [module for module in model.modules() if is_on_seam(module)]


def relative(result, expected):
    return ((result - expected).abs().max() / expected.abs().max()).item()
