"""`attach`, the name "moesaic" in transformers, and what is refused."""

import copy
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers as hf
from hf_models import COMMON, eager, experts_of, loud, relative, seeing_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import moesaic as ms
from moesaic.engine.select import select_engine
from moesaic.engine.spec import ExpertSpec
from moesaic.hf.experts import Served, serve


def test_from_pretrained_takes_the_name_and_a_saved_model_does_not_carry_it(tmp_path):
    model, ids = eager(loud("qwen3_moe")), token_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation="moesaic")
    assert relative(loaded(ids).logits, expected) < 1e-5
    assert all("_moesaic" in vars(experts) for experts in experts_of(loaded))
    loaded.save_pretrained(tmp_path / "b")
    assert "moesaic" not in (tmp_path / "b" / "config.json").read_text()
    assert json.loads((tmp_path / "b" / "config.json").read_text()).get("model_type") == "qwen3_moe"
    without = "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(m.dtype)"
    subprocess.run([sys.executable, "-c", without, str(tmp_path / "b")], check=True, capture_output=True)


@pytest.mark.parametrize("first", ["moesaic.hf", "transformers.integrations.moe"])
def test_importing_the_room_registers_whenever_transformers_comes(first):
    code = (
        f"import sys, {first}\n"
        "if 'transformers' not in sys.modules: print('light')\n"
        "import moesaic.hf\n"
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as table\n"
        "print(table['moesaic'].__module__, fp8['moesaic'].__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light = ["light"] if first == "moesaic.hf" else []
    assert run.stdout.split() == [*light, "moesaic.hf.experts", "moesaic.hf.experts"]


def test_a_recording_of_an_attached_model_holds_the_same_picks():
    model, ids = eager(loud("deepseek_v3")), token_ids()
    picks = []
    for _ in range(2):
        with ms.record(model) as recording, torch.no_grad():
            model(ids)
        picks.append(recording.trace.to_arrays()["picks"])
        ms.attach(model)
    assert (picks[0] == picks[1]).all()


def test_a_model_inside_a_model_is_reached():
    model = eager(seeing_model())
    ids = token_ids()
    expected = model(ids).logits.detach()
    ms.attach(model)
    assert set(model.get_experts_implementation().values()) == {"moesaic"}
    assert relative(model(ids).logits.detach(), expected) < 1e-5
    assert len([e for e in experts_of(model) if "_moesaic" in vars(e)]) == 3


def test_bare_blocks_and_wrapped_models_and_own_layers_are_reached():
    model = eager(loud("qwen3_moe"))
    block = model.model.layers[0].mlp
    ms.attach(block)
    assert model.config._experts_implementation == "moesaic"
    ms.attach(nn.ModuleDict({"student": eager(model)}))
    assert model.config._experts_implementation == "moesaic"
    config = ms.MoEConfig(hidden_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2)
    own = ms.MoE(config)
    assert ms.attach(own, engine="reference", batch_invariant=True) is own
    assert (own.experts.engine, own.experts.batch_invariant, own.experts.recompute) == ("reference", True, False)


def test_options_reach_the_engine_and_survive_copies(monkeypatch):
    options = {"engine": "cpu", "batch_invariant": True, "recompute": True}
    model, ids = ms.attach(eager(loud("qwen3_moe")), **options), token_ids()
    expected = model(ids).logits
    asked = []

    def select(engine, device, dtype, **rest):
        asked.append({"engine": engine, **rest})
        return select_engine(engine, device, dtype, **rest)

    monkeypatch.setattr("moesaic.hf.experts.select_engine", select)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
        assert all(vars(experts)["_moesaic"] == Served(ExpertSpec(), False, **options) for experts in experts_of(other))
    assert asked == 3 * 3 * [options]


def test_the_way_back_is_transformers_own():
    model, ids = eager(loud("qwen3_moe")), token_ids()
    expected = model(ids).logits
    assert not torch.equal(ms.attach(model)(ids).logits, expected)  # last bits: another engine did run
    assert torch.equal(eager(model)(ids).logits, expected)


def changed(family="qwen3_moe", **attributes):
    experts = experts_of(loud(family))[0]
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


def silu_gate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


GELU, GELU_TANH = ExpertSpec("gelu"), ExpertSpec("gelu_pytorch_tanh")
GPT_OSS = ExpertSpec(alpha=1.702, up_offset=1.0, interleaved=True, transposed=True)


@pytest.mark.parametrize(
    ("experts", "spec"),
    [
        (lambda: changed(act_fn=nn.GELU()), GELU),
        (lambda: changed(act_fn=nn.GELU("tanh")), GELU_TANH),
        (lambda: changed(act_fn=hf.activations.ACT2FN["gelu_new"]), GELU_TANH),
        (lambda: changed(act_fn=nn.ReLU()), ExpertSpec("relu")),
        (lambda: changed("gpt_oss", limit=3, alpha=1.25), replace(GPT_OSS, limit=3.0, alpha=1.25)),
        (lambda: changed("gpt_oss", limit=900.0), replace(GPT_OSS, limit=900.0)),
        (lambda: changed("gpt_oss", limit=math.inf), GPT_OSS),
    ],
)
def test_what_a_module_computes_is_read_from_the_module(experts, spec):
    assert serve(experts()).spec == spec


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (lambda: changed(act_fn=nn.Mish()), r"has an activation that is none of ours \(_default_apply_gate, Mish\)"),
        (lambda: changed(act_fn=nn.LeakyReLU(1e-4)), "none of ours"),
        (lambda: changed(_apply_gate=lambda x: 1.001 * silu_gate(x)), "none of ours"),
        (lambda: changed(_apply_gate=lambda x: nn.functional.silu(x.chunk(2, -1)[0])), "none of ours"),
        (lambda: changed(_apply_gate=lambda x: x.no_such_thing), "fails on plain numbers .*no_such_thing"),
        (lambda: changed("gpt_oss", is_concatenated=True), "none of ours"),
        (lambda: changed(has_post_expert_norm=True), "normalises the output of every expert"),
        (lambda: changed(has_bias=True), "has no gate_up_proj_bias"),
        (lambda: changed(down_proj_scale=nn.Parameter(torch.ones(8))), "holds down_proj_scale beside the usual"),
        (lambda: changed().to(torch.float8_e4m3fn), "holds gate_up_proj in torch.float8_e4m3fn"),
    ],
)
def test_a_module_that_computes_something_else_is_refused_with_the_reason(experts, reason):
    module = experts()
    with pytest.raises(ValueError, match=rf"^\w+Experts .*{reason}") as caught:
        ms.attach(module)
    assert "use experts_implementation='grouped_mm' or 'eager'" in str(caught.value)
    assert "_moesaic" not in vars(module)
    assert module.config._experts_implementation != "moesaic"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)), "LlamaForCausalLM has no experts"),
        (
            lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**COMMON, head_dim=16, num_local_experts=4)),
            r"Llama4ForCausalLM computes its experts \(Llama4TextExperts\) itself",
        ),
    ],
)
def test_where_there_is_nothing_to_attach_to_attach_says_so(model, reason):
    with pytest.raises(ValueError, match=f"nothing to attach to: {reason}"):
        ms.attach(model())


