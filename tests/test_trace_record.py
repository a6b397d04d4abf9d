from functools import partial

import numpy as np
import pytest
import torch
from cases import v3
from hf_models import FAMILIES, tiny, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint
from traces import check_layer

import moesaic
from moesaic.article import MoEGate
from moesaic.config import MoEConfig
from moesaic.layer.moe import DeepseekV3MoE
from moesaic.layer.router import Router
from moesaic.trace.recording.record import record
from moesaic.trace.recording.watch import observe
from moesaic.types import Routing


def picks_by_wrapping(model, *args, **kwargs):
    """What every experts module was given, found without hooks: {module name: (ids, weights)}."""
    seen, undo = {}, []
    for name, module in model.named_modules():
        if name.endswith("experts") and "shared" not in name:
            original = module.forward

            def wrapped(tokens, ids, weights, name=name, original=original):
                seen[name] = (ids.clone(), weights.clone())
                return original(tokens, ids, weights)

            module.forward = wrapped
            undo.append(module)
    with torch.no_grad():
        model(*args, **kwargs)
    for module in undo:
        del module.forward
    return seen


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("detail", ["picks", "scores"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_what_the_experts_were_given(family, detail):
    model, ids = tiny(family), token_ids()
    truth = picks_by_wrapping(model, ids)
    with record(model, detail) as rec, torch.no_grad():
        model(ids)
    arrays = rec.trace.to_arrays()
    assert rec.trace.detail == detail
    for layer, (expert_ids, weights) in enumerate(truth.values()):
        assert np.array_equal(arrays["picks"][layer], expert_ids)
        assert np.array_equal(arrays["weights"][layer], weights.float())
    assert np.array_equal(arrays["input_ids"], ids.flatten())
    if detail == "scores":
        assert all(check_layer(rec.trace, layer).experts.all() for layer in range(len(truth)))
        assert all(check_layer(rec.trace, layer).weights.all() for layer in range(len(truth)))


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_no_bit_of_the_result_and_leaves_no_hook(family):
    model, ids = tiny(family), token_ids()
    before, hooks = model(ids).logits, hooks_of(model)
    with record(model, "scores"):
        during = model(ids).logits
    assert torch.equal(before, during)
    assert hooks_of(model) == hooks


def test_hooks_are_removed_and_the_record_usable_after_an_error():
    model, ids = tiny(), token_ids()
    hooks, recorders = hooks_of(model), []

    def fail():
        with record(model) as rec:
            recorders.append(rec)
            model(ids)
            model(torch.full((1, 2), 9999))

    with pytest.raises(IndexError):
        fail()
    assert hooks_of(model) == hooks
    assert len(recorders[0].trace) == 20


def test_a_forward_that_failed_says_nothing_about_the_next_one():
    model = tiny()
    with record(model) as rec:
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 9999))
        model.model.layers[1].mlp(torch.randn(1, 4, 32))
    assert len(rec.trace) == 4
    assert rec.trace.input_ids is None
    assert rec.trace.phases is None


def test_padding_is_left_out_where_a_mask_says_so():
    model, ids = tiny(), token_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, :6] = 0  # padded on the left
    with record(model) as rec:
        model(ids, attention_mask=mask)
    kept = mask.bool()
    whole = picks_by_wrapping(model, ids, attention_mask=mask)
    for layer, (expert_ids, _) in enumerate(whole.values()):
        assert np.array_equal(rec.trace.to_arrays()["picks"][layer], expert_ids[kept.flatten()])
    assert rec.trace.input_ids.tolist() == ids[kept].tolist()
    assert rec.trace.sequences.tolist() == [0] * 5 + [1] * 8 + [2] * 2


def test_masks_of_other_shapes_are_no_padding_masks():
    model, ids = tiny(), token_ids(2, 6)
    causal = torch.zeros(2, 1, 6, 6)
    with record(model) as rec:
        model(ids, attention_mask=causal)
    assert len(rec.trace) == 12


