"""A model run again with recorded experts."""

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import v3
from hf_every_family import families, run, tiny_of
from hf_every_family import token_ids as few_ids
from hf_models import CACHE, FAMILIES, tiny, token_ids
from torch.utils.checkpoint import checkpoint

from moesaic import rules
from moesaic.config import MoEConfig
from moesaic.hf.attach import attach
from moesaic.hf.modules import moe_layers
from moesaic.layer.moe import DeepseekV3MoE, MoE
from moesaic.layer.router import Router
from moesaic.rules import route
from moesaic.trace.file.reader import load
from moesaic.trace.recording.forwards import cache_of
from moesaic.trace.recording.record import record
from moesaic.trace.reroute.replay import replay
from moesaic.trace.reroute.what_if import what_if
from moesaic.trace.rule.steps import steps

KNOWN = [*FAMILIES, "granitemoe", "lfm2_moe", "minimax_m2", "nemotron_h"]  # those whose tiny model has a rule of ours


def recorded(model, *calls, **options):
    """(what the model gave, the trace) of some calls."""
    with record(model, detail="scores", **options) as recorder, torch.no_grad():
        outputs = [model(**call) for call in calls]
    return [getattr(output, "logits", output) for output in outputs], recorder.trace


@pytest.mark.slow  # a model of each of 60 families
@pytest.mark.parametrize("family", families())
def test_every_family_is_replayed_routed_again_and_shown_or_refused_by_its_unknown_rule(family):
    model = tiny_of(family).model
    if model is None:
        pytest.skip(tiny_of(family).reasons[0])
    try:
        with record(model, detail="scores") as recorder:
            expected = run(model, few_ids())
        trace = recorder.trace
    except ValueError:
        with record(model) as recorder:
            expected = run(model, few_ids())
        trace = recorder.trace
    with replay(model, trace, weights="recorded"):
        assert torch.equal(run(model, few_ids()), expected)
    known = all(config.rule_is_known for config in trace.configs)
    if known:
        with replay(model, trace):
            assert torch.equal(run(model, few_ids()), expected)
        if trace.logits is not None:
            assert not what_if(trace).flipped.any()
    else:
        # a new deepseek_v4 hashes every token to expert 0, as often as it has slots
        reason = "has expert e0 twice" if family == "deepseek_v4" else "is not known"
        with pytest.raises(ValueError, match=reason):
            what_if(trace)
        with pytest.raises(ValueError, match="is not known, so its weights cannot be made again"):
            replay(model, trace).__enter__()
    derived = [step for step in steps(trace, 0, 3) if step.stage.key in ("scores", "masked", "normalised")]
    assert known or all(step.value is None for step in derived)


def change_routers(model):
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.add_(torch.randn_like(layer.router.weight) * 0.3)


def same_picks(one, two):
    return torch.equal(one.picks, two.picks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", KNOWN)
def test_an_unchanged_model_gives_the_recorded_logits_to_the_last_bit(family, dtype):
    model = tiny(family).to(dtype)
    ids = token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    with replay(model, trace) as replayer, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert replayer.tokens == len(trace)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", KNOWN)
def test_with_other_routers_ids_stay_and_weights_follow_the_live_logits(family):
    model = tiny(family)
    ids = token_ids()
    (before,), trace = recorded(model, {"input_ids": ids})
    change_routers(model)
    with replay(model, trace):
        (after,), again = recorded(model, {"input_ids": ids})
    assert same_picks(again, trace)
    assert not torch.equal(after, before)
    assert not torch.allclose(again.weights, trace.weights)
    for layer in range(trace.n_layers):
        rule = route(again.logits[layer], None, trace.configs[layer], replay=trace.picks[layer].long())
        torch.testing.assert_close(again.weights[layer], rule.weights, rtol=1e-5, atol=1e-7)
    assert not same_picks(recorded(model, {"input_ids": ids})[1], trace)  # without replay they choose others


def experts_by_hand(layer, tokens, ids):
    """What a layer gives with these experts, and gradients through plain operations only."""
    scores = (tokens @ layer.gate.weight.T).sigmoid().gather(-1, ids)
    weights = scores / scores.sum(-1, keepdim=True) * layer.config.routed_scaling_factor
    out = torch.zeros_like(tokens)
    for token in range(len(tokens)):
        for slot in range(ids.shape[1]):
            expert = ids[token, slot]
            gate, up = (layer.experts.gate_up_proj[expert] @ tokens[token]).chunk(2)
            down = layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            out[token] = out[token] + weights[token, slot] * down
    return out


def test_gradients_reach_the_router_through_the_live_weights():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4)).double()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    _, trace = recorded(layer, {"x": x})
    change_routers(layer)
    with replay(layer, trace):
        out = layer(x)
    expected = experts_by_hand(layer, x.flatten(0, 1), trace.picks[0].long())
    torch.testing.assert_close(out.flatten(0, 1), expected)
    seed = torch.randn_like(expected)
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    parameters = [layer.get_parameter(name) for name in names]
    here = torch.autograd.grad(out.flatten(0, 1), parameters, seed)
    there = torch.autograd.grad(expected, parameters, seed)
    for one, two in zip(here, there, strict=True):
        torch.testing.assert_close(one, two)
    assert here[0].abs().max() > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_gradients_reach_the_routers_of_transformers(family):
    model = tiny(family).train()
    ids = token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    change_routers(model)
    with replay(model, trace):
        model(input_ids=ids).logits.square().mean().backward()
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in moe_layers(model))


