import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import GRID, v3
from oracles import moe_by_token
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as TheirV3
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesaic.config import MoEConfig
from moesaic.engine.select import ENGINES
from moesaic.engine.spec import ACTIVATIONS
from moesaic.layer.experts import fuse_experts
from moesaic.layer.moe import DeepseekV3MoE, MoE

SIZES = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts_per_tok": 4}
FAMILIES = {
    "deepseek_v3": (
        TheirV3,
        DeepseekV3Config(**SIZES, n_routed_experts=16, n_group=4, topk_group=2, n_shared_experts=2),
    ),
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=8)),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**SIZES, num_experts=16, norm_topk_prob=True)),
    "qwen2_moe": (Qwen2MoeSparseMoeBlock, Qwen2MoeConfig(**SIZES, num_experts=16, shared_expert_intermediate_size=40)),
    "olmoe": (
        OlmoeSparseMoeBlock,
        OlmoeConfig(hidden_size=32, intermediate_size=24, num_experts=16, num_experts_per_tok=4),
    ),
    "gpt_oss": (
        GptOssMLP,
        GptOssConfig(
            hidden_size=32, intermediate_size=24, num_local_experts=16, num_experts_per_tok=4, swiglu_limit=0.2
        ),
    ),
}


def pair(family: str, engine: str = "auto") -> tuple[torch.nn.Module, DeepseekV3MoE]:
    """transformers' block with random weights, and ours with the same."""
    block, config = FAMILIES[family]
    config._experts_implementation = "eager"
    theirs = block(config)
    if family == "gpt_oss":
        theirs.experts.limit = config.swiglu_limit  # transformers 5.17 does not read it from the config
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        torch.nn.init.normal_(tensor.data, std=0.5 if "bias" in name else 0.1)
    ours = DeepseekV3MoE(MoEConfig.from_hf(config), engine=engine)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_equals_transformers_forward_and_backward(family, engine):
    theirs, ours = pair(family, engine)
    x = torch.randn(2, 19, 32)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    out1, out2 = theirs(x1), ours(x2)
    out1 = out1[0] if isinstance(out1, tuple) else out1
    assert out1.abs().mean() > 0.01, "a result of zeros would prove nothing"
    torch.testing.assert_close(out2, out1, rtol=0, atol=1e-6)
    upstream = torch.randn_like(out1)
    out1.backward(upstream)
    out2.backward(upstream)
    torch.testing.assert_close(x2.grad, x1.grad, rtol=0, atol=1e-5)
    slopes = DeepseekV3MoE(ours.config)  # transformers' gradients, under our names
    slopes.load_state_dict(theirs.state_dict() | {name: p.grad for name, p in theirs.named_parameters()})
    expected = dict(slopes.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(
            p.grad, expected[name].data, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_state_dict_goes_out_and_back(shared):
    config = v3(16, 4, 2, 4, n_shared_experts=shared)
    layer, other = DeepseekV3MoE(config), DeepseekV3MoE(config)
    saved = layer.state_dict()
    keys = {"gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"}
    shared_keys = {f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")} if shared else set()
    assert saved.keys() == keys | shared_keys
    other.load_state_dict(saved)
    x = torch.randn(5, 32)
    assert torch.equal(layer(x), other(x))


def per_expert(saved: dict) -> dict:
    """The spelling found on disk."""
    apart = {k: v for k, v in saved.items() if not k.startswith("experts.")}
    gate_up, down = saved["experts.gate_up_proj"], saved["experts.down_proj"]
    for e in range(len(gate_up)):
        gate, up = gate_up[e].chunk(2)
        apart |= {f"experts.{e}.gate_proj.weight": gate, f"experts.{e}.up_proj.weight": up}
        apart[f"experts.{e}.down_proj.weight"] = down[e]
    return apart


@pytest.mark.parametrize(
    ("family", "key", "twin"),
    [
        ("gpt_oss", "router.weight", "gate.weight"),
        ("qwen2_moe", "shared_expert.up_proj.weight", "shared_experts.up_proj.weight"),
        ("qwen2_moe", "shared_expert_gate.weight", "shared_experts.gate.weight"),
    ],
)
def test_other_names_of_parts_are_understood_inside_a_model_and_strictly(family, key, twin):
    theirs, ours = pair(family)
    saved = {f"mlp.{name}": value for name, value in theirs.state_dict().items()}
    block = torch.nn.ModuleDict({"mlp": DeepseekV3MoE(ours.config)})
    names = list(saved)
    block.load_state_dict(saved)
    assert list(saved) == names, "loading must not eat the caller's dict"
    assert torch.equal(block["mlp"].state_dict()[twin], saved[f"mlp.{key}"])
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*mlp\.{key}"):
        block.load_state_dict(saved | {f"mlp.{twin}": saved[f"mlp.{key}"]})
    with pytest.raises(RuntimeError, match=rf"Missing key.*mlp\.{twin}"):
        block.load_state_dict({name: value for name, value in saved.items() if name != f"mlp.{key}"})


def test_names_of_parts_that_a_layer_lacks_are_told_as_they_were_given():
    layer = MoE(v3(8, 2, 1, 2))
    for key in ("shared_expert.up_proj.weight", "shared_expert_gate.weight"):
        with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "{key}"'):
            layer.load_state_dict(layer.state_dict() | {key: torch.zeros(1, 32)})
    layer.router, given = torch.nn.Linear(2, 1, bias=False), torch.ones(1, 2)  # a part of a subclass
    layer.load_state_dict({"router.weight": given}, strict=False)
    assert torch.equal(layer.router.weight, given)


def test_layer_loads_the_per_expert_spelling_and_stays_strict():
    theirs, ours = pair("deepseek_v3")
    apart = per_expert(theirs.state_dict())
    loaded = DeepseekV3MoE(ours.config)
    loaded.load_state_dict(apart)
    x = torch.randn(7, 32)
    assert torch.equal(loaded(x), ours(x))
    assert len(apart) == len(per_expert(theirs.state_dict())), "loading must not eat the caller's dict"

    missing = {k: v for k, v in apart.items() if k != "experts.7.up_proj.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        DeepseekV3MoE(ours.config).load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.0\.down_proj"):
        DeepseekV3MoE(ours.config).load_state_dict(apart | theirs.state_dict())
    both = apart | {"experts.down_proj": torch.zeros_like(ours.experts.down_proj)}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*gate_up_proj.*Unexpected key.*experts\.0\.down_proj"):
        DeepseekV3MoE(ours.config).load_state_dict(both)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.99\.up_proj\.weight"):
        DeepseekV3MoE(ours.config).load_state_dict(apart | {"experts.99.up_proj.weight": torch.zeros(24, 32)})


@pytest.mark.parametrize("preset", ["gpt-oss", "classic", "mixtral"])
def test_fused_layouts_of_other_families_are_built_from_single_experts(preset):
    config = MoEConfig.preset(preset, hidden_size=6, moe_intermediate_size=4, n_routed_experts=4)
    layer = MoE(config, dtype=torch.float64)
    weights, spec = layer.experts.weights, layer.experts.spec
    single = {}
    for e in range(4):
        up = weights.up[e].mT if spec.transposed else weights.up[e]
        halves = {"up_proj": up}
        if spec.gated:
            gate, up = (up[::2], up[1::2]) if spec.interleaved else up.chunk(2)
            halves = {"gate_proj": gate, "up_proj": up}
        halves["down_proj"] = weights.down[e].mT if spec.transposed else weights.down[e]
        for name, matrix in halves.items():
            single[f"experts.{e}.{name}.weight"] = matrix
            if config.expert_bias:
                bias = weights.down_bias[e] if name == "down_proj" else weights.up_bias[e][name == "up_proj" :: 2]
                single[f"experts.{e}.{name}.bias"] = bias
    fuse_experts(single, "experts.", config)
    expected = {k: v for k, v in layer.state_dict().items() if k.startswith("experts.")}
    assert single.keys() == expected.keys()
    assert all(torch.equal(single[k], expected[k]) for k in expected)


def test_mixtral_as_it_lies_on_disk():
    """w1 is the gate, w3 up, w2 down: F.silu(w1 x) * w3 x, then w2."""
    config = MoEConfig.preset("mixtral", hidden_size=6, moe_intermediate_size=4, n_routed_experts=2)
    layer = MoE(config)
    saved = {"gate.weight": torch.randn(2, 6)}
    for e in range(2):
        saved |= {f"experts.{e}.{name}.weight": torch.randn(4, 6) for name in ("w1", "w3")}
        saved[f"experts.{e}.w2.weight"] = torch.randn(6, 4)
    given = dict(saved)
    layer.load_state_dict(saved)
    x = torch.randn(5, 6)
    routed = (x @ given["gate.weight"].T).softmax(-1)
    expected = 0
    for e in range(2):
        w1, w2, w3 = (given[f"experts.{e}.{name}.weight"] for name in ("w1", "w2", "w3"))
        expected += routed[:, e, None] * ((F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T)
    torch.testing.assert_close(layer(x), expected)
    del given["experts.1.w2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        layer.load_state_dict(given)


def test_classic_layer_is_the_first_seed():
    """Top-k on logits, softmax over the k, two plain layers, a width of its own."""
    layer = MoE.classic(input_dim=8, hidden_dim=12, output_dim=5, num_experts=6, k=2)
    x = torch.randn(9, 8)
    out = layer(x)
    assert out.shape == (9, 5)
    logits = x @ layer.gate.weight.T
    for t in range(9):
        kept = logits[t].topk(2)
        expected = torch.zeros(5)
        for weight, e in zip(kept.values.softmax(0), kept.indices, strict=True):
            expected += weight * (layer.experts.down_proj[e] @ (layer.experts.up_proj[e] @ x[t]).relu())
        torch.testing.assert_close(out[t], expected)


def test_classic_layer_takes_the_options_of_every_layer():
    layer = MoE.classic(8, 12, 5, 6, 2, recompute=True, device="meta", dtype=torch.bfloat16)
    assert (layer.experts.recompute, layer.gate.weight.is_meta, layer.gate.weight.dtype) == (True, True, torch.bfloat16)


@pytest.mark.parametrize(("experts", "groups", "kept", "k"), GRID)
def test_layer_equals_the_definition_token_by_token(experts, groups, kept, k):
    layer = DeepseekV3MoE(v3(experts, groups, kept, k)).double()
    layer.gate.e_score_correction_bias.normal_()
    x = torch.randn(11, 32, dtype=torch.float64)
    routing = layer.gate(x)
    expected = moe_by_token(x, routing.expert_ids, routing.weights, layer.experts.gate_up_proj, layer.experts.down_proj)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (6, 32), (0, 32), (2, 3, 32), (2, 0, 32), (2, 2, 2, 32)])
def test_any_shape_in_training_and_inference(shape, mode):
    layer = getattr(DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1)), mode)()
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    torch.testing.assert_close(out, layer(x.reshape(-1, 32)).reshape(shape))
    out.sum().backward()
    assert x.grad.shape == shape


def test_non_contiguous_input():
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4)), torch.randn(3, 32, 5).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    layer.gate.e_score_correction_bias[:4] = 50
    x = torch.randn(200, 32)
    routing = layer.gate(x)
    assert routing.expert_ids.sort().values.tolist() == [[0, 1, 2, 3]] * 200
    expected = moe_by_token(x, routing.expert_ids, routing.weights, layer.experts.gate_up_proj, layer.experts.down_proj)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_shared_gate_scales_the_shared_experts():
    config = v3(16, 4, 2, 4, n_shared_experts=1, shared_expert_gate=True)
    layer = DeepseekV3MoE(config)
    x = torch.randn(4, 32)
    with_shared = layer(x)
    torch.nn.init.zeros_(layer.shared_experts.gate.weight)
    half = layer(x)
    routing = layer.gate(x)
    routed = layer.experts(x, routing.expert_ids, routing.weights)
    shared = layer.shared_experts.down_proj(
        torch.nn.functional.silu(layer.shared_experts.gate_proj(x)) * layer.shared_experts.up_proj(x)
    )
    torch.testing.assert_close(half, routed + 0.5 * shared)
    assert not torch.allclose(with_shared, half)