class Int8Tensor(torch.Tensor):
    """Stands for a quantised weight of torchao: it holds other tensors, and says that it is float32."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __tensor_flatten__(self):
        return [], None

    @staticmethod
    def __tensor_unflatten__(_inner, _context, size, _stride):
        return Int8Tensor(size)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_weights_that_only_say_that_they_are_floats_are_refused_at_once():
    model = eager(loud("qwen3_moe"))
    experts = experts_of(model)[1]
    experts.down_proj = nn.Parameter(Int8Tensor(experts.down_proj.shape), requires_grad=False)
    with pytest.raises(ValueError, match=r"holds down_proj as Int8Tensor: moesaic cannot serve it, use experts_impl"):
        ms.attach(model)
    assert model.config._experts_implementation == "eager"


def test_experts_that_are_quantised_are_named_with_their_dtype():
    class FP8Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 4).to(torch.float8_e4m3fn), requires_grad=False)

    model = nn.Module()
    model.experts = FP8Experts()
    with pytest.raises(ValueError, match=r"computes its experts \(FP8Experts, torch.float8_e4m3fn\) itself"):
        ms.attach(model)


def test_one_module_that_cannot_be_served_leaves_the_whole_model_as_it_was():
    model = eager(loud("qwen3_moe"))
    experts_of(model)[-1].act_fn = nn.Mish()
    with pytest.raises(ValueError, match="Mish"):
        ms.attach(model)
    assert not any("_moesaic" in vars(experts) for experts in experts_of(model))
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="engine='fastest' is unknown"):
        ms.attach(model, engine="fastest")


def test_a_model_that_changed_since_it_was_attached_is_read_again():
    model = ms.attach(loud("qwen3_moe"), recompute=True)
    experts_of(model)[0].act_fn = nn.Mish()
    for refuses in (lambda: ms.attach(model), lambda: model(token_ids())):
        with pytest.raises(ValueError, match="Mish"):
            refuses()
    assert all(vars(experts)["_moesaic"].recompute for experts in experts_of(model)[1:]), (
        "the others keep their options"
    )
    experts_of(model)[0].act_fn = nn.GELU(approximate="tanh")
    assert {vars(experts)["_moesaic"].spec.activation for experts in experts_of(ms.attach(model))} >= {
        "gelu_pytorch_tanh"
    }


def test_where_transformers_refuses_to_switch_nothing_is_changed(monkeypatch):
    def locked(_name):
        raise RuntimeError("locked to another implementation")

    model = eager(loud("qwen3_moe"))
    monkeypatch.setattr(model, "set_experts_implementation", locked)
    with pytest.raises(ValueError, match="does not let this model change its experts: locked to another"):
        ms.attach(model)
    assert not any("_moesaic" in vars(experts) for experts in experts_of(model))
    assert model.config._experts_implementation == "eager"


def test_where_an_added_bias_cannot_be_read_nothing_is_switched(tmp_path):
    model = eager(loud("qwen3_moe"))
    model.config.moesaic_added_bias, model.config._name_or_path = True, str(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint with e_score_correction_bias"):
        ms.attach(model)
    assert not any("_moesaic" in vars(experts) for experts in experts_of(model))
    assert model.config._experts_implementation == "eager"


def test_by_name_alone_a_refusal_comes_with_the_first_forward():
    model = loud("qwen3_moe")
    model.set_experts_implementation("moesaic")
    experts_of(model)[0].act_fn = nn.Mish()
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts has an activation that is none of ours"):
        model(token_ids())


def test_a_search_without_an_import_does_not_cost_the_registration():
    code = (
        "import importlib.util, moesaic.hf; importlib.util.find_spec('transformers.integrations.moe');"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS; assert 'moesaic' in ALL_EXPERTS_FUNCTIONS"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
