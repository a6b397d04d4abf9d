"""Tiny random dense models of every family that can be upcycled."""

import copy

import torch
import transformers as hf

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FULL_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e3}}  # not the theta that FlexOlmo has by itself
NO_LAYER_SLIDES = {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4}
DENSE = {
    "Llama": ("mixtral", {"rope_parameters": LLAMA3_ROPE, "head_dim": 8}),
    "Mistral": ("mixtral", {"sliding_window": 4}),
    "Olmo2": ("flex_olmo", {}),
    "Olmo3": ("flex_olmo", {"layer_types": ["full_attention"] * 3, "rope_parameters": FULL_ROPE}),
    "Qwen2": ("qwen2_moe", NO_LAYER_SLIDES),
    "Qwen3": ("qwen3_moe", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True, **NO_LAYER_SLIDES}),
}


def dense(name="Qwen3", **fields):
    """A tiny random model whose MLPs and biases matter."""
    config = getattr(hf, f"{name}Config")(**copy.deepcopy({**SMALL, **DENSE[name][1], **fields}))  # it writes into them
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.2)
    return model


def ids():
    return torch.randint(3, 64, (4, 24))


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits
