"""What a record makes of the many ways in which models are called."""

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import v3
from hf_models import CACHE, tiny, token_ids
from torch import nn

from moesaic.layer.moe import DeepseekV3MoE, MoE
from moesaic.trace.recording.forwards import cache_of, describe_forward
from moesaic.trace.recording.record import record
from moesaic.trace.store import Trace
from moesaic.types import Routing

MEGABYTE = 1e6


def picks(model, *args, detail="picks", **kwargs):
    with record(model, detail) as rec, torch.no_grad():
        model(*args, **kwargs)
    return rec.trace


class Passes(nn.Module):
    """A wrapper like DDP: says nothing of its own about what it is called with."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapted(nn.Module):
    """A wrapper like PEFT's."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class FromDict(nn.Module):
    """Takes a batch as one dict, in an order of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, batch):
        return self.inner(batch["ids"], attention_mask=batch["mask"])


@pytest.mark.parametrize("wrap", [Passes, Adapted, nn.Sequential, lambda m: Passes(Passes(m))])
def test_a_wrapped_model_gives_the_record_of_the_model(wrap):
    model, ids = tiny("qwen3_moe"), token_ids()
    plain, wrapped = picks(model, ids, detail="scores"), picks(wrap(model), ids, detail="scores")
    assert torch.equal(wrapped.picks, plain.picks)
    assert torch.equal(wrapped.logits, plain.logits)
    assert torch.equal(wrapped.input_ids, ids.flatten())
    assert torch.equal(wrapped.sequences, plain.sequences)


def test_padding_is_known_where_only_the_model_inside_sees_the_mask():
    model, ids = tiny("qwen3_moe"), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    trace = picks(FromDict(model), {"ids": ids, "mask": mask})
    assert torch.equal(trace.picks, picks(model, ids, attention_mask=mask).picks)
    assert trace.sequences.tolist() == [0, 0] + [1] * 6


def test_masks_that_keep_everything_and_masks_of_four_axes_leave_nothing_out():
    model, ids = tiny("qwen3_moe"), token_ids(2, 6)
    everything = picks(model, ids)
    assert torch.equal(picks(model, ids, attention_mask=torch.ones_like(ids)).picks, everything.picks)
    causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 6, 6)
    assert torch.equal(picks(model, ids, attention_mask=causal).picks, everything.picks)


def test_embeddings_in_the_place_of_ids():
    model, ids = tiny("qwen3_moe"), token_ids()
    trace = picks(model, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(trace.picks, picks(model, ids).picks)
    assert trace.input_ids is None
    assert trace.sequences.tolist() == [0] * 10 + [1] * 10
    assert trace.phases.tolist() == [0] * 20


def test_batches_of_unequal_length_are_one_record():
    model = tiny("qwen3_moe")
    shapes = [(1, 3), (4, 7), (2, 1)]
    with record(model) as rec, torch.no_grad():
        for shape in shapes:
            model(token_ids(*shape))
    assert torch.bincount(rec.trace.sequences).tolist() == [3, 7, 7, 7, 7, 1, 1]
    assert rec.trace.phases.unique().tolist() == [0]


def test_prefill_in_pieces_and_decoding_go_on_with_their_cache():
    model, (one, other) = tiny("qwen3_moe"), (token_ids(2, 4), token_ids(2, 4))
    with record(model) as rec, torch.no_grad():
        first = cache_of(model(one, use_cache=True))
        model(one[:, :3], **{CACHE: first})
        second = cache_of(model(other, use_cache=True))
        model(one[:, :1], **{CACHE: first})
        model(other[:, :1], **{CACHE: second})
    a, b = [0] * 4 + [1] * 4, [0] * 3 + [1] * 3
    assert rec.trace.sequences.tolist()[:14] == a + b
    assert rec.trace.sequences.tolist()[14:22] == [2] * 4 + [3] * 4
    assert rec.trace.sequences.tolist()[22:] == [0, 1, 2, 3]
    assert rec.trace.phases.tolist() == [0] * 22 + [1] * 4


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_is_known_by_any_of_its_names(name):
    """transformers 5.24 calls `cache` what was `past_key_values` before, and `cache_params` of linear attention."""
    held = SimpleNamespace(get_seq_length=lambda: 4)
    forward = describe_forward(tiny("qwen3_moe"), (), {"input_ids": token_ids(2, 1), name: held})
    assert forward.cache == id(held)
    assert forward.decoding
    for output in ({"logits": None, "cache": None, name: held}, SimpleNamespace(**{name: held})):
        assert cache_of(output) is held
    for other in (True, "static", {}):  # another thing that a model calls `cache`
        assert cache_of({"cache": other, name: held} if name != "cache" else {name: held}) is held
        assert cache_of({"cache": other}) is None
    assert cache_of({"logits": None}) is cache_of((torch.zeros(2),)) is None


class Looped(nn.Module):
    """Passes through its model three times."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs_embeds):
        for _ in range(3):
            inputs_embeds = self.inner(inputs_embeds)
        return inputs_embeds


