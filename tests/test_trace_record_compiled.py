"""Compiled models: what is recorded is what the eager model's experts were given, in graphs that keep their bits."""

import warnings

import pytest
import torch
import torch._dynamo
from cases import v3
from hf_models import tiny, token_ids
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moesaic.hf  # noqa: F401
from moesaic.hf.attach import attach
from moesaic.layer.moe import DeepseekV3MoE, MoE
from moesaic.trace.recording import watch
from moesaic.trace.recording.record import record

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore")]  # Dynamo warns of its own


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model, counter):
    return torch.compile(model, backend=counter)


def in_place(model, counter):
    model.compile(backend=counter)
    return model


def its_forward(model, counter):
    model.forward = torch.compile(model.forward, backend=counter)
    return model


def layer_by_layer(model, counter):
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend=counter)
    return model


def inside_a_function(model, counter):
    return torch.compile(lambda ids, **kwargs: model(ids, **kwargs), backend=counter)


WAYS = [whole, in_place, its_forward, layer_by_layer, inside_a_function]
# graphs on entering: one in the place of each of before; where the model is called from outside the graph, its hook is
# a small one of its own
MORE = {whole: 2, in_place: 2}


def padded(rows=2, length=9):
    ids = token_ids(rows, length)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return ids, mask


def model_under(implementation, family="deepseek_v3"):
    model = tiny(family, num_hidden_layers=2, first_k_dense_replace=0)  # two layers of a kind share graphs
    return attach(model) if implementation == "moesaic" else model.set_experts_implementation(implementation) or model


def eager_trace(model, *args, detail="picks", **kwargs):
    with record(model, detail) as rec, torch.no_grad():
        model(*args, **kwargs)
    return rec.trace


def assert_same(trace, expected):
    assert torch.equal(trace.picks, expected.picks)
    if expected.weights is not None:
        torch.testing.assert_close(trace.weights, expected.weights)
    if expected.logits is not None:
        torch.testing.assert_close(trace.logits, expected.logits)
    for name in ("input_ids", "sequences", "phases"):
        one, other = getattr(trace, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
    assert trace.layers == expected.layers
    assert not trace.missing


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiled_before_recording(way):
    """One new graph on entering, the old one again afterwards, the new one again the next time."""
    model, (ids, mask) = model_under("grouped_mm"), padded()
    expected = eager_trace(model, ids, attention_mask=mask)
    counter = CompileCounterWithBackend("eager")
    compiled = way(model, counter)
    with torch.no_grad():
        plain = compiled(ids, attention_mask=mask).logits
        before = counter.frame_count
        with record(model) as rec:
            recorded = compiled(ids, attention_mask=mask).logits
            during = counter.frame_count
            compiled(ids, attention_mask=mask)
        assert during - before == MORE.get(way, 1)
        assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)
        with record(model) as again:
            compiled(ids, attention_mask=mask)
    assert counter.frame_count == during
    assert torch.equal(recorded, plain)
    assert len(rec.trace) == 2 * len(expected)
    assert_same(again.trace, expected)
    assert torch.equal(rec.trace.picks, torch.cat([expected.picks] * 2, dim=1))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_compiled_and_first_run_while_recording(way):
    model, (ids, mask) = model_under("grouped_mm", "qwen3_moe"), padded()
    expected = eager_trace(model, ids, attention_mask=mask)
    compiled = way(model, CompileCounterWithBackend("eager"))
    with torch.no_grad():
        with record(model, "ids") as rec:
            recorded = compiled(ids, attention_mask=mask).logits
        assert torch.equal(compiled(ids, attention_mask=mask).logits, recorded)
    assert torch.equal(rec.trace.picks, expected.picks)
    assert rec.trace.weights is None
    assert rec.trace.sequences.tolist() == [0] * 5 + [1] * 9


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "moesaic"])
def test_under_every_implementation_and_its_name_stays(implementation):
    model, (ids, mask) = model_under(implementation, "qwen3_moe"), padded()
    expected = eager_trace(model, ids, attention_mask=mask)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids, attention_mask=mask).logits
        with record(model) as rec:
            assert model.config._experts_implementation == implementation
            assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)
    assert_same(rec.trace, expected)


