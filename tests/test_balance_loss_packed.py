"""BalanceLoss("sequence") where a row of the batch holds several sequences, one after the other."""

import pytest
import torch
from balanced import assert_same, attached, gradients, model_of, unbroken
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from moesaic.train.injection import sequence_numbers

LENGTHS = (8, 5, 3)


def sequences_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def packed():
    rows = [{"input_ids": row.tolist()} for row in sequences_of()]
    return {**DataCollatorWithFlattening()(rows), "use_cache": False}


def padded():
    ids = sequences_of()
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def test_a_packed_batch_is_balanced_as_a_padded_one_of_the_same_sequences():
    found = []
    for batch in (packed(), padded()):
        model = model_of("deepseek_v3")
        balance = attached("sequence", model)
        found.append(gradients(model, lambda model=model, batch=batch: model(**batch).loss.backward()))
        balance.step()
        found.append(balance.values)
    for one, other in zip(found[:2], found[2:], strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)  # the model's loss is float32


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_so_it_is_where_the_model_is_called_without_its_head(compiled):
    found = []
    for whole in (True, False):
        model, batch = unbroken("deepseek_v3", num_hidden_layers=2), packed()
        labels, balance = batch.pop("labels"), attached("sequence", model)
        torch._dynamo.reset()
        called = model if whole else model.model
        run = torch.compile(called, backend="aot_eager") if compiled else called

        def backward(model=model, run=run, batch=batch, whole=whole, balance=balance, labels=labels):
            logits = run(**batch).logits if whole else model.lm_head(run(**batch).last_hidden_state)
            balance(torch.nn.functional.cross_entropy(logits[0], labels[0].clamp(min=0))).backward()

        found.append(gradients(model, backward))
    assert_same(*found)
    torch._dynamo.reset()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["ids", "embeddings"])
def test_so_it_is_in_a_compiled_model(way):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model, batch = unbroken("deepseek_v3", num_hidden_layers=2), packed()
        if way == "embeddings":
            batch["inputs_embeds"] = model.model.embed_tokens(batch.pop("input_ids"))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        balance = attached("sequence", model)
        found.append(gradients(model, lambda run=run, batch=batch: run(**batch).loss.backward()))
        balance.step()
        found.append(balance.values)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])
    torch._dynamo.reset()


@pytest.mark.parametrize("lengths", [[(3, 5)], [(2, 6), (5, 3)], [(8,), (4, 4)]])
def test_sequences_are_those_of_transformers(lengths):
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    theirs = find_packed_sequence_indices(positions)
    pairs = torch.stack([theirs.flatten(), torch.arange(len(lengths)).repeat_interleave(positions.shape[1])])
    numbers = sequence_numbers(positions)
    assert torch.equal(torch.unique_consecutive(pairs, dim=1, return_inverse=True)[1], numbers)


def test_padding_of_a_packed_row_is_one_sequence_and_positions_without_packs_are_rows():
    """As TRL's collator fills a row up, with pad_to_multiple_of and without a mask."""
    assert sequence_numbers(torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    model, batch = model_of("deepseek_v3"), {"input_ids": torch.stack(sequences_of((8, 8)))}
    attached("sequence", model)
    batch["labels"] = batch["input_ids"]
    plain = gradients(model, lambda: model(**batch).loss.backward())
    for positions in (torch.arange(8)[None], torch.arange(8).repeat(2, 1)):
        assert_same(plain, gradients(model, lambda p=positions: model(**batch, position_ids=p).loss.backward()))