def test_a_looped_model_is_refused_and_what_it_calls_is_recorded():
    model, x = Looped(DeepseekV3MoE(v3(16, 4, 2, 4))), torch.randn(1, 5, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="'inner' runs several times in one call"), record(model):
        model(x)
    with torch.no_grad(), record(model.inner) as rec:
        model(x)
    assert rec.trace.picks.shape[1] == 15


def test_beams_are_rows():
    model, ids = tiny("qwen3_moe"), token_ids(2, 5)
    with record(model) as rec:
        model.generate(ids, num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert rec.trace.sequences.tolist()[:30] == [row for row in range(6) for _ in range(5)]
    assert rec.trace.sequences.tolist()[30:] == list(range(6)) * 2
    assert rec.trace.phases.tolist() == [0] * 30 + [1] * 12


def test_a_forward_that_fails_in_the_middle_leaves_nothing_behind():
    model, ids = tiny("qwen3_moe"), token_ids()
    alone = picks(model, ids)
    with record(model, "scores") as rec, torch.no_grad():
        model(ids)
        broken = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        broken.remove()
        model(ids)
    assert len(rec.trace) == 40
    assert torch.equal(rec.trace.picks, torch.cat([alone.picks] * 2, dim=1))
    assert rec.trace.n_sequences == 4


def test_a_broken_first_forward_leaves_an_empty_record():
    model, ids = tiny("qwen3_moe"), token_ids()
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with record(model) as rec, pytest.raises(ZeroDivisionError):
        model(ids)
    assert len(rec.trace) == 0


class Silent(nn.Module):
    """A training step that keeps its loss for itself, and fails where it is told to."""

    def __init__(self, model):
        super().__init__()
        self.model, self.fails = model, False

    def forward(self, input_ids):
        self.model(input_ids=input_ids).logits.sum().backward()
        if self.fails:
            raise ZeroDivisionError


def test_a_forward_that_returns_nothing_is_recorded_and_one_that_fails_is_not():
    model, ids = Silent(tiny("qwen3_moe")), token_ids()
    with record(model) as rec:
        assert model(ids) is None
        model.fails = True
        with pytest.raises(ZeroDivisionError):
            model(ids)
        model.fails = False
        model(ids)
        model(ids)
    assert len(rec.trace) == 60
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_two_records_of_one_model_at_once_see_the_same():
    model, ids = tiny("qwen3_moe"), token_ids()
    with record(model, "ids") as outer:
        model(ids)
        with record(model, "scores") as inner:
            model(ids)
        model(ids)
    assert len(outer.trace) == 60
    assert torch.equal(inner.trace.picks, outer.trace.picks[:, 20:40])
    assert (outer.trace.detail, inner.trace.detail) == ("ids", "scores")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_two_records_of_scores_at_once_count_every_token_once(family):
    model, ids = tiny(family), token_ids()
    with record(model, "scores") as outer, torch.no_grad():
        model(ids)
        with record(model, "scores") as inner:
            model(ids)
        model(ids)
    assert (len(outer.trace), len(inner.trace)) == (60, 20)
    assert torch.equal(inner.trace.logits, outer.trace.logits[:, 20:40])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_records_that_do_not_end_in_the_order_in_which_they_began():
    layer = DeepseekV3MoE(v3(16, 4, 2, 4))
    first, second = record(layer), record(layer, "ids")
    one = first.__enter__()
    two = second.__enter__()
    first.__exit__(None, None, None)
    layer(torch.randn(3, 32))
    second.__exit__(None, None, None)
    assert (len(one.trace), len(two.trace)) == (0, 3)
    assert layer.experts.watcher is None


def test_nothing_of_a_record_stays_on_the_model():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as TABLE

    model = tiny("qwen3_moe")
    model.set_experts_implementation("grouped_mm")
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    entries = {name: TABLE.get(name) for name in [*TABLE, "eager", None]}
    with record(model, "scores"):
        assert TABLE["grouped_mm"] is not entries["grouped_mm"]
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before
    assert {name: TABLE.get(name) for name in [*TABLE, "eager", None]} == entries
    assert "eager" not in TABLE


def test_another_model_of_the_same_class_is_not_recorded():
    model, other = tiny("qwen3_moe"), tiny("qwen3_moe")
    with record(model) as rec:
        other(token_ids(3, 5))
        model(token_ids())
    assert len(rec.trace) == 20


def test_a_record_goes_on_after_its_trace_was_taken():
    model, ids = tiny("qwen3_moe"), token_ids()
    with record(model, "scores") as rec:
        model(ids)
        first = rec.trace
        kept = {name: array.copy() for name, array in first.to_arrays().items()}
        model(ids)
        both = rec.trace
    assert torch.equal(both.picks, torch.cat([first.picks] * 2, dim=1))
    assert torch.equal(both.logits[:, :20], first.logits)
    assert all((array == kept[name]).all() for name, array in first.to_arrays().items())


def test_accumulated_gradients_and_training_count_every_micro_batch_once():
    model, ids = tiny("qwen3_moe").train(), token_ids()
    with record(model) as rec:
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
    assert len(rec.trace) == 60


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_own_checkpointing_counts_once(reentrant):
    model, ids = tiny("qwen3_moe").train(), token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newer name for it is not in transformers 5.17
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record(model, "scores") as rec:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(rec.trace) == 20
    assert rec.trace.sequences.tolist() == [0] * 10 + [1] * 10


def test_layers_that_never_ran_are_missing_and_said_so():
    first, second = MoE.classic(8, 8, 8, 4, 2), MoE.classic(8, 8, 8, 4, 2)
    model = nn.ModuleDict({"used": first, "idle": second})
    with record(model) as rec:
        first(torch.randn(3, 8))
    assert rec.trace.layers == ("used",)
    assert rec.trace.missing == ("idle",)


def test_layers_of_other_sizes_are_refused_by_name():
    model = nn.Sequential(MoE.classic(8, 8, 8, 4, 2), MoE.classic(8, 8, 8, 6, 2))
    with record(model) as rec:
        model(torch.randn(3, 8))
    with pytest.raises(ValueError, match="layer '1' has 6 experts and layer '0' has 4: record them one by one"):
        _ = rec.trace


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), nn.Embedding(5, 3)], ids=type)
def test_a_model_without_moe_is_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match=r"^not an MoE model: \w+ has no module"), record(model):
        raise AssertionError("the block must not run")


