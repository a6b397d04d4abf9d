import dataclasses
import json

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from moesaic.config import CHOICES, MoEConfig
from moesaic.engine.spec import ACTIVATIONS
from moesaic.families import PRESETS
from moesaic.hf_config import text_part
from moesaic.rules import SCORING, SELECTION
from moesaic.trace.imports import read_target


@pytest.mark.parametrize("beside", [{}, {"num_experts": None}, {"num_experts": 0}], ids=["nothing", "empty", "none"])
def test_of_a_config_with_a_text_model_inside_that_is_read(beside, tmp_path):
    inner = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    whole = {"model_type": "sees_and_reads", "text_config": {**inner, "num_hidden_layers": 3}, **beside}
    assert MoEConfig.from_hf(whole) == MoEConfig.from_hf(inner)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    target = read_target(str(tmp_path))
    assert (target.config, target.layers) == (MoEConfig.from_hf(inner), (0, 1, 2))


@pytest.mark.parametrize("inner", ["foo", ["a"], 5], ids=str)
def test_what_is_no_config_inside_is_passed_over(inner):
    whole = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert text_part({"text_config": inner, "model_type": "dense"}) == {"text_config": inner, "model_type": "dense"}
    assert MoEConfig.from_hf({**whole, "text_config": inner}) == MoEConfig.from_hf(whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 7}, r"n_routed_experts=256 is not a multiple of n_group=7: use 259 experts or n_group=8"),
        ({"n_routed_experts": 60}, r"n_routed_experts=60 is not a multiple of n_group=8: use 64 experts or n_group=6"),
        ({"n_group": 256}, r"n_group=256 leaves one expert per group .*: use n_group=128 or group_score='max'"),
        ({"topk_group": 9}, r"topk_group=9 exceeds n_group=8: use at most 8"),
        (
            {"topk_group": 1, "num_experts_per_tok": 33},
            r"num_experts_per_tok=33 exceeds the 32 experts of topk_group=1",
        ),
        ({"num_experts_per_tok": 300}, r"num_experts_per_tok=300 exceeds n_routed_experts=256: use at most 256"),
        ({"scoring_func": "tanh"}, r"scoring_func='tanh' is unknown: use one of 'sigmoid', 'softmax', 'sqrtsoftplus'"),
        ({"topk_method": "best"}, r"topk_method='best' is unknown: use one of 'noaux_tc', "),
        ({"router_dtype": "bf16"}, r"router_dtype='bf16' is unknown: use one of 'float32', 'model'"),
        ({"hidden_act": "swish"}, r"hidden_act='swish' is unknown"),
        ({"hidden_size": 0}, r"hidden_size=0 must be at least 1"),
        ({"moe_intermediate_size": -4}, r"moe_intermediate_size=-4 must be at least 1"),
        ({"n_shared_experts": -1}, r"n_shared_experts=-1 must be at least 0"),
        ({"num_experts_per_tok": 2.0}, r"num_experts_per_tok=2.0 is not an integer"),
        ({"n_group": True}, r"n_group=True is not an integer"),
        ({"hidden_size": "64"}, r"hidden_size='64' is not an integer"),
        ({"hidden_size": None}, r"hidden_size=None is not allowed: give an integer"),
        ({"norm_topk_prob": 1}, r"norm_topk_prob=1 is not a bool"),
        ({"routed_scaling_factor": float("nan")}, r"routed_scaling_factor=nan is not a finite number"),
        ({"routed_scaling_factor": float("inf")}, r"routed_scaling_factor=inf is not a finite number"),
        ({"routed_scaling_factor": np.float32("inf")}, r"routed_scaling_factor=.*inf.* is not a finite number"),
        ({"routed_scaling_factor": 10**400}, r"routed_scaling_factor=10+ is not a finite number"),
        ({"n_routed_experts": 10**400 + 1}, r"n_routed_experts=10+1 is not a multiple of n_group=8: use 10+8 experts"),
        ({"num_experts_per_tok": 5 * 10**400, "n_routed_experts": 8 * 10**400}, r"exceeds .* use topk_group=5 or"),
        ({"routed_scaling_factor": "2.5"}, r"routed_scaling_factor='2.5' is not a finite number"),
        ({"router_jitter_noise": 1.5}, r"router_jitter_noise=1.5 must lie in \[0, 1\)"),
        ({"swiglu_limit": 0.0}, r"swiglu_limit=0.0 clamps everything away: use None"),
        ({"gated": False, "interleaved": True}, r"interleaved=True is for gated experts"),
        ({"hidden_act": "gelu", "swiglu_alpha": 1.7}, r"swiglu_alpha=1.7 is the slope of SiLU"),
        ({"swiglu_limit": 7.0}, r"swiglu_limit=7.0 is not known to shared experts: use n_shared_experts=0"),
        ({"gated": False}, r"gated=False is not known to shared experts"),
        ({"n_shared_experts": 0, "shared_expert_gate": True}, r"n_shared_experts=0 has nothing to gate or to size"),
        ({"group_score": "k_over_m_sum", "num_experts_per_tok": 3}, r"group_score='k_over_m_sum' sums .*=0 scores"),
    ],
)
def test_impossible_config_is_refused_in_one_line_with_a_way_out(fields, message):
    with pytest.raises(ValueError, match=message) as refusal:
        MoEConfig.preset("deepseek-v3", **fields)
    assert "\n" not in str(refusal.value)
    assert ": " in str(refusal.value)