def test_moe_has_the_shared_experts_that_its_config_names():
    layer, same = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=2)), MoE(v3(16, 4, 2, 4, n_shared_experts=2))
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 32)
    assert torch.equal(same(x), layer(x))
    assert MoE(v3(16, 4, 2, 4)).shared_experts is None


def test_a_layer_says_what_it_lacks():
    with pytest.raises(ValueError, match="moe_intermediate_size=None makes a gate without experts"):
        MoE(v3(16, 4, 2, 4, moe_intermediate_size=None))
    with pytest.raises(ValueError, match="engine='warp' is unknown"):
        MoE(v3(16, 4, 2, 4), engine="warp")


def test_parameters_are_counted_total_and_active():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1))
    expert, gate = 3 * 32 * 16, 16 * 32
    assert layer.num_parameters() == 16 * expert + expert + gate
    assert layer.num_parameters(active=True) == 4 * expert + expert + gate
    assert "parameters=26,624, active=8,192" in repr(layer)


def test_gradcheck_of_the_whole_layer():
    layer = DeepseekV3MoE(v3(8, 4, 2, 3, hidden_size=5, moe_intermediate_size=4, n_shared_experts=1)).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_meta_construction_and_dtype_of_a_bfloat16_layer():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1)).bfloat16()
    out = layer(torch.randn(2, 3, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(copy.deepcopy(layer).float()(torch.ones(1, 32)), layer.float()(torch.ones(1, 32)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1))
    x = torch.randn(9, 32, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    out.square().sum().backward()
    for expected, tensor in zip(plain, [x, *layer.parameters()], strict=True):
        assert torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_token_leaves_the_other_tokens_bitwise_alone(poison):
    """The policy: lawful ids, NaN weights where the token is NaN, and nothing reaches another row."""
    layer = DeepseekV3MoE(v3(16, 4, 2, 4), engine="reference")
    x = torch.randn(10, 32)
    clean = layer(x)
    x[3, 7] = poison
    poisoned, routing = layer(x), layer.gate(x)
    others = torch.arange(10) != 3
    assert torch.equal(poisoned[others], clean[others])
    assert not poisoned[3].isfinite().all()
    assert 0 <= routing.expert_ids.min() <= routing.expert_ids.max() < 16


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "triton"])
def test_permuting_tokens_permutes_outputs(engine):
    layer = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1), engine=engine).double()
    x, order = torch.randn(20, 32, dtype=torch.float64), torch.randperm(20)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_a_layer_can_be_pickled_whatever_its_activation(hidden_act):
    layer = DeepseekV3MoE(v3(8, 2, 1, 2, n_shared_experts=1, hidden_act=hidden_act)).eval()
    x = torch.randn(5, 32)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