@pytest.mark.parametrize("make", [lambda: DeepseekV3MoE(v3(16, 4, 2, 4)), lambda: MoE.classic(32, 16, 8, 8, 2)])
def test_our_layers_replay_and_count_the_load_of_the_record(make):
    layer = make().train()
    x = torch.randn(3, 5, 32)
    (expected,), trace = recorded(layer, {"x": x})
    with replay(layer, trace), torch.no_grad():
        assert torch.equal(layer(x), expected)
    change_routers(layer)
    with replay(layer, trace):
        layer(x)
    counts = torch.bincount(trace.picks.flatten().long(), minlength=trace.n_experts)
    assert torch.equal(layer.gate.load.long(), counts)


def test_a_bare_router_replays():
    router = Router(v3(16, 4, 2, 4))
    x = torch.randn(2, 4, 32)
    with record(router) as recorder:
        expected = router(x)
    with replay(router, recorder.trace):
        assert torch.equal(router(x).weights, expected.weights)
    with torch.no_grad():
        router.weight.neg_()
    with replay(router, recorder.trace):
        assert torch.equal(router(x).expert_ids, expected.expert_ids)


def test_several_forwards_are_replayed_in_their_order():
    model = tiny()
    calls = [{"input_ids": token_ids(2, 7)}, {"input_ids": token_ids(1, 4)}, {"input_ids": token_ids(3, 5)}]
    expected, trace = recorded(model, *calls)
    with replay(model, trace) as replayer, torch.no_grad():
        for call, logits in zip(calls, expected, strict=True):
            assert torch.equal(model(**call).logits, logits)
    assert replayer.tokens == len(trace) == 33


def test_generated_texts_are_replayed_while_generating_and_when_read_at_once():
    model = tiny("qwen3_moe")
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with record(model) as recorder:
        text = model.generate(ids, **options)
    trace = recorder.trace
    with replay(model, trace) as replayer:
        assert torch.equal(model.generate(ids, **options), text)
    assert replayer.tokens == len(trace) == 20
    change_routers(model)
    with replay(model, trace), record(model) as again, torch.no_grad():
        model(input_ids=text[:, :-1])
    assert torch.equal(again.trace.picks, trace.picks[:, trace.sequences.argsort(stable=True)])


