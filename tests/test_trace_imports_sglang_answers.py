"""SGLang's routed_experts as traces: flat ids, whose shape the config alone knows."""

import base64
import json

import numpy as np
import pytest
from foreign import KNOWN, SIZES, cases, config_file, encoded, equal, imported, picked, refused, vllm_array

from moesaic.trace.imports import READERS, read_target


def flat(picks: np.ndarray, dense: int = 0) -> str:
    """What SGLang returns: base64 of int32 [tokens, all layers, K] without a header."""
    array = vllm_array(picks, np.int32)
    array[:, 0] = dense
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def generated(picks: np.ndarray, **more) -> dict:
    """An answer of /generate."""
    return {"text": "…", "meta_info": {"id": "x", "routed_experts": flat(picks)}, **more}


@pytest.fixture
def target(tmp_path):
    return read_target(str(config_file(tmp_path)))


@pytest.fixture
def written(tmp_path):
    def write(content, name="a.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("dense", [0, -1])
def test_sglang_answers_are_the_picks_of_the_tokens(written, target, dense):
    meta = {"prompt_tokens": 3, "completion_tokens": 3, "routed_experts": flat(picked(5), dense)}
    one = {"output_ids": [8, 9, 10], "input_ids": [5, 6, 7], "meta_info": meta}
    other = generated(picked(4, seed=1))
    for file in (
        written([one, other]),
        written(json.dumps(one) + "\n\n" + json.dumps(other) + "\n", "a.jsonl"),
    ):
        trace, notes = imported("sglang", [file], target)
        assert equal(trace, np.concatenate([picked(5), picked(4, seed=1)], 1))
        assert trace.layers == ("layers.1", "layers.2", "layers.3", "layers.4")
        assert trace.sequences.tolist() == [0] * 5 + [1] * 4
        assert (trace.labels, trace.input_ids, trace.missing, notes) == (("a", "a"), None, (), ())
    trace, _ = imported("sglang", [written(one)], target)
    assert trace.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert trace.phases.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("field", ["meta_info", "sglext", "sgl_ext"])
def test_sglang_openai_answers_have_them_in_the_answer_or_in_each_choice(written, target, field):
    usage = {"prompt_tokens": 4, "completion_tokens": 2}
    ours = {field: {"routed_experts": flat(picked(5))}}
    for answer in ({"choices": [{"index": 0}], **ours}, {"choices": [{"index": 0, **ours}]}):
        trace, _ = imported("sglang", [written({**answer, "usage": usage})], target)
        assert equal(trace, picked(5))
        assert trace.phases.tolist() == [0, 0, 0, 0, 1]
    two = {"choices": [ours, {field: {"routed_experts": flat(picked(4, seed=1))}}], "usage": usage}
    trace, _ = imported("sglang", [written(two)], target)
    assert trace.sequences.tolist() == [0] * 5 + [1] * 4
    assert trace.phases is None  # the usage is that of both


def test_sglang_rows_from_a_later_token_on_are_known_by_their_number(written, target):
    """routed_experts_start_len leaves tokens out at the beginning."""
    answer = generated(picked(3), input_ids=[5, 6, 7], output_ids=[8, 9, 10])
    trace, _ = imported("sglang", [written(answer)], target)
    assert trace.input_ids.tolist() == [7, 8, 9]
    assert trace.phases.tolist() == [0, 1, 1]


def broken():
    good = generated(picked(5))
    cut = base64.b64encode(base64.b64decode(flat(picked(5)))[:-4]).decode()
    first = {"choices": [{}, {}], "sglext": {"routed_experts": flat(picked(5))}}

    def held(value):
        return {"meta_info": {"routed_experts": value}}

    def sized(prompt, completion):
        meta = {"prompt_tokens": 3, "completion_tokens": 3, "routed_experts": flat(picked(5))}
        return {"input_ids": prompt, "output_ids": completion, "meta_info": meta}

    return [
        ("cut", held(cut), r"396 bytes are no whole tokens of 5 layers x 4 experts x 4 bytes: cut short, or give the"),
        ("not asked for", {"text": "…", "meta_info": {"id": "x"}}, "ask SGLang for return_routed_experts in every req"),
        ("not base64", held("§"), "routed_experts is not base64, or cut short"),
        ("a list", held([1, 2]), "routed_experts is not base64 of int32 ids"),
        ("of vLLM", {"choices": [{"routed_experts": encoded(vllm_array(picked(5)))}]}, "moesaic import vllm reads it"),
        ("of the first alone", first, "2 choices, and SGLang returns the routed_experts of the first alone"),
        ("too many tokens", {**good, "input_ids": [1], "output_ids": [2]}, r"5 rows of ids for 1 \+ 1 tokens"),
        ("fewer ids", sized([5, 6], [8, 9, 10]), "input_ids has 2 ids, and prompt_tokens is 3: give this request's"),
        ("more ids", sized([5, 6, 7], [8] * 4), "output_ids has 4 ids, and completion_tokens is 3: give this"),
        ("other ids", {**good, "input_ids": ["a"]}, "input_ids is not a list of whole numbers"),
        ("no answers", [3], "response 0: not a response"),
        ("an expert twice", held(flat(picked(5) * 0 + 3)), "token 0 of layers.1 chose one expert twice"),
        ("too many experts", held(flat(picked(5) + 1)), "chose expert 16, and there are 16"),
    ]


@pytest.mark.parametrize(("answer", "message"), cases(broken()))
def test_a_damaged_sglang_answer_is_refused_in_one_line(written, target, answer, message):
    with pytest.raises(ValueError, match=message):
        READERS["sglang"]([written(answer)], target)


def test_sglang_ids_have_no_shape_without_a_config(written):
    for sizes in (SIZES, KNOWN):  # of a number of experts alone, of a preset
        said = refused("sglang", [written(generated(picked(5)))], sizes)
        assert "a config.json alone says how many layers there are: give --config a config.json" in said


def test_who_reads_answers_with_the_wrong_command_is_told_the_right_one(tmp_path, written, target):
    answer = {"choices": [{}], "sglext": {"routed_experts": flat(picked(5))}}
    for one in (generated(picked(5)), answer):
        assert "a response of SGLang: moesaic import sglang reads it" in refused("vllm", [written(one)], target)
    bare = {"routed_experts": flat(picked(5))}
    assert "ids of SGLang have none: moesaic import sglang" in refused("vllm", [written(bare)], target)
    assert equal(READERS["sglang"]([written(bare)], target).trace, picked(5))
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert "answers of the server are .json or .jsonl" in refused("sglang", [tmp_path / "a.txt"], target)