def test_forwards_follow_each_other_batch_major():
    model, first, second = tiny(), token_ids(2, 6), token_ids(3, 4)
    with record(model) as rec:
        model(first)
        model(input_ids=second)
    assert rec.trace.input_ids.tolist() == first.flatten().tolist() + second.flatten().tolist()
    assert rec.trace.sequences.tolist() == [0] * 6 + [1] * 6 + [2] * 4 + [3] * 4 + [4] * 4
    alone = [picks_by_wrapping(model, ids) for ids in (first, second)]
    for layer, name in enumerate(alone[0]):
        both = torch.cat([one[name][0] for one in alone])
        assert np.array_equal(rec.trace.to_arrays()["picks"][layer], both)


def test_decoding_steps_go_on_with_their_sequences():
    model, ids = tiny(), token_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with record(model) as rec:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert rec.trace.sequences.tolist() == [0] * 5 + [1] * 3 + [0, 1] * 2  # the last new token is never fed


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_tokens_are_counted_once(reentrant):
    model, ids, runs = tiny().train(), token_ids(), []
    for layer in model.model.layers:
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=reentrant)
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: runs.append(1))
    with record(model, "scores") as rec:
        model(ids, labels=ids).loss.backward()
    assert len(runs) == 2
    assert len(rec.trace) == ids.numel()
    assert rec.trace.n_layers == 2


def test_inner_modules_of_the_model_may_be_called_alone():
    model, ids = tiny(), token_ids()
    with record(model) as rec:
        model.model(ids)
        model(ids)
    assert rec.trace.input_ids is None  # the first call was not seen from outside, so its ids are not known
    assert rec.trace.sequences.tolist() == [0] * 20 + [1] * 10 + [2] * 10
    block = model.model.layers[1].mlp
    with record(model) as rec:
        block(torch.randn(2, 3, 32))
    assert rec.trace.layers == ("model.layers.1.mlp",)


def test_layers_that_saw_different_tokens_are_refused():
    model = tiny()
    with record(model) as rec:
        model(token_ids())
        model.model.layers[1].mlp(torch.randn(2, 3, 32))
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.2.mlp' has 20 tokens and layer 'model.layers.1.mlp' has 26"
    ):
        _ = rec.trace


def test_an_expert_that_a_token_is_given_twice_is_kept_and_counted(tmp_path):
    model = tiny("deepseek_v4", num_hash_layers=1)  # its table holds zeros until a checkpoint fills it
    with record(model) as rec, torch.no_grad():
        model(token_ids())
    assert rec.trace.picks[0].unique().tolist() == [0]
    assert rec.trace.repeats.tolist() == [20, 0, 0]
    rec.trace.save(tmp_path / "run.safetensors")
    assert moesaic.load(tmp_path / "run.safetensors").repeats.tolist() == [20, 0, 0]


def test_nothing_run_is_a_trace_without_tokens():
    with record(tiny(), "scores") as rec:
        pass
    assert len(rec.trace) == 0
    assert rec.trace.n_layers == 2
    assert rec.trace.to_arrays()["logits"].shape == (2, 0, 16)


