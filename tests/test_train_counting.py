"""Loads counted while forwards run in several threads, and in compiled graphs."""

import contextlib
import functools
import gc
import threading
import weakref
from unittest.mock import Mock

import pytest
import torch
from test_trace_record_threads import compiling
from test_train_bias_balance import LENGTH, K, batches, small_model
from torch import nn

from moesaic.hf.modules import moe_layers
from moesaic.trace.recording import calls
from moesaic.trace.recording.forwards import token_mask
from moesaic.train import counting
from moesaic.train.bias_balance import BiasBalance
from moesaic.train.counting import LoadCounter
from moesaic.train.monitor.load_monitor import LoadMonitor


def in_threads(*runs) -> list[BaseException | None]:
    """Run them at once; what each of them raised."""
    raised: list[BaseException | None] = [None] * len(runs)

    def guarded(place):
        try:
            runs[place]()
        except Exception as error:
            raised[place] = error

    threads = [threading.Thread(target=guarded, args=(place,)) for place in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def meeting(*models, n_threads: int) -> None:
    """Let forwards of so many threads wait for each other between the layers."""
    barrier = threading.Barrier(n_threads, timeout=20)

    def wait(*_) -> None:
        barrier.wait()

    for model in models:
        for layer in model.model.layers:
            layer.register_forward_hook(wait)


def loads_of(model, *calls) -> dict[str, torch.Tensor]:
    """The load of these calls, one after the other."""
    counter = LoadCounter(model, moe_layers(model), training=True)
    for call in calls:
        model(**call)
    counter.remove()
    return counter.take()


@pytest.mark.filterwarnings("ignore:.*unclosed file")  # the log, which nobody closes either
@pytest.mark.parametrize("watch", [lambda _folder: BiasBalance(), LoadMonitor], ids=["balance", "monitor"])
def test_whoever_is_dropped_without_detach_lets_go_of_the_model(tmp_path, watch):
    """As a cell of a notebook leaves it that is stopped, or run again."""
    model = small_model().train()
    watching = watch(tmp_path / "first").attach(model)
    model(batches(1)[0])
    del watching
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    watching, gone = watch(tmp_path / "second").attach(model), weakref.ref(model)
    model(batches(1)[0])
    del watching, model
    gc.collect()
    assert gone() is None


def test_who_begins_to_listen_just_as_the_only_other_one_is_collected_hears_of_calls(monkeypatch):
    class Collecting(dict):
        def get(self, *args):  # as garbage collection may at any point
            others.close()
            return super().get(*args)

    monkeypatch.setattr(calls, "_listeners", Collecting())
    model, others, listener = nn.Linear(2, 2), contextlib.ExitStack(), Mock()
    others.enter_context(calls.listening(model, Mock()))
    with calls.listening(model, listener):
        model(torch.zeros(1, 2))
    listener.open.assert_called_once()
    listener.close.assert_called_once()


def padded(ids: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[:, start:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_forwards_of_two_threads_at_once_each_have_their_own_padding_and_add_up():
    model = small_model().train()
    first, second = (padded(ids, start) for ids, start in zip(batches(2), (3, 8), strict=True))
    expected = loads_of(model, first, second)
    meeting(model, n_threads=2)
    counter = LoadCounter(model, moe_layers(model), training=True)
    assert in_threads(lambda: model(**first), lambda: model(**second)) == [None, None]
    assert same(counter.take(), expected)
    assert all(load.sum() == (2 * 3 + 2 * 8) * K for load in expected.values())
    counter.remove()


@pytest.mark.compile
def test_forwards_count_in_which_another_thread_begins_to_compile_and_those_after_them():
    model, (ids, *_) = small_model().train(), batches(1)
    expected = loads_of(model, padded(ids, 5))
    counter = LoadCounter(model, moe_layers(model), training=True)
    with contextlib.ExitStack() as other:
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: other.enter_context(compiling()))
        model(**padded(ids, 5))
        hook.remove()
        assert same(counter.take(), expected)
    model(**padded(ids, 5))
    assert same(counter.take(), expected)
    counter.remove()


def test_a_forward_that_fails_takes_nothing_from_the_one_beside_it_and_evaluation_does_not_count():
    model = small_model().train()
    first, second, third = (padded(ids, LENGTH) for ids in batches(3))
    expected = loads_of(model, first)
    meeting(model, n_threads=3)

    def failing():
        me = threading.get_ident()

        def fail(*_) -> None:
            if threading.get_ident() == me:
                raise RuntimeError("late")

        model.lm_head.register_forward_hook(fail)
        model(**second)

    def without_gradients():
        with torch.no_grad():
            model(**third)

    counter = LoadCounter(model, moe_layers(model), training=True)
    raised = in_threads(lambda: model(**first), failing, without_gradients)
    assert [str(error) for error in raised] == ["None", "late", "None"]
    assert same(counter.take(), expected)


def test_two_models_that_train_in_two_threads_are_counted_apart():
    models, calls = [small_model().train(), small_model().train()], [padded(ids, 7) for ids in batches(2)]
    expected = [loads_of(model, call) for model, call in zip(models, calls, strict=True)]
    meeting(*models, n_threads=2)
    counters = [LoadCounter(model, moe_layers(model), training=True) for model in models]
    first, second = (lambda model=model, call=call: model(**call) for model, call in zip(models, calls, strict=True))
    assert in_threads(first, second) == [None, None]
    assert same(counters[0].take(), expected[0])
    assert same(counters[1].take(), expected[1])
    assert not same(expected[0], expected[1])


def replica_of(model: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel makes of a model for each device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter.view_as(parameter))
    return copies[model]


def test_replicas_of_data_parallel_count_and_are_warned_of():
    model = small_model().train()
    counter = LoadCounter(model, moe_layers(model), training=True)
    replica, (ids, *_) = replica_of(model), batches(1)
    with pytest.warns(UserWarning, match=r"replicas of nn\.DataParallel .* padding with them; .*torchrun"):
        assert in_threads(lambda: replica(**padded(ids, 5))) == [None]
    assert all(load.sum() == ids.numel() * K for load in counter.take().values())


@pytest.mark.parametrize(
    ("backends", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,meta:nccl", "meta"), ("meta:nccl", "meta")]
)
def test_ranks_add_up_on_one_device_whatever_each_of_them_heard(monkeypatch, backends, device):
    """With weights on another device than tokens, as FSDP2 offloads them, a rank without tokens waited for ever."""
    model, used = small_model().train(), []
    counter = LoadCounter(model, moe_layers(model), training=True)
    distributed = {
        "is_initialized": lambda: True, "get_backend_config": lambda _group: backends,
        "all_reduce": lambda flat, group: used.append((flat.device.type, group)),
    }  # fmt: skip
    monkeypatch.setattr(counting, "_device_of", lambda _layers: torch.device("meta"))
    for name, function in distributed.items():
        monkeypatch.setattr(torch.distributed, name, function)
    counter.take("group")
    model(**padded(batches(1)[0], LENGTH))
    counter.take("group")
    assert used == [(device, "group")] * 2


def test_a_mask_that_covers_a_cache_too_is_read_from_its_end_and_one_that_does_not_fit_is_none():
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    over_the_past = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert token_mask(tokens, over_the_past).tolist() == [True, True, True, False]
    for unfit in (None, torch.ones(2, 1), torch.ones(3, 2)):
        assert token_mask(tokens, unfit) is None


def test_where_a_layer_is_given_other_tokens_than_the_model_all_of_them_count():
    model = small_model().train()
    layer = moe_layers(model)[0]
    cut = layer.block.register_forward_pre_hook(lambda _module, args: (args[0][:, :4].contiguous(), *args[1:]))
    back = layer.block.register_forward_hook(lambda _module, _args, out: torch.cat([out, out, out], 1))
    (ids,) = batches(1)
    load = loads_of(model, padded(ids, 5))[layer.name]  # as where the layer itself cuts padding out
    cut.remove()
    back.remove()
    assert load.sum() == 2 * 4 * K


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_a_call_of_a_model_without_its_head_is_a_call_of_the_model(compiled):
    """Whose mask and mode hold, whatever the whole model was called with before."""
    model, (ids, *_) = small_model().train(), batches(1)
    short, plain = padded(ids, 3), {"input_ids": ids}
    expected = loads_of(model, short, plain)
    body, whole = (torch.compile(m, backend="aot_eager") if compiled else m for m in (model.model, model))
    balance = BiasBalance(0.01).attach(model)
    body(**short)
    with torch.no_grad():
        body(**short)  # a rollout
    model.eval()
    whole(**short)
    model.train()
    body(**plain)
    balance.step()
    assert same(balance.load, expected)


def test_a_part_whose_error_the_model_catches_takes_nothing_from_the_rest():
    model, (ids, *_) = small_model().train(), batches(1)
    expected, forward = loads_of(model, {"input_ids": ids}), model.forward
    balance = BiasBalance(0.01).attach(model)

    @functools.wraps(forward)
    def caught(*args, **kwargs):
        found = forward(*args, **kwargs)
        with contextlib.suppress(ValueError):
            model.model()  # without tokens
        return found

    model.forward = caught
    model(ids)
    balance.step()
    assert same(balance.load, expected)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
def test_a_compiled_model_does_not_count_forwards_without_gradients():
    model = small_model().train()
    expected = loads_of(model, padded(batches(1)[0], 5))
    compiled = torch.compile(model, backend="aot_eager")
    balance = BiasBalance(0.01).attach(model)
    (batch,) = batches(1)
    with torch.no_grad():
        compiled(input_ids=batch)  # a rollout in training mode
    model.eval()
    compiled(**padded(batch, 5))
    model.train()
    compiled(**padded(batch, 5)).logits.sum().backward()
    with torch.no_grad():
        compiled(**padded(batch, 5))
    balance.step()
    assert same(balance.load, expected)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")  # Dynamo warns of its own
def test_calls_beyond_dynamos_limit_of_graphs_end_as_they_began():
    """Dynamo makes graphs of the hook before a call, one for every set of arguments up to its limit. A call beyond it
    was heard to begin and never to end, and none counted from then on."""
    model, (ids,) = small_model().train(), batches(1)
    calls = [{"input_ids": ids}, padded(ids, 3), padded(ids, 5), {"input_ids": ids}]
    expected = loads_of(model, *calls)
    compiled = torch.compile(model, backend="eager")
    balance = BiasBalance(0.01).attach(model)
    with torch._dynamo.config.patch(recompile_limit=1):
        for call in calls:
            compiled(**call)
    balance.step()
    assert same(balance.load, expected)