def test_the_way_out_that_a_refusal_names_is_accepted():
    assert MoEConfig.preset("deepseek-v3", n_routed_experts=64).n_routed_experts == 64
    assert MoEConfig.preset("deepseek-v3", n_routed_experts=60, n_group=6).experts_per_group == 10
    assert MoEConfig.preset("deepseek-v3", n_group=128).experts_per_group == 2


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig.preset("mixtral").n_group = 2


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_survives_its_own_dict(name):
    config = MoEConfig.preset(name)
    again = MoEConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()


def test_equal_configs_have_equal_digests():
    sizes = {"hidden_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = MoEConfig(**sizes, routed_scaling_factor=1.0)
    for same in (MoEConfig(**sizes, routed_scaling_factor=1), MoEConfig(**{k: np.int64(v) for k, v in sizes.items()})):
        assert same == config
        assert same.digest() == config.digest()
    assert MoEConfig(**sizes, routed_scaling_factor=2).digest() != config.digest()


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"preset='gpt-5' is unknown: use one of deepseek-v3, .*classic"):
        MoEConfig.preset("gpt-5")


@pytest.mark.parametrize(
    ("preset", "model_type", "overrides"),
    [
        ("deepseek-v3", "deepseek_v3", {}),
        ("mixtral", "mixtral", {}),
        ("qwen3-moe", "qwen3_moe", {"norm_topk_prob": True}),
        ("olmoe", "olmoe", {"intermediate_size": 1024}),
        ("gpt-oss", "gpt_oss", {}),
        ("glm4-moe", "glm4_moe", {}),
        (
            "deepseek-v2",
            "deepseek_v2",
            {
                "hidden_size": 5120, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_experts_per_tok": 6,
                "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
            },
        ),
    ],
)  # fmt: skip
def test_preset_equals_what_transformers_config_says(preset, model_type, overrides):
    hf_config = CONFIG_MAPPING[model_type](**overrides)
    assert MoEConfig.from_hf(hf_config) == MoEConfig.preset(preset)


@pytest.mark.parametrize("alias", ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"])
def test_from_hf_reads_the_aliases(alias):
    config = MoEConfig.from_hf(
        {"model_type": "qwen3_moe", "hidden_size": 8, alias: 16, "moe_topk": 2, "intermediate_size": 4}
    )
    assert (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (16, 2, 4)


def test_from_hf_reads_a_folder(tmp_path):
    hf_config = CONFIG_MAPPING["deepseek_v3"](hidden_size=64)
    hf_config.save_pretrained(tmp_path)
    assert MoEConfig.from_hf(tmp_path) == MoEConfig.from_hf(hf_config) == MoEConfig.from_hf(hf_config.to_dict())


def test_the_choices_of_a_config_are_what_the_rules_and_the_engines_know():
    assert set(CHOICES["scoring_func"]) == set(SCORING)
    assert set(CHOICES["topk_method"]) == {*SELECTION, "unknown"}
    assert CHOICES["hidden_act"] == tuple(ACTIVATIONS)


def test_a_family_without_experts_here_is_dense():
    dense = CONFIG_MAPPING["granitemoehybrid"](num_local_experts=0)
    with pytest.raises(ValueError, match="model_type='granitemoehybrid' has no experts"):
        MoEConfig.from_hf(dense)


def test_from_hf_refuses_what_it_cannot_know(tmp_path):
    with pytest.raises(ValueError, match="not an MoE model"):
        MoEConfig.from_hf({"model_type": "llama", "hidden_size": 64})
    with pytest.raises(ValueError, match="not a family known here"):
        MoEConfig.from_hf({"model_type": "unheard_of", "hidden_size": 64, "num_experts": 8})
    with pytest.raises(ValueError, match="model_type='phimoe' is not a family known here"):
        MoEConfig.from_hf(CONFIG_MAPPING["phimoe"]())  # it chooses by a comparison of its own
    with pytest.raises(ValueError, match="hidden_size is missing"):
        MoEConfig.from_hf({"model_type": "mixtral", "num_experts": 8, "num_experts_per_tok": 2})
    divided_by_k = {"model_type": "openai_privacy_filter", "hidden_size": 8, "num_local_experts": 4}
    with pytest.raises(ValueError, match="num_experts_per_tok is missing from the config"):
        MoEConfig.from_hf(divided_by_k)
    with pytest.raises(ValueError, match="num_experts_per_tok=0 must be at least 1"):
        MoEConfig.from_hf({**divided_by_k, "num_experts_per_tok": 0})
    for k in (4, np.int64(4)):
        assert MoEConfig.from_hf({**divided_by_k, "num_experts_per_tok": k}).routed_scaling_factor == 0.25
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder: give a model folder or a config\.json"):
        MoEConfig.from_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON, or cut short"):
        MoEConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("experts", "groups"), [(10**12 + 1, 2), (10**30 + 57, 10**29)])
def test_a_size_that_no_model_has_is_refused_at_once(experts, groups):
    with pytest.raises(ValueError, match=rf"n_routed_experts={experts} is not a multiple .* n_group=\d+$") as refusal:
        MoEConfig(hidden_size=1, n_routed_experts=experts, num_experts_per_tok=1, n_group=groups)
    assert experts % int(str(refusal.value).rpartition("=")[2]) == 0


@pytest.mark.parametrize(
    ("name", "digest"), [("deepseek-v3", "57dde957404e"), ("mixtral", "6fc65cd0ce47"), ("gpt-oss", "164481482705")]
)
def test_digests_stay_what_logs_of_earlier_versions_say(name, digest):
    """A field that is added to MoEConfig is left out of them where it has its default."""
    assert MoEConfig.preset(name).digest() == digest
