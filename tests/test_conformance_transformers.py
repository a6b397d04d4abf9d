"""transformers' own routers: none differs from the definition, and what is fragile about each is listed here."""

import json

import pytest
import torch
import transformers
from hf_every_family import families, tiny_of
from hf_models import FAMILIES, seeing_model, tiny
from packaging.version import Version
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moesaic.config import MoEConfig
from moesaic.conformance import check
from moesaic.conformance.targets import find, gate_in
from moesaic.hf.load import TINY

TIES = {"ties-experts"}  # torch.topk leaves them open
VIEW = {"strides-refused"}  # hidden_states.view
AUTOCAST = {"autocast"}  # a linear on float32 operands runs in bfloat16 under autocast all the same
BIAS = {"bias-cast", "bias-load"}  # _keep_in_fp32_modules_strict works in from_pretrained alone
GROUPS = {"ties-groups", "too-many"}
FRAGILE = {
    "deepseek_v3": TIES | VIEW | AUTOCAST | BIAS | GROUPS,
    "deepseek_v2": TIES | VIEW | AUTOCAST | GROUPS | {"masked-underflow"},  # fills masked experts with 0
    "glm4_moe": TIES | VIEW | AUTOCAST | BIAS | GROUPS,
    "mixtral": TIES,
    "qwen2_moe": TIES,
    "qwen3_moe": TIES,
    "olmoe": TIES,
    "gpt_oss": TIES,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_of_transformers_follows_the_definition_and_its_fragile_points_are_known(family):
    report = check(tiny(family))
    assert [str(result) for result in report.failed("wrong")] == []
    assert {result.probe.id for result in report.failed("fragile")} == FRAGILE[family]
    assert sum(result.outcome == "pass" for result in report.results) >= 20


# the suite cannot set their logits: hash routing, shared experts among the logits, a multiplier, a network before them
CANNOT_BE_ASKED = {"deepseek_v4", "inkling", "muse_spark", "zaya"}
if Version(transformers.__version__) < Version("5.23"):
    CANNOT_BE_ASKED |= {"jamba"}  # its router was a plain linear, and its block chose


@pytest.mark.parametrize("family", families())
def test_no_router_of_any_family_differs_from_the_definition(family):
    model = tiny_of(family).model
    if model is None:
        pytest.skip(f"{family} does not build tiny")
    if family in CANNOT_BE_ASKED:
        with pytest.raises(
            ValueError, match=r"cannot be judged|give (the router itself|its router)|they cannot be set"
        ):
            check(model)
        return
    report = check(model)
    assert not report.failed("wrong")
    assert sum(result.outcome == "pass" for result in report.results) >= (
        20 if report.gate.config.rule_is_known else 12
    )


def test_the_released_sizes_of_deepseek_v3_are_judged_from_its_config_alone(tmp_path):
    sizes = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_hidden_layers": 5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    gate = find(str(tmp_path))
    assert isinstance(gate.module, DeepseekV3TopkRouter)
    assert gate.weight.shape == (256, 7168)
    assert not gate.weight.is_meta
    assert gate.name == "DeepseekV3TopkRouter model.layers.3.mlp"
    assert gate.config == MoEConfig.from_hf({**sizes, "moe_intermediate_size": 2048, "n_shared_experts": 1})
    assert find(str(tmp_path / "config.json")).config == gate.config


def test_a_model_that_sees_is_judged_from_its_config_alone(tmp_path):
    config = seeing_model().config
    config.save_pretrained(tmp_path)
    gate = find(str(tmp_path))
    assert gate.name == "Qwen3VLMoeTextTopKRouter model.language_model.layers.0.mlp"
    assert gate.config == MoEConfig.from_hf(config)


def test_a_folder_gives_its_real_gate_with_its_bias():
    first, second = find(str(TINY)), find(str(TINY), layer=1)
    assert first.name != second.name
    assert first.weight.std() > 0
    assert not torch.equal(first.weight, second.weight)
    bias = dict(first.module.named_buffers())[first.bias_name]
    assert bias.abs().max() > 0
    report = check(first)
    assert report.conforms
    assert next(r for r in report.results if r.probe.id == "own-weights").outcome == "pass"


def test_other_settings_are_built_where_the_family_has_them():
    gate = gate_in(tiny("deepseek_v3"))
    other = gate.changed(topk_group=1).changed(num_experts_per_tok=3)
    assert (other.module.topk_group, other.module.top_k) == (1, 3)
    assert (other.config.topk_group, other.config.num_experts_per_tok) == (1, 3)
    assert gate.config.topk_group == 2
    for family, field, value, why in (
        ("mixtral", "routed_scaling_factor", 2.0, "it has no setting routed_scaling_factor"),
        ("deepseek_v2", "norm_topk_prob", True, "it does not read norm_topk_prob"),
        ("deepseek_v3", "scoring_func", "softmax", "it has no setting scoring_func"),
    ):
        with pytest.raises(Exception, match=why):
            gate_in(tiny(family)).changed(**{field: value})


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="layer=7 is not there: use 0 to 1"):
        gate_in(tiny("deepseek_v3"), 7)


@pytest.mark.parametrize("spoil", ["mask", "scale"])
def test_a_patched_router_of_transformers_is_caught(spoil, monkeypatch):
    """The suite judges the live code: with its known old bug put back, transformers' gate fails."""
    forward = DeepseekV3TopkRouter.forward

    def patched(self, hidden_states):
        if spoil == "scale":
            logits, weights, ids = forward(self, hidden_states)
            return logits, weights * self.routed_scaling_factor, ids
        fill = torch.Tensor.masked_fill
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "masked_fill", lambda t, mask, _value: fill(t, mask, 0.0))
            return forward(self, hidden_states)

    monkeypatch.setattr(DeepseekV3TopkRouter, "forward", patched)
    failed = {result.probe.id for result in check(tiny("deepseek_v3", routed_scaling_factor=2.5)).failed("wrong")}
    assert {"mask": "masked-groups", "scale": "scaled-once"}[spoil] in failed
