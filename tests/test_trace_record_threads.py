"""Records that begin and end in several threads, forwards that run in several, and copies of a watched model."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from hf_models import tiny, token_ids
from torch import nn

from moesaic.layer.moe import MoE
from moesaic.trace.recording.record import record


class Stack(nn.Module):
    """Layers of ours, one after the other, that wait in between so that threads meet."""

    def __init__(self, n_layers=4):
        super().__init__()
        self.layers = nn.ModuleList(MoE.classic(8, 8, 8, 4, 2) for _ in range(n_layers))
        self.between = lambda: None

    def forward(self, inputs_embeds):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
            self.between()
        return inputs_embeds


def in_threads(*runs):
    """Run all at once; the first error of any is raised."""
    errors = []

    def guarded(run):
        try:
            run()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def compiling():
    """Inside the block another thread makes a graph of something of its own."""
    begun, over = threading.Event(), threading.Event()

    def backend(graph, _inputs):
        begun.set()
        over.wait(60)
        return graph.forward

    thread = threading.Thread(target=torch.compile(lambda x: x.sin() + 1, backend=backend), args=(torch.zeros(3),))
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.compile
def test_what_another_thread_compiles_meanwhile_is_nothing_to_the_record():
    """torch 2.13 says of every thread that it compiles while one does."""
    model, other = Stack(), contextlib.ExitStack()

    def forward(length, between=lambda: None):
        model.between, once = (lambda: once and once.pop()()), [between]
        model(torch.randn(1, length, 8))

    with record(model) as rec, torch.no_grad():
        with compiling():
            forward(5)
        other.enter_context(compiling())
        forward(4, other.close)
        forward(3, lambda: other.enter_context(compiling()))
        other.close()
        forward(2)
    assert torch.bincount(rec.trace.sequences).tolist() == [5, 4, 3, 2]


@pytest.mark.filterwarnings("ignore:a MoE layer ran in another thread")
@pytest.mark.parametrize("family", ["qwen3_moe", "ours"])
def test_records_that_begin_and_end_in_several_threads_hold_whole_forwards(family):
    model = Stack() if family == "ours" else tiny(family)
    lengths = []

    def run(length):
        inputs = torch.randn(1, length, 8) if family == "ours" else token_ids(1, length)
        for _ in range(40):
            with record(model) as rec, torch.no_grad():
                model(inputs)
            lengths.append(torch.bincount(rec.trace.sequences).tolist())
            assert rec.trace.missing == ()

    in_threads(lambda: run(5), lambda: run(7))
    assert len(lengths) == 80
    assert all(set(found) <= {5, 7} and found for found in lengths)
    assert not any(key.startswith("_moesaic_key") for module in model.modules() for key in vars(module))


def test_forwards_of_two_threads_at_once_are_kept_one_after_the_other_each_whole():
    model, meet = Stack(), threading.Barrier(2)
    model.between = meet.wait
    inputs = {5: torch.randn(1, 5, 8), 7: torch.randn(1, 7, 8)}
    with record(model) as rec, torch.no_grad():
        in_threads(*(lambda x=x: model(x) for x in inputs.values()))
    first, second = torch.bincount(rec.trace.sequences).tolist()
    assert {first, second} == {5, 7}
    model.between = lambda: None
    for begin, length in ((0, first), (first, second)):
        with record(model) as alone, torch.no_grad():
            model(inputs[length])
        assert torch.equal(rec.trace.picks[:, begin : begin + length], alone.trace.picks)


def test_a_forward_of_another_thread_that_began_before_the_block_or_ends_after_it_is_left_out():
    model, here, there = Stack(), threading.Event(), threading.Event()
    inputs, main = torch.randn(1, 5, 8), threading.get_ident()

    def wait():
        if threading.get_ident() != main:
            here.set()
            there.wait()

    model.between = wait
    thread = threading.Thread(target=model, args=(inputs,))

    def finish():
        there.set()
        thread.join()

    thread.start()
    here.wait()
    with record(model) as rec, torch.no_grad():
        model(inputs[:, :3])
        with pytest.warns(UserWarning, match="that call is not recorded"):
            finish()
    assert len(rec.trace) == 3
    here.clear()
    there.clear()
    with record(model) as rec, torch.no_grad():
        model(inputs[:, :3])
        thread = threading.Thread(target=model, args=(inputs,))
        thread.start()
        here.wait()
    finish()
    assert len(rec.trace) == 3
    assert rec.trace.missing == ()


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("family", ["qwen3_moe", "ours"])
@pytest.mark.parametrize("detail", ["picks", "scores"])
def test_a_copy_made_inside_the_block_is_not_watched_and_can_be_recorded_itself(copied, family, detail):
    model = nn.Sequential(MoE.classic(8, 8, 8, 4, 2)) if family == "ours" else tiny(family)
    inputs = torch.randn(2, 5, 8) if family == "ours" else token_ids()
    with record(model, detail) as rec, torch.no_grad():
        model(inputs)
        twin = copied(model)
        twin(inputs)
    assert len(rec.trace) == inputs.shape[0] * inputs.shape[1]
    for _ in range(2):
        with record(twin, detail) as again, torch.no_grad():
            twin(inputs)
            twin(inputs)
        assert torch.equal(again.trace.picks, torch.cat([rec.trace.picks] * 2, 1))
        assert again.trace.n_sequences == 4
