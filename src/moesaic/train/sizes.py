"""The models that `moesaic train` makes: DeepSeek-V3's architecture, small enough for one CPU core."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from moesaic.train.tokenizer import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import DeepseekV3Config


def tiny_config() -> "DeepseekV3Config":
    """3.4 million parameters; 32 routed experts in 4 groups of which a token reaches 2, top-4, one shared expert."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        intermediate_size=384,
        moe_intermediate_size=48,
        n_routed_experts=32,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_mtp_layers=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def small_config() -> "DeepseekV3Config":
    """13.8 million parameters; 64 routed experts in 8 groups of which a token reaches 4, top-6, one shared expert."""
    config = tiny_config()
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 192, 6, 576
    config.num_attention_heads = config.num_key_value_heads = 6
    config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok = 64, 64, 6
    config.n_group, config.topk_group = 8, 4
    return config


# name -> its config; how long and how fast it is trained is the Recipe's to say
SIZES: dict[str, Callable[[], "DeepseekV3Config"]] = {"tiny": tiny_config, "small": small_config}
