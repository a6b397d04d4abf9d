"""A record that goes to a file while the model runs: the file is the one that `save` writes, and memory stays."""

import gc
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from hf_models import FAMILIES, MORE_FAMILIES, tiny, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

import moesaic as ms
from moesaic.layer.moe import MoE
from moesaic.trace.file import parts
from moesaic.trace.file.parts import Part
from moesaic.trace.recording.record import record

BYTES = 1e6


def recorded_both_ways(model, path, run, **options):
    """What is in the file, and in the file that `save` writes of a record in memory of the same forwards."""
    with record(model, **options) as rec, record(model, to=path, **options):
        run(model)
    rec.trace.save(path.with_name("saved.safetensors"))
    return path.read_bytes(), path.with_name("saved.safetensors").read_bytes()


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def batches_of_unequal_length(model):
    with torch.no_grad():
        for shape in ((2, 6), (1, 3), (3, 9)):
            model(token_ids(*shape))


def padding_on_both_sides(model):
    ids = token_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, :6] = 0
    model(ids, attention_mask=mask)


def generation(model):
    ids = token_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model(ids)


def recomputed(model):
    model.train()
    for layer in model.model.layers:
        layer.mlp.forward = lambda *args, forward=layer.mlp.forward: checkpoint(forward, *args, use_reentrant=False)
    for _ in range(2):
        model(token_ids(), labels=token_ids()).loss.backward()


def a_forward_that_fails(model):
    model(token_ids())
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 9999))
    model(token_ids())


def inner_models_alone(model):
    model.model(token_ids())
    model(token_ids())


RUNS = (
    batches_of_unequal_length, padding_on_both_sides, generation, recomputed, a_forward_that_fails, inner_models_alone,
)  # fmt: skip


@pytest.mark.parametrize("detail", ["ids", "picks", "scores"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_the_file_is_that_of_a_record_in_memory_byte_for_byte(tmp_path, run, detail):
    streamed, saved = recorded_both_ways(tiny(), tmp_path / "run.safetensors", run, detail=detail)
    assert streamed == saved
    assert names_in(tmp_path) == ["run.safetensors", "saved.safetensors"]


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in ("gemma4", "lfm2_moe") if name in MORE_FAMILIES)])
def test_families_that_differ_in_what_their_routers_give_are_streamed_alike(tmp_path, family):
    streamed, saved = recorded_both_ways(
        tiny(family), tmp_path / "run.safetensors", batches_of_unequal_length, detail="scores"
    )
    assert streamed == saved


def test_labels_texts_and_layers_that_never_ran_are_in_the_file(tmp_path):
    class Characters:
        def decode(self, ids, **_):
            return chr(ids[0] + 65) * (5000 if ids[0] == 3 else 1)

        def convert_ids_to_tokens(self, number):
            return str(number)

    model, path = tiny(), tmp_path / "run.safetensors"
    ids = torch.arange(12).view(2, 6)
    with record(model, to=path, tokenizer=Characters(), labels=["a", "b"], seed=5) as rec, torch.no_grad():
        model(ids)
    trace = ms.load(path)
    assert (trace.labels, trace.seed, trace.pieces[1]) == (("a", "b"), 5, "B")
    assert trace.pieces[3] == "D" * 4096, "a longer text could not be read back"
    assert torch.equal(rec.trace.picks, trace.picks)
    layers = nn.ModuleDict({"used": MoE.classic(8, 8, 8, 4, 2), "idle": MoE.classic(8, 8, 8, 4, 2)})
    with record(layers, to=path):
        layers["used"](torch.randn(3, 8))
    assert (ms.load(path).layers, ms.load(path).missing) == (("used",), ("idle",))


def test_nothing_run_is_a_file_without_tokens(tmp_path):
    streamed, saved = recorded_both_ways(tiny(), tmp_path / "run.safetensors", lambda _: None, detail="scores")
    assert streamed == saved
    assert len(ms.load(tmp_path / "run.safetensors")) == 0


def test_probabilities_become_logits_once_even_where_the_trace_is_taken_on_the_way():
    model, ids = tiny("gemma4"), token_ids()
    with record(model, "scores") as rec, torch.no_grad():
        model(ids)
        first = rec.trace.logits.clone()
        model(ids)
    assert torch.equal(rec.trace.logits, torch.cat([first, first], 1))
    assert torch.allclose(first.exp().sum(-1), torch.ones(()))


def fails_after_a_forward(path):
    model = tiny()
    with record(model, to=path) as rec:
        model(token_ids())
        assert len(names_in(path.parent)) >= 1  # parts lie beside it
        raise KeyboardInterrupt(rec)


def test_a_block_that_ends_in_an_error_leaves_no_file_and_an_older_one_as_it_was(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt) as caught:
        fails_after_a_forward(path)
    assert names_in(tmp_path) == []
    with pytest.raises(ValueError, match=r"run.safetensors: was not written: the block failed"):
        _ = caught.value.args[0].trace
    with record(tiny(), to=path):
        pass
    older = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fails_after_a_forward(path)
    assert path.read_bytes() == older
    assert names_in(tmp_path) == ["run.safetensors"]


