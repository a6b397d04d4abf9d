"""vLLM's routed_experts as traces: what was chosen, token for token."""

import json
from pathlib import Path

import numpy as np
import pytest
from foreign import (
    KNOWN,
    Canary,
    E,
    cases,
    encoded,
    equal,
    imported,
    picked,
    refused,
    vllm_array,
)

from moesaic.trace.imports import READERS, Target


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vllm_arrays_are_the_picks_of_the_tokens(tmp_path, dtype, order):
    np.save(tmp_path / "prose.npy", np.asarray(vllm_array(picked(9), dtype), order=order))
    np.save(tmp_path / "code.npy", vllm_array(picked(5, seed=1), dtype))
    trace, notes = imported("vllm", [tmp_path / "prose.npy", tmp_path / "code.npy"], KNOWN)
    assert equal(trace, np.concatenate([picked(9), picked(5, seed=1)], 1))
    assert trace.layers == ("layers.1", "layers.2", "layers.3", "layers.4")
    assert trace.sequences.tolist() == [0] * 9 + [1] * 5
    assert trace.labels == ("prose", "code")
    assert (trace.input_ids, trace.phases, notes) == (None, None, ())


def test_vllm_responses_have_tokens_and_phases(tmp_path):
    """Prompt and completion less the last token are forwarded."""
    one = {
        "prompt_token_ids": [5, 6, 7],
        "choices": [
            {"token_ids": [8, 9], "routed_experts": encoded(vllm_array(picked(4)))},
            {"token_ids": [1, 2, 3], "routed_experts": encoded(vllm_array(picked(5, seed=1)))},
        ],
    }
    late = {  # routed_experts_prompt_start=2
        "choices": [{"token_ids": [8, 9], "prompt_token_ids": [5, 6, 7],
                     "routed_experts": encoded(vllm_array(picked(2, seed=2)))}],
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(one) + "\n\n" + json.dumps(late) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([one, late]))
    for file in ("a.jsonl", "b.json"):
        trace = READERS["vllm"]([tmp_path / file], KNOWN).trace
        assert equal(trace, np.concatenate([picked(4), picked(5, seed=1), picked(2, seed=2)], 1))
        assert trace.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 7, 1, 2, 7, 8]
        assert trace.phases.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1]
        assert trace.sequences.tolist() == [0] * 4 + [1] * 5 + [2] * 2


def test_vllm_usage_gives_phases_where_tokens_were_not_asked_for(tmp_path):
    response = {
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "choices": [{"token_ids": None, "routed_experts": encoded(vllm_array(picked(5)))}],
    }
    (tmp_path / "a.json").write_text(json.dumps(response))
    trace = READERS["vllm"]([tmp_path / "a.json"], KNOWN).trace
    assert trace.phases.tolist() == [0, 0, 0, 1, 1]
    assert trace.input_ids is None


def test_vllm_rows_of_zeros_were_not_recorded_and_expert_0_was(tmp_path):
    picks = picked(6)
    picks[:, 0] = [0, 3, 2, 1]
    ids = vllm_array(picks)
    ids[4] = 0  # a token that was not forwarded
    ids[2, 3] = 0
    np.save(tmp_path / "a.npy", ids)
    trace, notes = imported("vllm", [tmp_path / "a.npy"], KNOWN)
    expected = np.delete(picks, 4, 1)
    expected[2, 2] = E
    assert equal(trace, expected)
    assert notes == (
        '1 of 20 token-layers have no picks: there they are "none"',
        "tokens left out because they have no pick: 1",
    )


def test_vllm_one_expert_a_token_may_be_expert_0(tmp_path):
    ids = np.zeros((5, 2, 1), dtype=np.uint8)
    ids[1:, 1, 0] = [3, 0, 1, 2]
    np.save(tmp_path / "a.npy", ids)
    trace = READERS["vllm"]([tmp_path / "a.npy"], Target(n_experts=4)).trace
    assert trace.picks[:, :, 0].tolist() == [[0] * 5, [0, 3, 0, 1, 2]]
    trace = READERS["vllm"]([tmp_path / "a.npy"], Target(n_experts=4, layers=(1,))).trace
    assert (trace.layers, trace.picks[:, :, 0].tolist()) == (("layers.1",), [[0, 3, 0, 1, 2]])


def test_vllm_255_is_an_expert_of_256_and_padding_of_fewer(tmp_path):
    ids = np.array([[[255, 1]], [[2, 3]], [[255, 255]], [[7, 255]]], dtype=np.uint8)
    np.save(tmp_path / "a.npy", ids)
    of_256 = READERS["vllm"]([tmp_path / "a.npy"], Target(n_experts=256)).trace
    assert of_256.picks.tolist() == [[[255, 1], [2, 3], [7, 255]]]
    of_64 = READERS["vllm"]([tmp_path / "a.npy"], Target(n_experts=64)).trace
    assert of_64.picks.tolist() == [[[64, 1], [2, 3], [7, 64]]]


