"""A dense Hugging Face model as the MoE model of the same shape, with the same output: `ms.upcycle`."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.hf.modules import blocks
from moesaic.hf_config import names_experts, text_part
from moesaic.layer.experts import fuse_experts
from moesaic.layer.upcycle import DenseMLP, check_slices, upcycled


class Target(NamedTuple):
    """The MoE family of a dense one.

    count, width: how its config spells the number of experts and their width. fields: what the dense config does not
    say. must: dense fields that the MoE family has no place for, and the value at which nothing is lost.
    """

    family: str
    count: str
    width: str
    fields: Mapping[str, Any] = MappingProxyType({})
    must: Mapping[str, Any] = MappingProxyType({})


# Families whose block around the MLP is that of the MoE family, as transformers 5.23 has them. OLMo 1 is not here:
# OLMoE has norms of queries and keys, and other norms of the block.
EVERY_LAYER = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
FULL = {"layer_types": "full_attention"}
TARGETS = {
    "llama": Target("mixtral", "num_local_experts", "intermediate_size", {}, NO_BIAS),
    "mistral": Target("mixtral", "num_local_experts", "intermediate_size"),
    "olmo2": Target("flex_olmo", "num_experts", "intermediate_size", {"norm_topk_prob": True}),
    "olmo3": Target("flex_olmo", "num_experts", "intermediate_size", {"norm_topk_prob": True}, FULL),
    "qwen2": Target("qwen2_moe", "num_experts", "moe_intermediate_size", {**EVERY_LAYER, **NO_WINDOW}, FULL),
    "qwen3": Target("qwen3_moe", "num_experts", "moe_intermediate_size", {**EVERY_LAYER, **NO_WINDOW}, FULL),
}  # fmt: skip
# fields of a dense config that its MoE family does not read; `Target.must` guards those that mean something
DENSE_ONLY = (
    "architectures", "attention_bias", "auto_map", "layer_types", "max_window_layers", "mlp_bias", "model_type",
    "pretraining_tp", "sliding_window", "transformers_version",
)  # fmt: skip
PROBE = 16  # tokens on which the two models are compared
# relative difference of the logits of the middle one of the probe's tokens. Half precision rounds the weights of a
# token in every layer; a token may even lose a slice there (docs: upcycling), hence the middle one.
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def upcycle(
    model: nn.Module,
    *,
    experts: int = 8,
    k: int = 2,
    granularity: int = 1,
    noise: float = 0.0,
    router_std: float | None = None,
    seed: int = 0,
) -> Any:
    """A new MoE model that computes what the dense `model` does: Qwen3 -> Qwen3-MoE, Qwen2 -> Qwen2-MoE, Llama and
    Mistral -> Mixtral, OLMo 2 and 3 -> FlexOlmo.

    Every MLP becomes `experts` copies of which a token visits `k`. With `granularity` G every copy is cut into G
    experts of 1/G of the width: `experts`·G experts of which a token visits k·G, at the same cost. All else is copied:
    weights, dtype, device, tied embeddings, generation config. In Qwen2-MoE, which has one always, the shared expert
    is as wide as a routed one and starts silent, with a down projection of zeros.

    The router is drawn from N(0, router_std²), the config's `initializer_range` unless given. `noise` draws that share
    of every expert anew, which gives up the equal output (see `layer.upcycle.upcycled`).

    Raises ValueError, in one line, for a model that is MoE already, of another family, not a causal language model or
    quantised; where the block of the MoE family would compute something else; and for sizes that do not fit. `model`
    itself is not changed.
    """
    _check_plain(model)
    target = check_sizes(model.config, experts, k, granularity)
    config = _moe_config(model, target, experts, k, granularity)
    dense: Any = model.config
    rule = MoEConfig(
        hidden_size=dense.hidden_size,
        moe_intermediate_size=getattr(config, target.width),
        n_routed_experts=experts * granularity,
        num_experts_per_tok=k * granularity,
        scoring_func="softmax",
        topk_method="greedy",
    )
    draw = {
        "granularity": granularity,
        "router_std": dense.initializer_range if router_std is None else router_std,
        "noise": noise,
        "generator": torch.Generator().manual_seed(seed),
    }
    moe = _empty(model, config)
    _copy_the_rest(model, moe)
    for name, block, _, _ in blocks(moe):
        mlp = _dense_mlp(model.get_submodule(name))
        state = upcycled(mlp, rule, **draw)
        fuse_experts(state, "experts.", rule)
        block.load_state_dict(state | _silent_expert(block, mlp))
    moe.generation_config = copy.deepcopy(model.generation_config)
    moe.train(model.training)
    if not noise:
        _check_same(model, moe)
    return moe


def target_of(config: Any) -> Target:
    """The MoE family of a dense config; ValueError, with the reason, where there is none that computes the same."""
    family = config.model_type
    if names_experts(text_part(config)):
        raise ValueError(f"model_type={family!r} is an MoE model already: give a dense one ({', '.join(TARGETS)})")
    if family not in TARGETS:
        raise ValueError(
            f"model_type={family!r} has no MoE family of the same block: give one of {', '.join(TARGETS)}, or make "
            "single layers with moesaic.layer.upcycle.upcycled"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"quantization_config is set in this {family} model: give one in float32, bfloat16 or float16")
    target = TARGETS[family]
    for name, value in target.must.items():
        given = getattr(config, name, None)
        found = given if isinstance(given, list) else [given]
        if other := next((each for each in found if each not in (None, value)), None):
            raise ValueError(
                f"{name}={other!r} is not known to {target.family}: give a {family} model with {value!r}, or make "
                "single layers with moesaic.layer.upcycle.upcycled"
            )
    return target


def _check_plain(model: Any) -> None:
    if type(model).__name__.endswith("ForCausalLM"):
        return
    raise ValueError(
        f"{type(model).__name__} is not a causal language model of transformers: "
        "load it with AutoModelForCausalLM, and upcycle before it is wrapped or compiled"
    )


def check_sizes(config: Any, experts: int, k: int, granularity: int) -> Target:
    """`target_of`, and ValueError for numbers of experts that cannot be made of this dense config."""
    target = target_of(config)
    if experts < 2:
        raise ValueError(f"experts={experts} leaves nothing to route: use 2 or more")
    if not 1 <= k <= experts:
        raise ValueError(f"k={k} is not within 1 and experts={experts}: use 1 to {experts}")
    check_slices(config.intermediate_size, granularity)
    return target


def _moe_config(model: Any, target: Target, experts: int, k: int, granularity: int) -> Any:
    from transformers import AutoConfig

    dense = model.config.to_dict()
    width = dense["intermediate_size"]
    known = AutoConfig.for_model(target.family).to_dict()
    # what neither knows by name is carried as well: Qwen3-MoE reads a head_dim that its config does not declare
    fields = {name: value for name, value in dense.items() if name not in DENSE_ONLY or name in known}
    rope = fields["rope_parameters"]
    fields["rope_parameters"] = rope.get("full_attention", rope)  # OLMo 3 has one for each type of attention
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    sizes = {
        target.count: experts * granularity,
        "num_experts_per_tok": k * granularity,
        target.width: width // granularity,
    }
    if "shared_expert_intermediate_size" in known:
        sizes["shared_expert_intermediate_size"] = width // granularity
    return AutoConfig.for_model(target.family, **{**fields, **target.fields, **sizes})


def _empty(model: Any, config: Any) -> Any:
    """The MoE model, its weights not yet written: drawing random ones for all experts would take longest of all."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(model.device):
        moe = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    moe.tie_weights()
    return moe