def test_layers_that_got_as_many_tokens_in_other_forwards_are_refused():
    first, second = MoE.classic(8, 8, 8, 4, 2), MoE.classic(8, 8, 8, 4, 2)
    with record(nn.ModuleList([first, second])) as rec:
        first(torch.randn(3, 8))
        second(torch.randn(1, 8))
        second(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"layer '1' got its tokens in other forwards than layer '0' \(2 and 1\)"):
        _ = rec.trace


def test_a_place_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path):
    for path, message in ((tmp_path / "no" / "run.safetensors", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=message), record(tiny(), to=path):
            raise AssertionError("the block must not run")


@pytest.mark.parametrize("waiting", [1, parts.WAITING])
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, waiting):
    model, path = tiny(), tmp_path / "run.safetensors"
    monkeypatch.setattr(parts, "WAITING", waiting)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def run():
        with monkeypatch.context() as patch, record(model, to=path):
            model(token_ids())
            patch.setattr("pathlib.Path.open", full)
            model(token_ids())

    with pytest.raises(ValueError, match=r"run.safetensors: cannot be written \(No space left"):
        run()
    assert names_in(tmp_path) == []


def test_the_trace_is_read_from_the_file_after_the_block_and_not_before(tmp_path):
    model, path = tiny(), tmp_path / "run.safetensors"
    with record(model, to=path) as rec:
        model(token_ids())
        with pytest.raises(ValueError, match="is there when the block has ended"):
            _ = rec.trace
    assert torch.equal(rec.trace.picks, ms.load(path).picks)


def held(rec) -> int:
    """Numbers in all tensors that a recorder leads to, those of the model apart."""
    seen, todo, count = set(), [rec], 0
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, nn.Module | type | FunctionType | ModuleType):
            continue
        seen.add(id(thing))
        count += thing.numel() if isinstance(thing, torch.Tensor) else 0
        todo += gc.get_referents(thing) if not isinstance(thing, torch.Tensor) else []
    return count


@pytest.mark.parametrize("detail", ["ids", "picks", "scores"])
def test_what_is_held_does_not_grow_with_the_number_of_forwards(tmp_path, detail):
    model, sizes = tiny(), []
    with record(model, detail, to=tmp_path / "run.safetensors") as rec, torch.no_grad():
        for _ in range(12):
            model(token_ids())
            sizes.append(held(rec))
    assert set(sizes[1:]) == {sizes[1]}
    with record(model, detail) as rec, torch.no_grad():
        model(token_ids())
    assert held(rec) > 10 * sizes[1], "what lies in memory is seen"


def test_a_part_opens_its_file_once_for_many_rows_and_holds_none_that_could_not_be_written(tmp_path, monkeypatch):
    part, opened, open_file = Part(tmp_path / "x", tmp_path), [], Path.open
    full = iter([False, True, False])

    def opens(file, mode):
        opened.append(file)
        if next(full):
            raise OSError(28, "No space left on device")
        return open_file(file, mode)

    monkeypatch.setattr(Path, "open", opens)
    for row in range(4097):
        part.append(torch.tensor([[row, 0]], dtype=torch.int32))
    assert len(opened) == 1
    monkeypatch.setattr(parts, "WAITING", 16)
    with pytest.raises(ValueError, match="No space left"):
        part.append(torch.tensor([[9, 9]], dtype=torch.int32))
    assert [len(part), *(block[-4:].tolist() for block in part.blocks())] == [4097, [4095, 0, 4096, 0]]


def test_the_rows_of_a_part_keep_their_width_and_their_kind(tmp_path):
    part = Part(tmp_path / "x", tmp_path)
    part.append(torch.arange(6).view(3, 2))
    with pytest.raises(ValueError, match="keeps its width"):
        part.append(torch.zeros(1, 3, dtype=torch.int64))
    small = Part(tmp_path / "y", tmp_path)
    small.append(torch.ones(1, 1, dtype=torch.int16))
    with pytest.raises(ValueError, match="70000 after numbers of int16: give one dtype"):
        small.append(torch.tensor([[70_000]]))


GROWN = """
import resource, sys, torch
from moesaic.bench.recording import Routes, batches
from moesaic.trace.recording.record import record

def run(n_tokens, path):
    with record(model, sys.argv[1], to=path), torch.no_grad():
        for batch in batches(n_tokens):
            model(batch)

model = Routes(8, 256, 8)
run(4096, "warm.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(200_000, "run.safetensors")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_long_record_to_a_file_needs_no_more_memory_than_a_short_one(tmp_path):
    code = [sys.executable, "-c", GROWN, "picks"]
    grown = int(subprocess.run(code, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert (tmp_path / "run.safetensors").stat().st_size > 60 * BYTES
    assert grown < 15 * BYTES
