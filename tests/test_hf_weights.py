import pytest
import torch
from cases import v3
from hf_models import tiny
from safetensors.torch import load_file, save_file

from moesaic.config import MoEConfig
from moesaic.hf.weights import split_experts
from moesaic.layer.experts import Experts, fuse_experts
from moesaic.layer.moe import DeepseekV3MoE

KINDS = {
    "gated": v3(8, 2, 1, 2),
    "interleaved": v3(8, 2, 1, 2, interleaved=True),
    "gpt_oss": MoEConfig.preset(
        "gpt-oss", hidden_size=12, moe_intermediate_size=6, n_routed_experts=4, num_experts_per_tok=2
    ),
    "plain": MoEConfig.preset("classic", hidden_size=12, moe_intermediate_size=6, output_size=5, expert_bias=True),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_splitting_undoes_fusing(config):
    state = {"experts." + key: value for key, value in Experts(config).state_dict().items()}
    kept = {key: value.clone() for key, value in state.items()}
    split = split_experts(state, config)
    assert state.keys() == kept.keys()
    assert len(split) == config.n_routed_experts * (2 + config.gated) * (1 + config.expert_bias)
    assert f"experts.{config.n_routed_experts - 1}.down_proj.weight" in split
    fuse_experts(split, "experts.", config)
    assert split.keys() == kept.keys()
    assert all(torch.equal(split[key], kept[key]) for key in kept)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_an_expert_alone_computes_with_its_split_matrices(config):
    experts = Experts(config)
    split = split_experts({"experts." + key: value for key, value in experts.state_dict().items()}, config)
    x = torch.randn(3, config.hidden_size)
    expert = config.n_routed_experts - 1

    def linear(name, x):
        at = f"experts.{expert}.{name}."
        return torch.nn.functional.linear(x, split[at + "weight"], split.get(at + "bias"))

    up = linear("up_proj", x)
    if not config.gated:
        hidden = torch.relu(up)
    else:
        gate = linear("gate_proj", x)
        if config.swiglu_limit:
            gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        hidden = gate * torch.sigmoid(config.swiglu_alpha * gate) * (up + config.swiglu_up_offset)
    ids = torch.full((3, 1), expert)
    torch.testing.assert_close(experts(x, ids, torch.ones(3, 1)), linear("down_proj", hidden))


def test_files_of_transformers_load_strictly_and_write_back_equal(tmp_path):
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    at = "model.layers.2.mlp."
    layer_on_disk = {key.removeprefix(at): value for key, value in on_disk.items() if key.startswith(at)}
    assert "experts.7.gate_proj.weight" in layer_on_disk

    layer = DeepseekV3MoE(MoEConfig.from_hf(tmp_path))
    layer.load_state_dict(layer_on_disk, strict=True)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), model.model.layers[2].mlp(x), atol=1e-6, rtol=1e-5)

    written = split_experts(layer.state_dict(), layer.config)
    save_file(written, tmp_path / "layer.safetensors")
    again = load_file(tmp_path / "layer.safetensors")
    assert again.keys() == layer_on_disk.keys()
    assert all(torch.equal(again[key], layer_on_disk[key]) for key in layer_on_disk)


def test_a_prefix_reaches_into_a_whole_model():
    config = v3(8, 2, 1, 2)
    state = {f"model.layers.3.mlp.{k}": v for k, v in DeepseekV3MoE(config).state_dict().items()}
    split = split_experts(state, config, "model.layers.3.mlp.experts.")
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in split
    assert "model.layers.3.mlp.gate.weight" in split


def test_what_does_not_fit_is_refused():
    config, other = v3(8, 2, 1, 2), v3(16, 2, 1, 2)
    state = DeepseekV3MoE(config).state_dict()
    with pytest.raises(ValueError, match=r"^mlp.gate_up_proj is not in the state dict"):
        split_experts(state, config, "mlp.")
    with pytest.raises(ValueError, match="holds 8 experts and n_routed_experts=16"):
        split_experts(state, other)