def test_logits_and_bias_of_a_compiled_model():
    model, (ids, mask) = model_under("grouped_mm"), padded()
    expected = eager_trace(model, ids, attention_mask=mask, detail="scores")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids, attention_mask=mask)
        with record(model) as picks:
            compiled(ids, attention_mask=mask)
        with record(model, "scores") as rec:
            compiled(ids, attention_mask=mask)
    assert_same(rec.trace, expected)
    assert torch.equal(rec.trace.bias, expected.bias)
    assert_same(picks.trace, eager_trace(model, ids, attention_mask=mask))


@pytest.mark.parametrize("make", [lambda: DeepseekV3MoE(v3(16, 4, 2, 4)), lambda: MoE.classic(32, 8, 32, 6, 2)])
def test_our_own_layers(make):
    layer, x = make(), torch.randn(2, 5, 32)
    expected = eager_trace(layer, x)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter)
    with torch.no_grad():
        plain = compiled(x)
        before = counter.frame_count
        with record(compiled) as rec:
            assert torch.equal(compiled(x), plain)
        assert counter.frame_count == before + 1
        assert torch.equal(compiled(x), plain)
    assert counter.frame_count == before + 1
    assert_same(rec.trace, expected)


def test_generation_of_a_compiled_model():
    model, ids = model_under("grouped_mm", "qwen3_moe"), token_ids(2, 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with record(model) as eager:
        plain = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    with record(model) as rec:
        assert torch.equal(model.generate(ids, **options), plain)
    assert_same(rec.trace, eager.trace)


@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_recomputation_inside_a_compiled_backward_is_counted_once(order):
    layer, x = DeepseekV3MoE(v3(16, 4, 2, 4)).train(), torch.randn(7, 32, requires_grad=True)
    expected = eager_trace(layer, x)
    if order == "compiled inside":
        inner = torch.compile(layer, backend="aot_eager")

        def step(x):
            return checkpoint(inner, x, use_reentrant=False)
    else:
        step = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")
    step(x).sum().backward()
    plain, x.grad = x.grad, None
    with record(layer) as rec:
        step(x).sum().backward()
    assert torch.equal(x.grad, plain)
    assert torch.equal(rec.trace.picks, expected.picks)


def test_a_model_of_which_another_is_compiled_too():
    """Its graph does not report, whoever else is watched."""
    model, other, ids = model_under("grouped_mm", "qwen3_moe"), model_under("grouped_mm", "qwen3_moe"), token_ids()
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad():
        plain = compiled(ids).logits
        with record(model) as rec:
            assert torch.equal(compiled(ids).logits, plain)
            model(ids)
    assert len(rec.trace) == 20


@pytest.mark.parametrize("detail", ["ids", "picks"])
def test_a_model_compiled_while_another_is_watched_reports_when_it_is_recorded_itself(detail):
    """Its first graph knows the table's reporting entry already; what it is guarded by is that nobody watched it."""
    model, other, ids = model_under("grouped_mm", "qwen3_moe"), model_under("grouped_mm", "qwen3_moe"), token_ids()
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad(), record(model, detail) as alone:
        plain = compiled(ids).logits
        with record(other, detail) as rec:
            assert torch.equal(compiled(ids).logits, plain)
    assert len(alone.trace) == 0
    assert len(rec.trace) == 20
    assert_same(rec.trace, eager_trace(other, ids, detail=detail))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
@pytest.mark.parametrize(
    ("dtype", "detail"),
    [(torch.float32, "picks"), (torch.float32, "scores"), (torch.bfloat16, "ids")],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_no_bit_of_the_result_changes_under_inductor(family, dtype, detail):
    """In bfloat16 only where weights are not asked for: inductor does not round what it keeps in registers, and a
    value that is reported is rounded in memory."""
    model, (ids, mask) = model_under("grouped_mm", family).to(dtype), padded(2, 40)
    compiled = torch.compile(model)
    with torch.no_grad():
        plain = compiled(ids, attention_mask=mask).logits
        with record(model, detail) as rec:
            assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)
        assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)
    assert len(rec.trace) == 45


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attached_models_keep_every_bit_in_every_dtype(dtype):
    model, (ids, mask) = model_under("moesaic").to(dtype), padded(2, 40)
    compiled = torch.compile(model)
    with torch.no_grad():
        plain = compiled(ids, attention_mask=mask).logits
        with record(model):
            assert torch.equal(compiled(ids, attention_mask=mask).logits, plain)


