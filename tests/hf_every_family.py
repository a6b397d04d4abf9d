"""A tiny random model of every family in the installed transformers whose experts take an implementation by name.

Nothing here names a family: folders are found, configs shrunk by the meaning of their field names, and what does not
build under any variant comes back with the reason.
"""

import importlib
import inspect
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn

from moesaic.hf.experts import is_on_seam

MODELS = Path(transformers.__file__).parent / "models"
# what a config field means, by its name; tried on every config and its parts, where the field is there already
SIZES = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32, "hidden_size_per_layer_input": 0,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 2, "v_head_dim": 16, "kv_lora_rank": 8,
    "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 40, "moe_latent_size": 16, "router_hidden_size": 12, "max_position_embeddings": 128,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "sliding_window": 8, "attention_chunk_size": 8,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "pad_token_id": 2, "bos_token_id": 0,
    "eos_token_id": 1, "num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 0, "num_hash_layers": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 16, "mamba_d_head": 16, "mamba_d_state": 8,
    "ssm_state_size": 8, "mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 2, "mamba_dt_rank": 4,
    "expert_layer_period": 1, "expert_layer_offset": 0, "moe_layer_start_index": 1, "moe_layer_interval": 1,
    "decoder_sparse_step": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "depth": 2,
}  # fmt: skip
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts", "top_k")


def families() -> list[str]:
    """Names of the folders of models whose experts take an implementation by name."""
    paths = sorted(MODELS.glob("*/modeling_*.py"))
    return [path.parent.name for path in paths if "@use_experts_implementation" in path.read_text()]


def candidates(family: str) -> list[type]:
    """Classes of a family that may be a text model, the likeliest first."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = [c for c in vars(modeling).values() if isinstance(c, type) and c.__module__ == modeling.__name__]
    found = [cls for cls in found if issubclass(cls, transformers.PreTrainedModel)]
    order = ("ForCausalLM", "TextModel", "Model", "ForConditionalGeneration")
    usable = [cls for cls in found if cls.__name__.endswith(order) and not cls.__name__.endswith("PreTrainedModel")]
    usable = [cls for cls in usable if not any(word in cls.__name__ for word in ("Vision", "Audio", "Predictor"))]
    return sorted(usable, key=lambda cls: next(i for i, end in enumerate(order) if cls.__name__.endswith(end)))


def shorten_chunks(family: str) -> None:
    """Linear attention pads a text to a chunk of 64 tokens and takes one after the other: 8 hold the texts here."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name, function in list(vars(modeling).items()):
        if not inspect.isclass(function) and getattr(function, "__module__", None) == modeling.__name__:
            parameters = inspect.signature(function).parameters
            if "chunk_size" in parameters and parameters["chunk_size"].default == 64:
                setattr(modeling, name, partial(function, chunk_size=8))


def small(config_class: type, extra: dict) -> transformers.PreTrainedConfig:
    """The default config of a class with every size in it made small; what `extra` names comes first."""
    default = config_class()
    given = {name: getattr(config_class, name, None) for name in dir(config_class)} | default.to_dict()
    sizes = dict.fromkeys([name for name in EXPERTS if name in given][:1], 8)
    sizes |= dict.fromkeys([name for name in CHOSEN if name in given][:1], 2)
    if given.get("n_group"):
        sizes |= {"n_group": 2, "topk_group": 1}
    sizes = {name: size for name, size in SIZES.items() if given.get(name) is not None} | sizes
    sizes = {name: [size] * len(given[name]) if isinstance(given[name], list) else size for name, size in sizes.items()}
    sizes |= {name: value for name, value in extra.items() if name in given}
    n_layers, kinds = given.get("num_hidden_layers"), given.get("layer_types")
    if isinstance(kinds, list) and "layer_types" in vars(config_class):  # one entry a layer: keep one of each kind
        sizes["layer_types"] = (list(dict.fromkeys(kinds)) * n_layers)[: sizes.get("num_hidden_layers")]
    parts = {n: type(part) for n, part in vars(default).items() if isinstance(part, transformers.PreTrainedConfig)}
    return config_class(**sizes, **{name: small(part, extra).to_dict() for name, part in parts.items()})


VARIANTS: tuple[dict, ...] = (
    {},
    {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    {"layer_types": None},
    {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 1, "num_hidden_layers": 4},
    {"qk_rope_head_dim": 0, "num_hidden_layers": 4},
    {"head_dim": 8},  # in some latent attentions it is the width that is rotated
    {"num_hidden_layers": 4},  # of four layers one has full attention, as a cache wants
    {"num_hidden_layers": 8, "num_experts": 8},
    {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    {"moe_topk": 2, "num_experts": 8},
    {"head_dim": 64},
    {"head_dim": 128},  # rotated in sections of given widths
    {"layer_types": ["full_attention", "conv", "full_attention"]},
)


class Tiny(NamedTuple):
    """What came of one family: a model, or the reasons why there is none."""

    model: nn.Module | None
    reasons: tuple[str, ...]


@cache
def tiny_of(family: str) -> Tiny:
    """The first class of a family that builds, runs and has experts on the interface, under the first variant."""
    reasons = {}
    shorten_chunks(family)
    for cls in candidates(family):
        for variant in VARIANTS:
            try:
                torch.manual_seed(0)
                model = cls(small(cls.config_class, variant)).eval()
                lively(model)
                run(model, token_ids())
            except Exception as error:  # every family has its own way to want a field
                reasons[f"{cls.__name__}: {type(error).__name__}: {str(error).splitlines()[0]}"] = True
                continue
            if any(is_on_seam(module) for module in model.modules()):
                return Tiny(model, ())
            reasons[f"{cls.__name__}: no experts in it"] = True
    return Tiny(None, tuple(reasons))


def lively(model: nn.Module) -> None:
    """Weights and biases that make experts differ: released defaults start many of them at zero."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            if tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
                nn.init.normal_(tensor, std=0.3 if "gate." in name or "router." in name else 0.1)
            elif "bias" in name:
                nn.init.normal_(tensor, std=0.1)


def token_ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state