def test_a_dense_model_of_transformers_is_refused():
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"^not an MoE model: LlamaForCausalLM"), record(hf.LlamaForCausalLM(config)):
        pass


def test_llama4_gives_the_experts_whose_scores_its_router_let_through():
    import transformers as hf

    config = hf.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=2,
        interleave_moe_layer_step=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids, seen = hf.Llama4ForCausalLM(config).eval(), token_ids(), []
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    hook = model.model.layers[1].feed_forward.router.register_forward_hook(lambda _m, _a, out: seen.append(out))
    plain = model(ids).logits
    hook.remove()
    with record(model, "scores") as rec:
        assert torch.equal(model(ids).logits, plain)
    scores, logits = seen[0]
    chosen = torch.zeros_like(scores).scatter(1, rec.trace.picks[1].long(), rec.trace.weights[1])
    assert torch.equal(chosen, scores)
    assert torch.equal(rec.trace.logits[1], logits)
    assert rec.trace.origins == ("router", "router")
    assert not rec.trace.configs[0].rule_is_known


def test_switch_tokens_that_were_dropped_have_no_expert():
    import transformers as hf

    config = hf.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_heads=2,
        num_experts=4, expert_capacity=2, num_decoder_layers=2, num_sparse_decoder_layers=1,
    )  # fmt: skip
    model = hf.SwitchTransformersModel(config).eval()
    block = next(m for m in model.encoder.modules() if type(m).__name__ == "SwitchTransformersSparseMLP")
    seen, x = [], torch.randn(2, 9, 16)
    block.router.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with record(block, config=v3(4, 1, 1, 1)) as rec, torch.no_grad():
        block(x)
    if seen[0][0].is_floating_point():
        pytest.skip("transformers 5.17 counts a Switch expert's tokens one by one, and drops none")
    one_hot = seen[0][0].flatten(0, 1)
    expected = torch.where(one_hot.any(-1), one_hot.argmax(-1), 4)
    assert (expected == 4).any()
    assert torch.equal(rec.trace.picks[0, :, 0].long(), expected)
    assert rec.trace.origins == ("experts",)


