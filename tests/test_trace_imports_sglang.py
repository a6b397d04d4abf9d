"""SGLang's expert-distribution dumps as traces: what was chosen, token for token, and no code of the file run."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from foreign import KNOWN, SIZES, Canary, E, K, L, cases, equal, imported, picked, refused, sglang_dump, sglang_record

from moesaic.trace.imports import READERS, Target, sglang


def test_sglang_prefill_and_decode_are_the_picks_of_the_tokens(tmp_path):
    """Two requests: prefilled together, then three decode steps; the second ends after two."""
    prefill, decode = picked(9, seed=1), [picked(2, seed=2), picked(2, seed=3), picked(1, seed=4)]
    records = [sglang_record(prefill, lengths=[5, 4], positions=[0, 1, 2, 3, 4, 0, 1, 2, 3])]
    for step, (ids, at) in enumerate(zip(decode, ([5, 4], [6, 5], [7]), strict=True), 1):
        records.append(sglang_record(ids, number=step, mode=2, lengths=None, positions=at, ids=[step] * len(at)))
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", records)], KNOWN)
    assert equal(trace, np.concatenate([prefill, *decode], 1))
    assert trace.layers == ("layers.1", "layers.2", "layers.3", "layers.4")
    assert trace.origins == ("imported",) * 4
    assert trace.missing == ()
    assert trace.weights is None
    assert trace.configs == (KNOWN.config,) * 4
    assert trace.sequences.tolist() == [0] * 5 + [1] * 4 + [0, 1, 0, 1, 0]
    assert trace.phases.tolist() == [0] * 9 + [1] * 5
    assert trace.input_ids.tolist() == [*range(100, 109), 1, 1, 2, 2, 3]
    assert trace.model == "toy"
    assert notes == ()


def test_sglang_ids_are_led_from_physical_to_logical_experts(tmp_path):
    """16 experts on 20 slots, another order in every layer."""
    rng = np.random.default_rng(0)
    to_logical = np.stack([rng.permutation([*range(E), 3, 3, 7, 0]) for _ in range(L)])
    logical = picked(50)
    physical = np.empty_like(logical)
    for layer, token, slot in np.ndindex(logical.shape):
        slots = np.flatnonzero(to_logical[layer + 1] == logical[layer, token, slot])
        physical[layer, token, slot] = rng.choice(slots)
    assert physical.max() >= E
    file = sglang_dump(tmp_path / "a.pt", [sglang_record(physical)], torch.from_numpy(to_logical))
    assert equal(READERS["sglang"]([file], KNOWN).trace, logical)


def test_sglang_padding_is_left_out_and_masked_tokens_have_no_expert(tmp_path):
    picks = picked(6)
    record = sglang_record(picks)
    record["topk_ids_of_layer"][:, 4:] = -1  # padding of a CUDA graph
    record["topk_ids_of_layer"][2, 1] = -1  # one layer without picks of one token
    record["topk_ids_of_layer"][3, 0, 2] = -1  # one slot
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", [record])], KNOWN)
    expected = picks[:, :4].copy()
    expected[1, 1] = E
    expected[2, 0, 2] = E
    assert equal(trace, expected)
    assert notes == (
        '1 of 16 token-layers have no picks: there they are "none"',
        "tokens left out because they have no pick: 2",
    )
    assert trace.input_ids.tolist() == [100, 101, 102, 103]


def test_sglang_bytes_of_255_are_padding_and_not_expert_255(tmp_path):
    record = sglang_record(picked(5))
    topk = record["topk_ids_of_layer"]
    record["topk_ids_of_layer"] = torch.where(topk < 0, 255, topk).to(torch.uint8)
    assert equal(READERS["sglang"]([sglang_dump(tmp_path / "a.pt", [record])], KNOWN).trace, picked(5))


def test_sglang_fused_shared_experts_are_left_out_and_said(tmp_path):
    record = sglang_record(picked(5))
    record["topk_ids_of_layer"][1:, :, K] = E  # appended behind the routed ones
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", [record])], KNOWN)
    assert equal(trace, picked(5))
    assert "shared experts fused into the routed ones: 1" in notes[0]


def test_sglang_ranks_that_repeat_count_once_and_others_follow(tmp_path):
    records = [[sglang_record(picked(4, seed=s), number=s, rank=rank) for s in (0, 1)] for rank in (0, 1)]
    other = [sglang_record(picked(4, seed=9), number=0, rank=2)]
    files = [sglang_dump(tmp_path / f"{i}.pt", r) for i, r in enumerate([*records, other])]
    trace, notes = imported("sglang", files, KNOWN)
    assert equal(trace, np.concatenate([picked(4, seed=s) for s in (0, 1, 9)], 1))
    assert notes == ("rank 1 repeats rank 0 (tensor parallelism) and is left out",)
    assert trace.sequences.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for change in ({"input_ids": [7] * 4}, {"topk_ids_of_layer": records[0][0]["topk_ids_of_layer"].flip(1)}):
        data_parallel = [{**record, "rank": 1, **change} for record in records[0]]
        both = READERS["sglang"]([files[0], sglang_dump(tmp_path / "dp.pt", data_parallel)], KNOWN)
        assert (len(both.trace), both.notes) == (16, ())
    assert "rank 0 has a forward pass twice" in refused("sglang", [files[0], files[0]])


def test_sglang_chunks_go_on_and_mixed_passes_are_both_phases(tmp_path):
    first = sglang_record(picked(4, seed=0), number=0)
    mixed = sglang_record(  # the second chunk of the first request, and a decode step of one not seen before
        picked(4, seed=1), number=1, mode=3, lengths=[3, 1], positions=[4, 5, 6, 40]
    )
    decode = sglang_record(picked(2, seed=2), number=2, mode=2, lengths=None, positions=[41, 7])
    trace = READERS["sglang"]([sglang_dump(tmp_path / "a.pt", [decode, mixed, first])], KNOWN).trace
    assert trace.sequences.tolist() == [0] * 4 + [0, 0, 0, 1] + [1, 0]
    assert trace.phases.tolist() == [0] * 7 + [1] * 3


def test_sglang_requests_of_equal_length_keep_the_order_of_the_batch(tmp_path):
    """An ended request of the same length must not be taken up again."""
    start = sglang_record(picked(6, seed=0), lengths=[2, 2, 2], positions=[0, 1] * 3)
    steps = [
        sglang_record(picked(3, seed=1), number=1, mode=2, lengths=None, positions=[2, 2, 2]),
        sglang_record(picked(2, seed=2), number=2, mode=2, lengths=None, positions=[3, 3]),  # the third has ended
        sglang_record(picked(2, seed=3), number=3, lengths=[2], positions=[0, 1]),
        sglang_record(picked(3, seed=4), number=4, mode=2, lengths=None, positions=[4, 4, 2]),
        sglang_record(picked(1, seed=5), number=5, mode=2, lengths=None, positions=[3]),  # the fourth: two stale ends
    ]
    trace = READERS["sglang"]([sglang_dump(tmp_path / "a.pt", [start, *steps])], KNOWN).trace
    assert trace.sequences.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 3, 3, 0, 1, 3, 3]


def test_sglang_without_a_config_finds_k_and_leaves_the_rule_open(tmp_path):
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", [sglang_record(picked(7))])], SIZES)
    assert equal(trace, picked(7))
    assert not trace.configs[0].rule_is_known
    assert notes == ("no picks in layers.0: dense layers, or not recorded; the config does not say",)


def test_a_layer_that_the_config_promises_is_missing_and_said(tmp_path):
    record = sglang_record(picked(5))
    record["topk_ids_of_layer"][2] = -1
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", [record])], KNOWN)
    assert trace.layers == ("layers.1", "layers.3", "layers.4")
    assert trace.missing == ("layers.2",)
    assert notes == ("no data of layers.2, which the config says are MoE layers",)
    wrong = Target(n_experts=E, config=KNOWN.config, layers=(2, 3, 4, 5))
    trace, notes = imported("sglang", [sglang_dump(tmp_path / "a.pt", [record])], wrong)
    assert trace.missing == ("layers.2", "layers.5")
    assert "picks in layers.1, which the config says have no experts" in notes[2]


def test_sglang_counts_are_refused_with_the_reason_and_can_be_read(tmp_path):
    counts = torch.arange(2 * L * E).view(2, L, E).int()
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / "stat.pt")
    assert "holds counts per layer and expert, not what each token chose" in refused("sglang", [tmp_path / "stat.pt"])
    assert torch.equal(sglang.read_counts(tmp_path / "stat.pt"), counts.long())
    record = sglang_record(picked(5))
    file = sglang_dump(tmp_path / "a.pt", [{k: v for k, v in record.items() if k != "topk_ids_of_layer"}])
    assert "--expert-distribution-recorder-mode per_token" in refused("sglang", [file])
    with pytest.raises(ValueError, match="no logical_count"):
        sglang.read_counts(file)


@pytest.mark.parametrize("place", ["record", "content", "token", "bare"])
def test_code_in_a_dump_is_never_run(tmp_path, place):
    canary, path = Canary(tmp_path / "ran"), tmp_path / "a.pt"
    record = sglang_record(picked(5))
    if place == "bare":
        path.write_bytes(pickle.dumps({"records": [canary]}))
        assert "not a file of torch.save" in refused("sglang", [path])
    else:
        if place == "record":
            record["misc_objects"] = [canary]
        if place == "token":
            record["input_ids"][2] = canary
        torch.save({"records": [record], "extra": canary if place == "content" else None}, path)
        message = refused("sglang", [path])
        name = f"{open.__module__}.open"  # _io from Python 3.13 on
        assert f"Python objects ({name}): it is not read, since that would run code" in message
        assert "weights_only" not in message, "no advice to run it"
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(canary)).close()
    assert (tmp_path / "ran").exists(), "the canary works"


def broken_sglang():
    """(name, what is done to a whole record or dump, message)."""

    def record(**changes):
        return lambda r: {"records": [{**r, **changes}]}

    def topk(change):
        return lambda r: {"records": [{**r, "topk_ids_of_layer": change(r["topk_ids_of_layer"])}]}

    def repeated(r):
        r["topk_ids_of_layer"][1, 2, 1] = r["topk_ids_of_layer"][1, 2, 0]
        return {"records": [r]}

    def beyond(r):
        r["topk_ids_of_layer"][1, 2, 1] = E
        return {"records": [r]}

    def below(r):
        r["topk_ids_of_layer"][1, 2, 1] = -2
        return {"records": [r]}

    return [
        ("a list", lambda _: [1], "not a dump of the recorder"),
        ("no records", lambda _: {"x": 1}, "it has no list of records"),
        ("empty", lambda _: {"records": []}, "the dumps hold no forward passes"),
        ("a record that is a list", lambda _: {"records": [[1]]}, "record 0: not a dict"),
        ("nothing known", lambda _: {"records": [{"a": 1}]}, "no topk_ids_of_layer"),
        ("floats", topk(lambda t: t.float()), "is float32, and expert ids are int32"),
        ("two axes", topk(lambda t: t[0]), r"has the shape \(5, 8\), and 3 axes are due"),
        ("a list of ids", topk(lambda t: t.tolist()), "topk_ids_of_layer is not a plain tensor"),
        ("sparse", topk(lambda t: t.to_sparse()), "is not a plain tensor"),
        ("expanded", topk(lambda t: t[:1].expand(10**9, *t.shape[1:])), "the file does not hold"),
        ("expanded tokens", topk(lambda t: t[:, :1].expand(-1, 10**9, -1)), "the file does not hold"),
        ("a repeated expert", repeated, "token 2 of layers.1 chose one expert twice"),
        ("an expert too many", beyond, "token 2 of layers.1 chose expert 16, and there are 16"),
        ("a negative expert", below, "expert -2 was chosen"),
        ("fewer tokens", record(input_ids=[1, 2]), "2 input_ids and picks of 5 tokens"),
        ("text tokens", record(input_ids=["a"] * 5), "input_ids is not a list of whole numbers"),
        ("true tokens", record(input_ids=[True] * 5), "input_ids is not a list of whole numbers"),
        ("huge tokens", record(input_ids=[10**30] * 5), "input_ids is not a list of whole numbers"),
        ("no tokens", record(input_ids=None), "no input_ids"),
        ("positions", record(positions=[1]), "1 positions and picks of 5 tokens"),
        ("lengths", record(extend_seq_lens=[3, 3]), "extend_seq_lens do not add up to the 5 input_ids"),
        ("many lengths", record(extend_seq_lens=[5] + [0] * 9), "extend_seq_lens do not add up"),
        ("rank", record(rank=-1), "forward_pass_id, rank and forward_mode must be whole numbers"),
        ("mode", record(forward_mode=None), "forward_pass_id, rank and forward_mode must be whole numbers"),
        ("nine ids", topk(lambda t: torch.cat([t, t], -1)), "num_experts_per_tok=4 in the config"),
        ("nothing chosen", topk(lambda t: torch.full_like(t, -1)), "the record holds no picks"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*sparse tensor")  # torch 2.11 and 2.15 warn of checks
@pytest.mark.parametrize(("damage", "message"), cases(broken_sglang()))
def test_a_damaged_sglang_dump_is_refused_in_one_line(tmp_path, damage, message):
    torch.save(damage(sglang_record(picked(5))), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        READERS["sglang"]([tmp_path / "a.pt"], KNOWN)


def test_sglang_maps_that_do_not_fit_are_refused(tmp_path):
    record = [sglang_record(picked(5))]
    for to_logical, message in (
        (torch.arange(8).expand(L, 8).contiguous(), "the dump is of 8 experts .*, and 16 were given"),
        (torch.arange(E).expand(2, E).contiguous(), "does not fit 5 layers"),
        (torch.full((L, E), 15) - torch.arange(E) * 2, "does not fit 5 layers"),
        (torch.zeros(L, E), "is float32"),
        (torch.arange(E).expand(L, E), "that the file does not hold"),
    ):
        file = sglang_dump(tmp_path / "a.pt", record, to_logical)
        if "not hold" in message:  # torch.save keeps the stride of 0
            assert torch.load(file)["last_physical_to_logical_map"].stride(0) == 0
        with pytest.raises(ValueError, match=message):
            READERS["sglang"]([file], KNOWN)
    two = [
        sglang_dump(tmp_path / "a.pt", record),
        sglang_dump(tmp_path / "b.pt", record, torch.arange(E).flip(0).repeat(L, 1)),
    ]
    assert "different maps of experts" in refused("sglang", two)


def test_sglang_bombs_are_refused_before_memory_is_used(tmp_path):
    record = sglang_record(picked(200))
    torch.save({"records": [record] * 1000}, tmp_path / "shared.pt")
    assert (tmp_path / "shared.pt").stat().st_size < 100_000
    assert "its records share their tensors" in refused("sglang", [tmp_path / "shared.pt"])
    with zipfile.ZipFile(sglang_dump(tmp_path / "a.pt", [record])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert "a compressed or overfull archive" in refused("sglang", [tmp_path / "deflated.pt"])
