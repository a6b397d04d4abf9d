"""Upcycled Hugging Face models give the logits of the dense ones, and what could not is refused."""

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from dense_models import DENSE, SMALL, dense, ids, logits
from hf_models import relative

import moesaic as ms
import moesaic.hf
from moesaic.hf.upcycle import target_of


@pytest.mark.parametrize(
    ("name", "granularity"), [*((name, 2) for name in DENSE), *product(["Llama", "Qwen3"], [1, 3])]
)
def test_a_model_gives_the_dense_logits_also_after_saving_and_in_every_implementation(name, granularity, tmp_path):
    model, tokens = dense(name), ids()
    expected = logits(model, tokens)
    moe = ms.upcycle(model, experts=4, k=2, granularity=granularity)
    assert relative(logits(moe, tokens), expected) < 2e-6
    moe.save_pretrained(tmp_path)
    for implementation in ("eager", "grouped_mm", "moesaic"):
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert again.config.model_type == DENSE[name][0]
        assert relative(logits(again, tokens), expected) < 2e-6


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_in_float64_only_the_router_of_transformers_rounds_which_is_float32(name):
    model, tokens = dense(name).double(), ids()
    moe = ms.upcycle(model, experts=4, k=2, granularity=2)
    moe.set_experts_implementation("eager")
    assert 1e-12 < relative(logits(moe, tokens), logits(model, tokens)) < 1e-6


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_in_bfloat16_a_model_is_as_near_to_float32_as_the_dense_one(name, granularity):
    model, tokens = dense(name), ids()
    truth = logits(model, tokens)
    half = model.bfloat16()
    moe = ms.upcycle(half, experts=4, k=2, granularity=granularity)
    assert moe.dtype == torch.bfloat16

    def error(each):  # of the middle token: where two copies tie, one can lose a slice
        return (logits(each, tokens).float() - truth).abs().amax(-1).median()

    assert error(moe) < 1.5 * error(half)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_all_but_the_mlps_is_carried_over_and_the_dense_model_stays(name):
    model = dense(name)
    model.generation_config.max_new_tokens = 7
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train().model.layers[0].eval()  # as one that is frozen
    moe = ms.upcycle(model, experts=4, k=2, granularity=2)
    assert moe.training
    assert [layer.training for layer in model.model.layers] == [False, True, True]
    assert moe.generation_config.max_new_tokens == 7
    kept = {key: value for key, value in moe.state_dict().items() if ".mlp." not in key}
    assert kept.keys() == {key for key in before if ".mlp." not in key}
    assert all(torch.equal(value, before[key]) for key, value in kept.items())
    tied = moe.lm_head.weight is moe.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_seed_decides_the_router_and_nothing_else_draws():
    model = dense()
    before = torch.get_rng_state()
    first, same, other = (ms.upcycle(model, experts=4, k=2, noise=0.1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), same.parameters(), strict=True))
    gates = [each.model.layers[0].mlp.gate.weight.detach() for each in (first, other)]
    assert not torch.equal(*gates)
    assert gates[0].std().item() == pytest.approx(model.config.initializer_range, rel=0.3)
    assert not torch.equal(gates[0], first.model.layers[1].mlp.gate.weight)


def test_the_shared_expert_of_qwen2_moe_is_silent_and_learns():
    moe = ms.upcycle(dense("Qwen2"), experts=4, k=2).train()
    shared = moe.model.layers[1].mlp.shared_expert
    assert not shared.down_proj.weight.any()
    tokens = ids()
    moe(input_ids=tokens, labels=tokens).loss.backward()
    assert shared.down_proj.weight.grad.abs().max() > 0


def test_an_upcycled_model_is_recorded_like_any_other():
    moe = ms.upcycle(dense(), experts=4, k=2, granularity=2)
    with ms.record(moe) as recorder:
        logits(moe, ids())
    picks = torch.from_numpy(recorder.trace.to_arrays()["picks"]).long()
    assert picks.shape == (3, 96, 4)
    assert (F.one_hot(picks % 2, 2).sum(-2) == 2).all(), "each half of the MLP twice"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)), {},
         "model_type='qwen3_moe' is an MoE model already: give a dense one"),
        (lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**SMALL)), {},
         "model_type='olmo' has no MoE family of the same block: give one of llama, mistral,"),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, attention_bias=True)), {},
         "attention_bias=True is not known to mixtral: give a llama model with False"),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, mlp_bias=True)), {},
         "mlp_bias=True is not known to mixtral"),
        (lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**SMALL)), {},
         "layer_types='sliding_attention' is not known to flex_olmo: give a olmo3 model with 'full_attention'"),
        (lambda: hf.Qwen3Model(hf.Qwen3Config(**SMALL)), {}, "Qwen3Model is not a causal language model"),
        (lambda: torch.nn.Linear(2, 2), {}, "Linear is not a causal language model of transformers"),
        (dense, {"granularity": 5}, "granularity=5 does not cut the width 48 into equal slices: use 4 or 6"),
        (dense, {"experts": 1}, "experts=1 leaves nothing to route: use 2 or more"),
        (dense, {"experts": 4, "k": 5}, "k=5 is not within 1 and experts=4: use 1 to 4"),
        (dense, {"noise": -0.1}, "noise=-0.1 is no share"),
        (dense, {"router_std": -1.0}, "router_std=-1.0 is no deviation: use 0 or a positive number"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_upcycled_is_refused(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        ms.upcycle(make(), **options)
    assert "\n" not in str(refused.value)


def test_a_model_with_a_text_model_of_experts_is_one_already():
    with pytest.raises(ValueError, match="model_type='aria' is an MoE model already"):
        target_of(hf.AriaConfig())


def test_a_model_whose_modules_were_exchanged_is_found_by_its_output():
    model = dense()
    model.model.layers[1].mlp.act_fn = torch.nn.Mish()
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM and Qwen3MoeForCausalLM differ by \S+ of the logits"):
        ms.upcycle(model)
    model = dense()
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"do not hold the same weights, such as model.layers.0.extra"):
        ms.upcycle(model)