@pytest.mark.parametrize("shape", [(2, 3, 32), (5, 32), (2, 2, 3, 32)])
def test_our_layer_and_its_gate_alone_give_the_same_record(shape):
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4, n_shared_experts=1)), torch.randn(shape)
    with record(layer, "scores") as of_layer:
        layer(x)
    with record(layer.gate, "scores") as of_gate:
        routing = layer.gate(x)
    for trace in (of_layer.trace, of_gate.trace):
        assert torch.equal(trace.picks[0].long(), routing.expert_ids)
        assert torch.equal(trace.logits[0], routing.logits)
        assert torch.equal(trace.sequences, of_layer.trace.sequences)
    assert of_layer.trace.n_sequences == (1 if len(shape) == 2 else x.numel() // 32 // shape[-2])


def test_the_articles_gate_gives_its_picks():
    gate = MoEGate(v3(16, 4, 2, 4))
    with record(gate) as rec:
        ids, weights = gate(torch.randn(2, 3, 32))
    assert torch.equal(rec.trace.picks[0].long(), ids)
    assert torch.equal(rec.trace.weights[0], weights)
    with record(gate, "scores") as rec:
        gate(torch.randn(2, 3, 32))
    with pytest.raises(ValueError, match="gave no logits per token: use detail='picks'"):
        _ = rec.trace


def test_the_bias_is_recorded_and_may_not_move_under_scores():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    layer.gate.e_score_correction_bias.normal_()
    with record(layer, "scores") as rec:
        layer(torch.randn(4, 32))
        assert torch.equal(rec.trace.bias[0], layer.gate.e_score_correction_bias)
        for _ in range(2):
            layer.gate.e_score_correction_bias += 1
            with pytest.raises(ValueError, match="bias of layer '' changed while its scores were recorded"):
                layer(torch.randn(4, 32))
    assert len(rec.trace) == 4
    with record(layer) as rec:
        layer(torch.randn(4, 32))
        layer.gate.e_score_correction_bias += 1
        layer(torch.randn(4, 32))
    assert len(rec.trace) == 8


def test_bfloat16_models_are_recorded_with_their_dtypes():
    model = tiny("mixtral").bfloat16()
    with record(model, "scores") as rec, torch.no_grad():
        model(token_ids())
    assert rec.trace.dtypes == {"logits": "bfloat16", "weights": "float32"}
    assert rec.trace.weights.dtype == torch.float32


def test_the_record_is_a_copy():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    with record(layer, "scores") as rec:
        routing = layer.gate(torch.randn(4, 32))
        layer.experts(torch.randn(4, 32), routing.expert_ids, routing.weights)
    kept = {name: array.copy() for name, array in rec.trace.to_arrays().items()}
    with torch.no_grad():
        routing.weights.zero_(), routing.logits.zero_(), routing.expert_ids.zero_()
    assert all(np.array_equal(array, kept[name]) for name, array in rec.trace.to_arrays().items())


def test_provenance_is_kept():
    model = tiny()
    with moesaic.record(model, labels=["poem", "code"], seed=7) as rec:
        model(token_ids())
    assert rec.trace.labels == ("poem", "code")
    assert rec.trace.seed == 7
    assert rec.trace.model == "DeepseekV3ForCausalLM"
    assert set(rec.trace.versions) == {"moesaic", "python", "torch", "transformers"}


def test_a_detail_that_is_not_known_is_refused():
    message = "detail='full' is unknown: use 'ids', 'picks' or 'scores'"
    with pytest.raises(ValueError, match=message), record(tiny(), "full"):
        pass


def test_observe_reports_every_call_with_live_tensors():
    layer, seen = DeepseekV3MoE(v3(16, 4, 2, 4)), []

    def see(name, routing):
        seen.append((name, routing))

    with observe({"gate": layer.gate}, see, routers=True), observe({"experts": layer.experts}, see):
        layer(torch.randn(2, 3, 32))
    assert [name for name, _ in seen] == ["gate", "experts"]
    gate, experts = (routing for _, routing in seen)
    assert isinstance(gate, Routing)
    assert gate.logits.requires_grad
    assert experts.logits is None
    assert experts.expert_ids is gate.expert_ids or torch.equal(experts.expert_ids, gate.expert_ids)
    assert hooks_of(layer) == 0
    layer(torch.randn(1, 32))
    assert len(seen) == 2


def test_experts_called_with_keywords_are_seen():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    x = torch.randn(3, 32)
    routing = layer.gate(x)
    with record(nn.ModuleDict({"moe": layer})) as rec:
        layer.experts(weights=routing.weights, tokens=x, expert_ids=routing.expert_ids)
    assert torch.equal(rec.trace.picks[0].long(), routing.expert_ids)


def test_a_few_logits_that_sum_to_one_are_recorded_as_they_are():
    router = Router(MoEConfig(hidden_size=4, n_routed_experts=4, num_experts_per_tok=1))
    router.weight.data = torch.eye(4)
    tokens = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-3.0, 1.0, 2.0, 5.0]])
    with record(router, "scores") as rec:
        for token in tokens:
            router(token[None])
    assert torch.equal(rec.trace.logits[0], tokens)