def test_a_sequence_of_compiled_and_plain_layers_is_one_record():
    layers = nn.Sequential(DeepseekV3MoE(v3(16, 4, 2, 4)), DeepseekV3MoE(v3(16, 4, 2, 4)))
    x = torch.randn(2, 5, 32)
    expected = eager_trace(layers, x)
    layers[0] = torch.compile(layers[0], backend="eager")
    assert_same(eager_trace(layers, x), expected)


@pytest.fixture
def deaf(monkeypatch):
    """Graphs that are made now report the model's calls and its routers' logits, and not its experts."""
    real = watch.reported

    def without_experts(key, used, first=None, second=None, flag=False):
        return used if second is None else real(key, used, first, second, flag)

    monkeypatch.setattr(watch, "reported", without_experts)


UNHEARD = "1 of the model's calls began in a compiled graph in which no MoE layer said whom it chose"


@pytest.mark.parametrize("detail", ["ids", "picks", "scores"])
def test_a_compiled_model_of_which_no_layer_is_heard_is_no_empty_record(detail, tmp_path, deaf):  # noqa: ARG001
    model, file = model_under("grouped_mm"), tmp_path / "run.safetensors"
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=UNHEARD), torch.no_grad(), record(model, detail, to=file):
        compiled(token_ids())
    assert not list(tmp_path.iterdir())


def test_a_compiled_call_that_fails_at_once_is_warned_of_beside_others():
    model, ids = model_under("grouped_mm"), token_ids()
    model.model.layers[0].register_forward_pre_hook(fails_on_short_texts)
    compiled = torch.compile(model, backend="eager")

    def run():
        with torch.no_grad(), record(model) as rec:
            with pytest.raises(RuntimeError, match="too short"):
                compiled(ids[:, :2])
            compiled(ids)
        return rec.trace

    with pytest.warns(UserWarning, match=UNHEARD):
        trace = run()
    assert len(trace) == ids.numel()


@torch.compiler.disable
def fails_on_short_texts(_layer, args):
    if args[0].shape[1] < 3:
        raise RuntimeError("too short")


NARROW = "half precision are being recorded: its own results may differ in the last bits .* detail='ids' changes none"


def test_a_compiled_model_in_half_precision_warns_where_weights_are_recorded():
    """Only there can a bit of its results change (inductor, `grouped_mm`)."""
    model, ids = model_under("grouped_mm", "mixtral").bfloat16(), token_ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), record(model, "picks"), pytest.warns(UserWarning, match=NARROW):
        compiled(ids)


@pytest.mark.parametrize(
    ("implementation", "dtype", "detail", "compiles"),
    [
        ("grouped_mm", torch.bfloat16, "ids", True),
        ("grouped_mm", torch.float32, "scores", True),
        ("grouped_mm", torch.bfloat16, "scores", False),
        ("moesaic", torch.bfloat16, "picks", True),
    ],
)
def test_nobody_is_warned_where_no_bit_changes(implementation, dtype, detail, compiles):
    model = model_under(implementation, "mixtral").to(dtype)
    called = torch.compile(model, backend="eager") if compiles else model
    with torch.no_grad(), record(model, detail), warnings.catch_warnings():
        warnings.filterwarnings("error", message=NARROW)
        called(token_ids())
