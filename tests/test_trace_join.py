"""Several traces as one: what is cut apart is put together again, and what does not fit is refused and named."""

import dataclasses

import pytest
import torch
from cases import v3
from traces import assert_equal, made

import moesaic as ms
from moesaic.trace.store import Trace


def whole(**fields) -> Trace:
    trace = made(
        v3(16, 4, 2, 4), 12, 4, sequences=torch.arange(12) // 4, input_ids=torch.arange(12), labels=("a", "b", "c"),
        model="tiny", seed=7,
    )  # fmt: skip
    more = {"phases": torch.zeros(12, dtype=torch.uint8), "offsets": torch.arange(12).repeat(2, 1).T.contiguous()}
    return dataclasses.replace(trace, **more | {"pieces": {3: "x"}, **fields})


def shards(trace: Trace, *ends: int) -> list[Trace]:
    """Tokens cut where sequences begin: each shard counts its own from 0."""
    parts = []
    for begin, end in zip((0, *ends), (*ends, len(trace)), strict=True):
        part = trace.select(slice(begin, end))
        first, last = int(part.sequences.min()), int(part.sequences.max())
        parts.append(dataclasses.replace(part, sequences=part.sequences - first, labels=trace.labels[first : last + 1]))
    return parts


def stage(trace: Trace, *layers: int) -> Trace:
    picked = {name: getattr(trace, name)[list(layers)] for name in ("picks", "weights", "logits", "bias")}
    names = {name: tuple(getattr(trace, name)[i] for i in layers) for name in ("layers", "configs", "origins")}
    missing = tuple(name for i, name in enumerate(trace.layers) if i not in layers)
    return dataclasses.replace(trace, **picked, **names, missing=missing)


def test_shards_are_put_together_along_tokens():
    assert_equal(ms.join(shards(whole(), 4, 8)), whole())
    assert_equal(ms.join(shards(whole(), 8)), whole())
    assert_equal(ms.join([whole()]), whole())


def test_stages_are_put_together_along_layers():
    trace = whole(origins=("experts", "router", "experts", "experts"))
    assert_equal(ms.join([stage(trace, 0), stage(trace, 1, 2), stage(trace, 3)], along="layers"), trace)
    assert ms.join([stage(trace, 0), stage(trace, 3)], along="layers").missing == ("layers.1", "layers.2")


def test_what_one_stage_knows_of_the_tokens_is_known_of_all():
    first, second = stage(whole(), 0, 1), stage(whole(), 2, 3)
    unknown = dict.fromkeys(("input_ids", "phases", "offsets", "labels", "pieces"))
    for stages in ([first, dataclasses.replace(second, **unknown)], [dataclasses.replace(first, **unknown), second]):
        assert_equal(ms.join(stages, along="layers"), whole())


def test_a_stage_whose_layers_have_no_bias_has_one_of_zeros_as_in_the_record_of_the_whole():
    with_bias, without = v3(16, 4, 2, 4), v3(16, 4, 2, 4, topk_method="group_limited_greedy")
    bias = whole().bias.clone()
    bias[:2] = 0
    trace = whole(configs=(without, without, with_bias, with_bias), bias=bias)
    first = dataclasses.replace(stage(trace, 0, 1), bias=None)
    assert_equal(ms.join([first, stage(trace, 2, 3)], along="layers"), trace)
    assert ms.join([first, first.select(slice(0, 4))]).bias is None
    torch.set_default_dtype(torch.float64)
    try:
        assert ms.join([first, stage(trace, 2, 3)], along="layers").bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    unknown = dataclasses.replace(stage(trace, 2, 3), bias=None)
    with pytest.raises(ValueError, match="only trace 0 has bias"):
        ms.join([stage(trace, 0, 1), unknown], along="layers")


def test_a_label_of_a_sequence_without_tokens_keeps_its_place():
    first = dataclasses.replace(whole().select(slice(0, 4)), labels=("a", "empty"))
    joined = ms.join([first, dataclasses.replace(first, labels=("b",))])
    assert joined.sequences.tolist() == [0] * 4 + [2] * 4
    assert joined.labels == ("a", "empty", "b")


def test_provenance_is_what_all_agree_on_and_pieces_are_those_of_all():
    a, b = shards(whole(versions={"torch": "2", "moesaic": "1"}), 4)
    joined = ms.join([a, dataclasses.replace(b, seed=8, versions={"torch": "2"}, pieces={4: "y"})])
    assert (joined.seed, joined.versions, joined.pieces) == (None, {"torch": "2"}, {3: "x", 4: "y"})


TOKENS, LAYERS = shards(whole(), 4)[1], stage(whole(), 1)
REFUSED = [
    (TOKENS, {"model": "other"}, r"trace 1 has another model than trace 0 \('other', not 'tiny'\): along tokens, all"),
    (TOKENS, {"layers": tuple("abcd")}, "trace 1 has another layers than trace 0"),
    (TOKENS, {"bias": whole().bias + 1}, "trace 1 has another bias than trace 0: along tokens"),
    (TOKENS, {"logits": None}, r"only trace 0 has logits: leave it out with dataclasses.replace\(trace, logits=None\)"),
    (TOKENS, {"labels": None}, "only trace 0 has labels"),
    (TOKENS, {"pieces": {3: "z"}}, "token 3 is 'z' in trace 1 and 'x' before: join traces of one tokenizer"),
    (LAYERS, {"input_ids": torch.arange(12) + 1}, "trace 1 has another input_ids than trace 0: along layers"),
    (LAYERS, {"sequences": torch.arange(12) // 3, "labels": None}, "trace 1 has another sequences than trace 0"),
    (LAYERS, {"layers": ("layers.0",)}, "layer 'layers.0' is in more than one trace: give stages that share no layer"),
]


@pytest.mark.parametrize(("other", "fields", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_traces_that_do_not_fit_are_refused_and_what_differs_is_named(other, fields, message):
    first, along = (whole(), "tokens") if other is TOKENS else (stage(whole(), 0), "layers")
    with pytest.raises(ValueError, match=message):
        ms.join([first, dataclasses.replace(other, **fields)], along)


def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match="there is no trace to join: give at least one"):
        ms.join([])
    with pytest.raises(ValueError, match="along='experts' is unknown: use 'tokens' or 'layers'"):
        ms.join([whole()], along="experts")
    with pytest.raises(ValueError, match="trace 1 has 2 of 16 experts a token and trace 0 has 4 of 16: join traces"):
        ms.join([whole(), made(v3(16, 4, 2, 2))])
    for given in [(whole(),), (whole(), whole())]:
        with pytest.raises(ValueError, match=r"given by itself: give a list of them, ms.join\(\[a, b\]\)"):
            ms.join(*given)
    with pytest.raises(ValueError, match="no trace: give a Trace"):
        ms.join(["run.safetensors"])