def _copy_the_rest(model: Any, moe: Any) -> None:
    """All weights outside of the MLPs, by name; ValueError where the two models do not hold the same."""
    rest = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    missing, unexpected = moe.load_state_dict(rest, strict=False)
    if differ := [*unexpected, *(name for name in missing if ".mlp." not in name)]:
        kinds = f"{type(model).__name__} and {type(moe).__name__}"
        raise ValueError(f"{kinds} do not hold the same weights, such as {differ[0]}: give the model unchanged")


def _dense_mlp(mlp: Any) -> DenseMLP:
    return DenseMLP(mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach(), mlp.gate_proj.weight.detach())


def _silent_expert(block: Any, mlp: DenseMLP) -> dict[str, Tensor]:
    """The weights of a shared expert that gives zero and can learn; nothing where the block has none."""
    shared = getattr(block, "shared_expert", None)
    if shared is None:
        return {}
    width = shared.up_proj.weight.shape[0]
    assert mlp.gate_proj is not None, "all families here are gated"
    return {
        "shared_expert.up_proj.weight": mlp.up_proj[:width],
        "shared_expert.gate_proj.weight": mlp.gate_proj[:width],
        "shared_expert.down_proj.weight": torch.zeros_like(mlp.down_proj[:, :width]),
        "shared_expert_gate.weight": torch.zeros_like(block.shared_expert_gate.weight),
    }


@torch.no_grad()
def _check_same(model: Any, moe: Any) -> None:
    """Ask both for the logits of a few tokens; ValueError where they differ, as with a module that was exchanged."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROBE), generator=generator, device="cpu").to(model.device)
    implementation = moe.config._experts_implementation
    moe.set_experts_implementation("eager")  # the one that takes float64
    expected, found = _logits(model, ids), _logits(moe, ids)
    moe.set_experts_implementation(implementation)
    difference = ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).median().item()
    if not difference <= CLOSE[model.dtype]:
        raise ValueError(
            f"{type(model).__name__} and {type(moe).__name__} differ by {difference:.1e} of the logits: "
            "give the model as transformers loads it"
        )


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[T, vocabulary], in eval mode; every module is in the mode it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        return model.eval()(input_ids=ids, use_cache=False).logits.double()[0]
    finally:
        for module, training in modes:
            module.training = training