@pytest.mark.parametrize("n_experts", [128, 300])
def test_vllm_signed_bytes_hold_no_id_of_no_expert_and_the_trace_does(tmp_path, n_experts):
    np.save(tmp_path / "a.npy", np.array([[[126, 127]], [[2, -1]]], dtype=np.int8))
    trace = READERS["vllm"]([tmp_path / "a.npy"], Target(n_experts=n_experts)).trace
    assert trace.picks.tolist() == [[[126, 127], [2, n_experts]]]


def test_vllm_arrays_of_moe_layers_alone_are_numbered_as_the_config_says(tmp_path):
    np.save(tmp_path / "a.npy", vllm_array(picked(5))[:, 1:])
    assert READERS["vllm"]([tmp_path / "a.npy"], KNOWN).trace.layers == tuple(f"layers.{i}" for i in range(1, 5))


def broken_vllm():
    good = vllm_array(picked(5))

    def saved(array, **options):
        return lambda path: np.save(path, array, **options)

    def twice(path):
        ids = good.copy()
        ids[3, 2, 1] = ids[3, 2, 0]
        np.save(path, ids)

    def cut(path):
        np.save(path, good)
        path.write_bytes(path.read_bytes()[:-1])

    def claims(path):
        np.save(path, good)
        path.write_bytes(path.read_bytes().replace(b"(5, 5, 4)", b"(5, 5, 9999999999999)"[:9]))

    def archived(path):
        with path.open("wb") as file:
            np.savez(file, a=good)

    def text(content):
        return lambda path: path.write_text(content)

    def choice(value, **more):
        return text(json.dumps({"choices": [{"routed_experts": value, **more}]}))

    return [
        ("floats", saved(good.astype(np.float32)), "the array holds float32, and expert ids are integers"),
        ("booleans", saved(good.astype(bool)), "the array holds bool"),
        ("uint32", saved(good.astype(np.uint32)), "the array holds uint32"),
        ("objects", saved(np.array([Canary(Path("ran"))], dtype=object), allow_pickle=True), "holds Python objects"),
        ("two axes", saved(good[0]), r"has the shape \(5, 4\): \[tokens, layers, top k\] is due"),
        ("no layers", saved(good[:, :0]), "0 layers of 4 ids"),
        ("twice", twice, "token 3 of layers.2 chose one expert twice"),
        ("too many", saved(np.where(good == 7, 77, good)), "chose expert 77, and there are 16"),
        ("negative", saved(np.where(good == 7, -3, good.astype(int))), "chose expert -3, and there are 16"),
        ("wrong K", saved(good[:, :, :3]), "num_experts_per_tok=4 in the config, and the record holds 3"),
        ("only zeros", saved(good * 0), "the record holds no picks"),
        ("cut", cut, "cut short or too long"),
        ("claims more", claims, "cut short or too long|header is damaged|axes|shape"),
        ("npz", archived, r"an archive \(.npz, .pt\)"),
        ("no header", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "its header is damaged"),
        ("text", text("hello"), "not JSON, or cut short"),
        ("a number", text("3"), "not a response"),
        ("no choices", text('{"choices": 3}'), "choices is not a list of objects"),
        ("nothing recorded", choice(None), "no routed_experts in these files: start the server with"),
        ("not base64", choice("§§§"), "routed_experts is not base64"),
        ("base64 and more", choice(encoded(good)[:8] + "!!!!" + encoded(good)[8:]), "routed_experts is not base64"),
        ("a list", choice([[1]]), "routed_experts is not base64 of a .npy file"),
        ("base64 of nothing", choice("aGVsbG8="), "not a .npy array"),
        ("few tokens", choice(encoded(good), token_ids=[1], prompt_token_ids=[1]), r"5 rows of ids for 1 \+ 1 tokens"),
        ("tokens of text", choice(encoded(good), token_ids=["a"]), "token_ids is not a list of whole numbers"),
        ("twice a key", text('{"choices": [], "choices": []}'), "has the key .* twice"),
    ]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), cases(broken_vllm()))
def test_a_damaged_vllm_record_is_refused_in_one_line(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"  # what it is, is read from its bytes
    make(path)
    with pytest.raises(ValueError, match=message):
        READERS["vllm"]([path], KNOWN)
    assert not (tmp_path / "ran").exists()


def test_vllm_records_of_two_models_are_not_mixed(tmp_path):
    np.save(tmp_path / "a.npy", vllm_array(picked(5)))
    np.save(tmp_path / "b.npy", vllm_array(picked(5))[:, 1:])
    assert "import models one by one" in refused("vllm", [tmp_path / "a.npy", tmp_path / "b.npy"])