def test_what_runs_its_experts_out_of_sight_is_refused():
    import transformers as hf

    model = hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_key_value_heads=2,
            kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="JetMoeForCausalLM"), record(model):
        pass


def test_tokens_get_their_text_from_a_tokenizer():
    from tokenizers import Tokenizer, models

    class Spelled:
        def __init__(self):
            self.inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))

        def __getattr__(self, name):
            return getattr(self.inner, name)

    model, ids = tiny("qwen3_moe"), token_ids(1, 5)
    with record(model, tokenizer=Spelled()) as rec:
        model(ids)
    assert rec.trace.pieces == {token: f"w{token}" for token in ids.flatten().tolist()}


def test_labels_are_a_list_with_one_name_a_sequence():
    with pytest.raises(ValueError, match="labels='poem' is one name: give a list"), record(tiny(), labels="poem"):
        pass
    with record(tiny("qwen3_moe"), labels=["one"]) as rec, pytest.raises(ValueError, match="1 labels for 2 sequences"):
        rec.model(token_ids())


def test_half_precision_and_a_record_inside_inference_mode():
    model, ids = tiny("qwen3_moe").bfloat16(), token_ids()
    with torch.inference_mode():
        plain = model(ids).logits
        with record(model, "scores") as rec:
            assert torch.equal(model(ids).logits, plain)
    assert rec.trace.dtypes == {"logits": "bfloat16", "weights": "bfloat16"}
    assert rec.trace.weights.dtype == torch.float32


def test_a_copy_made_while_recording_works_on_its_own_afterwards():
    model = DeepseekV3MoE(v3(16, 4, 2, 4))
    with record(model):
        other = copy.deepcopy(model)
    x = torch.randn(3, 32)
    assert torch.equal(other(x), model(x))


def test_a_trace_of_ids_alone_can_be_made_by_hand():
    ids = torch.tensor([[0, 3], [4, 1]])
    trace = Trace.from_routings({"a": Routing(None, None, ids)}, v3(4, 1, 1, 2))
    assert trace.detail == "ids"
    assert torch.equal(trace.picks[0].long(), ids)


def grown(n_tokens, detail):
    code = (
        f"from moesaic.bench.recording import recording_memory; print(recording_memory({n_tokens}, detail={detail!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_a_fifth_of_a_long_record_needs_a_fifth_of_its_memory():
    assert grown(20_000, "picks") < 40 * MEGABYTE + 20 * MEGABYTE  # 20 MB for what does not grow


SAVED = """
import resource, sys, torch
from moesaic.bench.recording import Routes, batches
from moesaic.trace.recording.record import record

def run(n_tokens, path):
    with record(model, "ids") as rec, torch.no_grad():
        for batch in batches(n_tokens):
            model(batch)
    rec.trace.save(path)

n_tokens, n_layers = map(int, sys.argv[1:])
model = Routes(n_layers, 256, 8)
run(2048, "warm.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(n_tokens, "run.safetensors")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    ("n_tokens", "n_layers"), [(20_000, 8), pytest.param(100_000, 26, marks=pytest.mark.slow)], ids=str
)
def test_picks_alone_keep_to_their_share_of_200_megabytes_and_to_8_and_a_half_bytes(tmp_path, n_tokens, n_layers):
    """200 MB are for 100,000 tokens of 26 layers, from the first forward to the saved file."""
    code = [sys.executable, "-c", SAVED, str(n_tokens), str(n_layers)]
    grown = int(subprocess.run(code, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert grown < 200 * MEGABYTE * (n_tokens * n_layers) / (100_000 * 26)
    assert (tmp_path / "run.safetensors").stat().st_size <= 8.5 * n_tokens * n_layers


@pytest.mark.slow
@pytest.mark.parametrize("detail", ["ids", "picks"])
def test_a_record_of_100k_tokens_and_26_layers_stays_under_200_megabytes(detail):
    assert grown(100_000, detail) < 200 * MEGABYTE
