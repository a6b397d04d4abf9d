"""Put the weights of a transformers DeepSeek-V3 MoE block into moesaic's layer, compare, and swap it into the model.

python examples/hf_block.py                # a small model with random weights
python examples/hf_block.py --model DIR    # the folder of a Hugging Face DeepSeek-V3-style model
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

import moesaic as ms


def small_model() -> torch.nn.Module:
    config = DeepseekV3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4,
        n_group=4, topk_group=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Hugging Face model; a small random one unless given")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = small_model() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
    blocks = [name for name, module in model.named_modules() if isinstance(module, DeepseekV3MoE)]
    if not blocks:
        raise SystemExit(f"{args.model}: no DeepSeek-V3 MoE block in this model")
    config = ms.MoEConfig.from_hf(model.config)
    print(f"{len(blocks)} MoE blocks: top {config.num_experts_per_tok} of {config.n_routed_experts} experts")

    ids = torch.randint(model.config.vocab_size, (2, 16))
    with torch.no_grad():
        before = model(ids).logits
        for name in blocks:
            theirs = model.get_submodule(name)
            ours = ms.DeepseekV3MoE(config, dtype=model.dtype).eval()
            ours.load_state_dict(theirs.state_dict())
            model.set_submodule(name, ours)
        after = model(ids).logits
    print(f"logits with moesaic's layers differ by at most {(after - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
