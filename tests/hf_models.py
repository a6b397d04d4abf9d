"""Tiny random Hugging Face models, one a family."""

import torch
import transformers as hf

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


def tiny(family: str = "deepseek_v3", **fields) -> torch.nn.Module:
    """A random model in eval mode whose correction bias, where it has one, is not zero."""
    config_class, model_class, own = FAMILIES[family]
    model = model_class(config_class(**{**COMMON, **own, **fields})).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.05)
    for name, weight in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(weight, std=0.3)
    return model


def token_ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length))