def test_what_was_decoded_token_by_token_is_replayed_as_a_whole_text_and_the_reverse():
    model = tiny("qwen3_moe")
    ids = token_ids(2, 8)
    with record(model) as recorder, torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        for at in range(5, 8):
            out = model(input_ids=ids[:, at : at + 1], **{CACHE: cache_of(out)}, use_cache=True)
    pieces = recorder.trace
    change_routers(model)
    with replay(model, pieces), record(model) as whole, torch.no_grad():
        model(input_ids=ids)
    order = pieces.sequences.argsort(stable=True)
    assert torch.equal(whole.trace.picks, pieces.picks[:, order])
    with replay(model, whole.trace), record(model) as again, torch.no_grad():
        out = model(input_ids=ids[:, :3], use_cache=True)
        model(input_ids=ids[:, 3:], **{CACHE: cache_of(out)}, use_cache=True)
    order = again.trace.sequences.argsort(stable=True)
    assert torch.equal(again.trace.picks[:, order], whole.trace.picks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_the_models_own_choice(side):
    model = tiny()
    ids, mask = token_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, padded in enumerate((0, 3, 5)):
        mask[row, slice(0, padded) if side == "left" else slice(8 - padded, 8)] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    (expected,), trace = recorded(model, call)
    assert len(trace) == 16
    with replay(model, trace) as replayer, torch.no_grad():
        assert torch.equal(model(**call).logits, expected)
    assert replayer.tokens == 16
    change_routers(model)
    with replay(model, trace):
        assert same_picks(recorded(model, call)[1], trace)


def spied(model):
    """Every (layer, ids) that experts are called with, recomputation included."""
    seen = []

    def hook(name):
        return lambda _module, args: seen.append((name, args[1].clone()))

    return seen, [layer.experts.register_forward_pre_hook(hook(layer.name)) for layer in moe_layers(model)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_takes_the_same_experts_also_where_the_router_is_noisy(reentrant):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(DeepseekV3MoE(v3(16, 4, 2, 4, router_jitter_noise=0.5)) for _ in range(2))
            self.checkpointed = True

        def forward(self, x):
            for layer in self.layers:
                run = lambda x, layer=layer: x + layer(x)  # noqa: E731
                x = (
                    checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=False)
                    if self.checkpointed
                    else run(x)
                )
            return x

    model = Two().train()
    batches = [torch.randn(2, 5, 32, requires_grad=True) for _ in range(3)]
    model.checkpointed = False
    with record(model) as recorder:
        for x in batches:
            model(x)
    trace, model.checkpointed = recorder.trace, True
    with replay(model, trace):
        seen, hooks = spied(model)
        losses = [model(x).square().sum() for x in batches]
        for loss in (losses[1], losses[0], losses[2]):  # in no order in particular
            loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == 12
    wanted = {
        (f"layers.{layer}", tuple(map(tuple, trace.picks[layer, 10 * batch : 10 * batch + 10].tolist())))
        for layer in range(2)
        for batch in range(3)
    }
    given = [(name, tuple(map(tuple, ids.tolist()))) for name, ids in seen]
    assert set(given) == wanted
    assert all(given.count(call) == 2 for call in wanted)  # once forward, once again


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_a_checkpointed_model_are_those_of_the_same_without(reentrant):
    model = tiny("deepseek_v3").train()
    batches = [token_ids(2, 6), token_ids(2, 6)]
    _, trace = recorded(model, *({"input_ids": ids} for ids in batches))
    change_routers(model)
    gradients = []
    for checkpointed in (False, True):
        other = copy.deepcopy(model)
        if checkpointed:
            enable = getattr(other, "activation_checkpointing_enable", None) or other.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        with replay(other, trace):
            sum(other(input_ids=ids, use_cache=False).logits.square().mean() for ids in batches).backward()
        gradients.append({name: p.grad for name, p in other.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_recorded_weights_can_be_taken_and_leave_no_gradient():
    model = tiny("mixtral").train()
    ids = token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    change_routers(model)
    with replay(model, trace, weights="recorded"):
        out = model(input_ids=ids).logits
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    assert all(layer.router.weight.grad is None for layer in moe_layers(model))
    foreign = MoEConfig(hidden_size=32, n_routed_experts=8, num_experts_per_tok=2, topk_method="unknown")
    with pytest.raises(ValueError, match="is not known, so its weights cannot be made again"):
        replay(model, trace, config=foreign).__enter__()
    with replay(model, trace, weights="recorded", config=foreign):
        model(input_ids=ids)


def test_a_rule_that_is_not_the_models_is_found_before_its_weights_are_used():
    model = tiny("mixtral")
    ids = token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    wrong = replace(trace.configs[0], norm_topk_prob=False)
    with pytest.raises(ValueError, match="makes its weights by another rule than its config says"):  # noqa: SIM117
        with replay(model, trace, config=wrong):
            model(input_ids=ids)


def test_a_gate_whose_code_rounds_otherwise_keeps_its_own_bits(monkeypatch):
    """As a kernel on a GPU does: where the model would choose what was recorded, its own weights are taken."""
    ulp = SimpleNamespace(score=rules.score, weigh=lambda *args: rules.weigh(*args) * (1 + 2.0**-22))
    monkeypatch.setattr(sys.modules["moesaic.trace.reroute.replay"], "rules", ulp)
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4)), torch.randn(2, 5, 32)
    (expected,), trace = recorded(layer, {"x": x})
    with replay(layer, trace), torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_slots_without_an_expert_stay_empty():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    x = torch.randn(6, 32)
    _, trace = recorded(layer, {"x": x})
    picks = trace.picks.clone()
    picks[0, 2] = 16
    picks[0, 3, 1] = 16
    with replay(layer, replace(trace, picks=picks)), torch.no_grad():
        out = layer(x)
    assert (out[2] == 0).all()
    ids = picks[0].long()
    expected = layer.experts(x, ids, route(layer.gate(x).logits, None, layer.config, replay=ids).weights)
    torch.testing.assert_close(out, expected)


def test_a_model_runs_without_an_expert_that_a_what_if_dropped():
    model = tiny()
    ids = token_ids()
    (before,), trace = recorded(model, {"input_ids": ids})
    busiest = int(trace.picks[0].flatten().bincount(minlength=16).argmax())
    without = what_if(trace, drop_experts=[busiest]).trace
    with replay(model, without):
        (after,), again = recorded(model, {"input_ids": ids})
    assert not (again.picks == busiest).any()
    assert not torch.equal(after, before)


def test_another_trace_is_refused_with_what_does_not_fit():
    model, ids = tiny("mixtral"), token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    wider, deeper = tiny("mixtral", num_local_experts=4), tiny("mixtral", num_hidden_layers=4)
    for other, message in (
        (tiny("deepseek_v3", n_routed_experts=8, num_experts_per_tok=2), "it has a layer 'model.layers.0.mlp', and"),
        (wider, "8 experts, and layer 'model.layers.0.mlp' has 4"),
        (tiny("mixtral", num_experts_per_tok=3), "2 experts per token, and layer 'model.layers.0.mlp' has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(other, trace).__enter__()
    for options, message in (
        ({"weights": "old"}, "weights='old' is unknown: use 'live' or 'recorded'"),
        ({"weights": "recorded", "trace": replace(trace, weights=None)}, "the trace holds ids only"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(model, **{"trace": trace, **options}).__enter__()
    for call, message in (
        (lambda: deeper(input_ids=ids), "layer 'model.layers.3.mlp' runs and is not in the trace"),
        (lambda: deeper(input_ids=token_ids(2, 11)), "sequence 0 of the trace has 10 tokens and the model runs 11 of"),
        (lambda: deeper(input_ids=(ids + 1) % 64), "of the trace has id .* and the model is given"),
        (
            lambda: deeper(input_ids=ids.T[:7].reshape(1, 14)),
            "sequence 0 of the trace has 10 tokens and the model runs 14",
        ),
        (lambda: deeper(input_ids=ids.reshape(4, 5)), "the trace has 2 sequences and the model begins another"),
    ):
        with pytest.raises(ValueError, match=message):  # noqa: SIM117
            with replay(deeper, trace):
                call()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in deeper.modules())


def test_more_tokens_than_recorded_are_refused_in_a_later_forward():
    model, ids = tiny("mixtral"), token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    with replay(model, trace), torch.no_grad():
        model(input_ids=ids)
        with pytest.raises(ValueError, match="the trace has 2 sequences and the model begins another"):
            model(input_ids=ids)


def test_a_forward_that_fails_gives_its_tokens_back():
    model, ids = tiny("mixtral"), token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    last = model.model.norm

    def fail(*_):
        raise RuntimeError("out of memory")

    with replay(model, trace) as replayer, torch.no_grad():
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids=ids)
        hook.remove()
        assert replayer.tokens == 0
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_record_of_ids_alone_and_one_read_from_a_file_are_enough(tmp_path):
    model, ids = tiny("deepseek_v3"), token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    trace.save(tmp_path / "t.safetensors")
    for enough in (replace(trace, weights=None, logits=None, bias=None), load(tmp_path / "t.safetensors")):
        with replay(model, enough), torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_on_a_gpu_an_unchanged_model_gives_the_recorded_logits_too(family):
    model, ids = tiny(family).cuda(), token_ids().cuda()
    (expected,), trace = recorded(model, {"input_ids": ids})
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4)).cuda(), torch.randn(3, 5, 32, device="cuda")
    (out,), own = recorded(layer, {"x": x})
    with torch.no_grad():
        with replay(model, trace):
            assert torch.equal(model(input_ids=ids).logits, expected)
        with replay(layer, own):
            assert torch.equal(layer(x), out)
        change_routers(layer)
        with replay(layer, own):
            assert torch.equal(recorded(layer, {"x": x})[1].picks, own.picks)


class Quiet(torch.nn.Module):
    """Keeps what the model inside gives and returns nothing; `fails` after the model inside has run."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.fails, self.kept = inner, False, None

    def forward(self, input_ids) -> None:
        self.kept = self.inner(input_ids=input_ids).logits
        if self.fails:
            raise RuntimeError("after the model")


def test_a_forward_that_returns_nothing_has_not_failed_and_one_that_raises_late_has():
    quiet, ids = Quiet(tiny("mixtral")), token_ids()
    expected, trace = recorded(quiet.inner, {"input_ids": ids}, {"input_ids": ids.flip(-1)})
    trace = replace(trace, layers=tuple(f"inner.{name}" for name in trace.layers))
    with replay(quiet, trace) as replayer, torch.no_grad():
        quiet(ids)
        assert torch.equal(quiet.kept, expected[0])
        assert replayer.tokens == ids.numel()
        quiet.fails = True
        with pytest.raises(RuntimeError, match="after the model"):
            quiet(ids.flip(-1))
        assert replayer.tokens == ids.numel()
        quiet.fails = False
        quiet(ids.flip(-1))
        assert torch.equal(quiet.kept, expected[1])
        assert replayer.tokens == 2 * ids.numel()


def test_a_record_that_does_not_tell_texts_apart_is_read_in_its_order():
    model, ids = tiny("mixtral"), token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    with replay(model, replace(trace, sequences=torch.zeros(20, dtype=torch.int64))), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_inner_blocks_that_are_called_alone_are_replayed_in_order():
    model, ids = tiny("mixtral"), token_ids()
    block = model.model.layers[1].mlp
    _, trace = recorded(model, {"input_ids": ids})
    x = torch.randn(1, 20, 32)
    with replay(model, trace) as replayer, torch.no_grad():
        seen, hooks = spied(model)
        block(x[:, :8])
        block(x[:, 8:])
    for hook in hooks:
        hook.remove()
    assert torch.equal(torch.cat([ids for _, ids in seen]), trace.picks[1].long())
    assert replayer.tokens == 20


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models_know_their_padding_and_the_model_without_its_head_can_be_called():
    model = Wrapped(tiny("mixtral"))
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :4] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    (expected,), trace = recorded(model.module, call)
    wrapped = replace(trace, layers=tuple(layer.name for layer in moe_layers(model)))
    with replay(model, wrapped) as replayer, torch.no_grad():
        assert torch.equal(model(**call).logits, expected)
    assert replayer.tokens == 8
    with replay(model.module, trace) as replayer, torch.no_grad():
        model.module.model(**call)
    assert replayer.tokens == 8


def test_a_record_of_a_replay_and_a_replay_inside_a_record_hold_the_replayed_experts():
    model, ids = tiny("mixtral"), token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    change_routers(model)
    with record(model) as outer, replay(model, trace), record(model) as inner, torch.no_grad():
        model(input_ids=ids)
    assert same_picks(outer.trace, trace)
    assert same_picks(inner.trace, trace)


def test_our_engine_in_a_model_of_transformers_replays_too():
    model, ids = attach(tiny("qwen3_moe")), token_ids()
    (expected,), trace = recorded(model, {"input_ids": ids})
    with replay(model, trace), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_block_called_alone_after_the_model_is_refused():
    model, ids = tiny("mixtral"), token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    with replay(model, trace), torch.no_grad():
        model(input_ids=ids)
        with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp' runs outside of the model's forward"):
            model.model.layers[1].mlp(torch.randn(1, 3, 32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_a_compiled_model_is_refused_and_a_block_in_which_nothing_ran_is_told():
    model, ids = tiny("mixtral"), token_ids()
    _, trace = recorded(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="a compiled model cannot be replayed"):
        replay(torch.compile(model), trace).__enter__()
    inside = copy.deepcopy(model)
    inside.model.layers[0].compile()
    with pytest.raises(ValueError, match="a compiled model cannot be replayed"):
        replay(inside, trace).__enter__()
    with pytest.raises(ValueError, match="nothing was replayed"):  # noqa: SIM117
        with replay(model, trace):
            pass
    with pytest.raises(KeyError, match="mine"):  # noqa: SIM117
        with replay(model, trace):
            raise KeyError("mine")
