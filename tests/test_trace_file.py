"""The file of a trace, format 1: what is written is read, any reader can read it, and nothing unlawful is let in."""

import dataclasses
import errno
import hashlib
import json
import math
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import configs, v3
from hypothesis import assume, event, given
from hypothesis import strategies as st
from safetensors import safe_open
from traces import assert_equal, made

from moesaic.trace import store
from moesaic.trace.file import parts, writer
from moesaic.trace.file.reader import load
from moesaic.trace.store import Trace


def full(n_tokens=12, **fields) -> Trace:
    """A trace that has everything a trace can have."""
    trace = made(
        v3(16, 4, 2, 4), n_tokens, sequences=torch.arange(n_tokens) // 5, input_ids=torch.arange(n_tokens) + 70_000,
        labels=("诗", "a\x1b[31m", "c"), model="tiny",
    )  # fmt: skip
    offsets = torch.stack([torch.arange(n_tokens), torch.arange(n_tokens) + 3], dim=1)
    phases = (torch.arange(n_tokens) % 2).to(torch.uint8)
    more = {"phases": phases, "offsets": offsets, "pieces": {3: "专", 70_000: "\udc80\n"}, "seed": 7}
    more |= {"origins": ("experts", "router"), "missing": ("layers.9",)}
    return dataclasses.replace(trace, **{**more, **fields})


@given(
    configs(), st.integers(0, 20), st.integers(1, 3), st.integers(0, 99),
    st.booleans(), st.sampled_from(["", "模型 “x”\n"]),
)  # fmt: skip
def test_a_trace_written_and_read_is_equal(tmp_path_factory, config, n_tokens, layers, seed, with_ids, model):
    path = tmp_path_factory.mktemp("trace") / "run.safetensors"
    trace = made(config, n_tokens, layers, seed)
    trace = dataclasses.replace(
        trace, model=model, seed=seed, sequences=torch.arange(n_tokens) // 5, labels=tuple("诗abc"),
        input_ids=torch.arange(n_tokens) if with_ids else None,
    )  # fmt: skip
    trace.save(path)
    assert_equal(load(path), trace)
    for less in ({"logits": None, "bias": None, "labels": None}, {"logits": None, "weights": None}):
        part = dataclasses.replace(trace, **less)
        part.save(path)
        assert_equal(load(path), part)


TEXTS = st.text(max_size=6)
ODD_TEXTS = st.one_of(  # halves of pairs, alone and together; lengths around the limit
    st.text(st.characters(codec=None, categories=["Cs", "Cc"]), max_size=3),
    st.integers(4094, 4098).map(lambda n: "x" * n),
)
ODD_NUMBERS = st.sampled_from([-1, 2**24 - 1, 2**24, 2**48, 2**63 - 1])


@st.composite
def traces_of_any_kind(draw):
    """Fields that the constructor lets through; now and then, in any of them, what no reader takes."""

    def text():
        return draw(ODD_TEXTS if draw(st.integers(0, 19)) == 7 else TEXTS)

    def numbers(most=3):
        odd = draw(st.integers(0, 19)) == 7
        found = draw(st.lists(st.integers(0, most), min_size=n_tokens, max_size=n_tokens))
        return torch.tensor([draw(ODD_NUMBERS) if odd else number for number in found], dtype=torch.int64)

    n_tokens, n_layers, k = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_experts = draw(st.sampled_from([4, 4, 4, 300, 1 << 17]))
    floats = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    less = draw(st.sets(st.sampled_from(["input_ids", "weights", "offsets", "labels", "pieces", "phases"])))
    fields = {
        "picks": torch.randint(0, 5, (n_layers, n_tokens, k)).to(torch.int16),
        "configs": (v3(n_experts, 1, 1, k),) * n_layers, "sequences": numbers(), "input_ids": numbers(),
        "layers": tuple(f"{text()}{i if draw(st.integers(0, 9)) else ''}" for i in range(n_layers)),
        "weights": torch.rand(n_layers, n_tokens, k).to(floats),
        "offsets": torch.stack([numbers(3), numbers(9) + 3], 1), "phases": numbers(1).clamp(0, 2).to(torch.uint8),
        "labels": tuple(text() for _ in range(draw(st.integers(3, 5)))), "missing": (text(),), "model": text(),
        "pieces": {draw(st.one_of(st.integers(0, 9), ODD_NUMBERS)): text() for _ in range(2)},
        "seed": draw(st.one_of(st.none(), st.integers(0, 99), st.sampled_from([2**64, np.int64(3), True]))),
        "versions": {1 if draw(st.integers(0, 19)) == 7 else text(): text()},
        "dtypes": {"logits": "float32", "weights": draw(st.sampled_from(["float16", "float32", "float8_e4m3fn"]))},
    }  # fmt: skip
    return {name: value for name, value in fields.items() if name not in less}


@given(traces_of_any_kind())
def test_whatever_save_accepts_load_reads_back_equal_and_the_rest_is_refused_and_leaves_nothing(
    tmp_path_factory, fields
):
    path = tmp_path_factory.mktemp("law") / "run.safetensors"
    try:
        trace = Trace(**fields)
    except ValueError:
        assume(False)
    try:
        trace.save(path)
    except ValueError as error:
        refusal = str(error)
    else:
        event("accepted")
        weights = None if trace.weights is None else trace.weights.float()
        assert_equal(load(path), dataclasses.replace(trace, weights=weights))
        return
    assert refusal.startswith(f"{path}: not written, since no reader would take it: ")
    assert refusal.isprintable()
    assert not any(path.parent.iterdir())


UNREADABLE = [
    ({"labels": ("x" * 4097, "b", "c")}, "a label is not a text of at most 4096 characters"),
    ({"pieces": {-1: "x"}}, "pieces are by vocabulary id, not by '-1'"),
    ({"pieces": {1: "x" * 4097}}, "a piece is not a text of at most 4096"),
    ({"layers": ("a", "a")}, "two layers have the same name"),
    ({"weights": torch.ones(2, 12, 4).double()}, "float64 does not fit a trace: give float32"),
    ({"weights": torch.ones(2, 12, 4).long()}, "weights are whole numbers: give the other kind"),
    ({"seed": 1 << 64}, "seed=18446744073709551616 is not a whole number of 64 bits"),
    ({"seed": np.int64(3)}, "int64 is not JSON serializable: give Python's own numbers"),
    ({"versions": {1: "x"}}, "versions would read back as something else"),
    ({"model": "\ud83d\ude00"}, "model would read back as something else"),
    ({"dtypes": {"logits": "float32", "weights": "int8"}}, "dtypes must name logits and weights"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), UNREADABLE, ids=[message[:40] for _, message in UNREADABLE])
def test_what_no_reader_would_take_is_not_written(tmp_path, fields, message):
    path = tmp_path / "run.safetensors"
    with pytest.raises(ValueError, match=message) as caught:
        full(**({"labels": None} | fields)).save(path)
    assert str(caught.value).startswith(f"{path}: not written, since no reader would take it: ")
    assert not any(tmp_path.iterdir())


def test_a_header_longer_than_is_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MOST_HEADER", 100)
    with pytest.raises(ValueError, match=r"its names, labels and pieces take [\d,]+ bytes: at most 100 are read"):
        full().save(tmp_path / "run.safetensors")


def test_everything_a_trace_can_have_is_written_and_read(tmp_path):
    trace = full()
    trace.save(tmp_path / "run.safetensors")
    assert_equal(load(tmp_path / "run.safetensors"), trace)


def test_the_public_load_is_the_reader(tmp_path):
    full().save(tmp_path / "run.safetensors")
    import moesaic as ms

    assert_equal(ms.load(tmp_path / "run.safetensors"), full())


def test_any_safetensors_reader_reads_the_tensors(tmp_path):
    trace = full()
    trace.save(tmp_path / "run.safetensors")
    with safe_open(tmp_path / "run.safetensors", framework="np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    for name, array in trace.to_arrays().items():
        assert np.array_equal(found[name], array), name
    assert {name: array.dtype.name for name, array in found.items()} == {
        "picks": "uint8", "weights": "float32", "logits": "float32", "bias": "float32", "input_ids": "int32",
        "sequences": "uint8", "phases": "uint8", "offsets": "uint8",
    }  # fmt: skip
    assert [layer["origin"] for layer in about["layers"]] == ["experts", "router"]
    assert about["configs"][0]["hash"] == trace.configs[0].digest()


@pytest.mark.parametrize(("n_experts", "stored"), [(255, "U8"), (256, "I16"), (300, "I16"), (40_000, "I32")])
def test_ids_take_the_narrowest_type_that_holds_them(tmp_path, n_experts, stored):
    picks = torch.full((1, 3, 1), n_experts, dtype=torch.int32)  # the id that means "no expert"
    trace = Trace(picks=picks, layers=("a",), configs=(v3(n_experts, 1, 1, 1),), sequences=torch.zeros(3).long())
    trace.save(tmp_path / "run.safetensors")
    with safe_open(tmp_path / "run.safetensors", framework="np") as file:
        assert file.get_slice("picks").get_dtype() == stored
    assert torch.equal(load(tmp_path / "run.safetensors").picks.int(), picks)


@pytest.mark.parametrize("n_experts", [64, 256])
def test_picks_of_26_layers_take_at_most_8_and_a_half_bytes_a_token_and_layer(tmp_path, n_experts):
    n_tokens, layers = 100_000, 26
    config = v3(n_experts, 1, 1, 8)
    trace = Trace(
        picks=torch.randint(n_experts, (layers, n_tokens, 8), dtype=torch.int16),
        layers=tuple(f"model.layers.{i}.mlp" for i in range(layers)), configs=(config,) * layers,
        sequences=torch.arange(n_tokens) // 100, input_ids=torch.randint(129_000, (n_tokens,)),
    )  # fmt: skip
    path = tmp_path / "run.safetensors"
    trace.save(path)
    assert path.stat().st_size <= 8.5 * n_tokens * layers
    assert torch.equal(load(path).picks, trace.picks)


@pytest.mark.parametrize("less", [{}, {"logits": None}, {"logits": None, "weights": None, "phases": None}])
@pytest.mark.parametrize("sizes", [(12,), (5, 0, 7), (1,) * 12])
def test_written_in_pieces_it_is_the_same_file_byte_for_byte(tmp_path, sizes, less, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", 7)
    trace = full(**less)
    trace.save(tmp_path / "whole.safetensors")
    path, columns = tmp_path / "pieces.safetensors", {}
    (tmp_path / "parts").mkdir()
    for name in store.TENSORS:
        if name == "bias" or (tensor := getattr(trace, name)) is None:
            continue
        of_layers = name in ("picks", "weights", "logits")
        rows = {f"{name}.{i}": layer for i, layer in enumerate(tensor)} if of_layers else {name: tensor}
        kept = {file: parts.Part(tmp_path / "parts" / file, path) for file in rows}
        for file, part in kept.items():
            for piece in rows[file].split(sizes):
                part.append(piece)
        columns[name] = parts.joined(list(kept.values()), tuple(tensor.shape))
    columns["bias"] = parts.of_tensor(trace.bias)
    writer.write(path, {name: columns[name] for name in store.TENSORS if name in columns}, trace)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_narrow_floats_in_pieces_are_widened(tmp_path):
    part, rows = parts.Part(tmp_path / "weights", tmp_path / "run.safetensors"), torch.randn(5, 4).bfloat16()
    for piece in rows.split(2):
        part.append(piece)
    column = parts.joined([part], (5, 4))
    assert column.dtype == "F32"
    assert torch.equal(torch.from_numpy(np.concatenate(list(column.blocks()))).view(5, 4), rows.float())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    first, second = made(v3(8, 1, 1, 2)), made(v3(8, 1, 1, 2), seed=1)
    first.save(path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(ValueError, match=r"run.safetensors: cannot be written \(No space left on device\)"):
            second.save(path)
    assert_equal(load(path), first)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    second.save(path)
    assert_equal(load(path), second)
    with pytest.raises(ValueError, match="cannot be written"):
        first.save(tmp_path / "nowhere" / "run.safetensors")


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


def test_files_that_are_no_trace_are_refused_in_one_line(tmp_path):
    path = tmp_path / "run.safetensors"
    refused(path, "no such file")
    refused(tmp_path, "is a folder: give the .safetensors of a trace .`moesaic trace` makes one of a model")
    path.write_bytes(b"")
    refused(path, r"not a whole safetensors file \(")
    path.write_bytes(b"PK\x03\x04" * 9)
    refused(path, r"not a whole safetensors file \(")
    from safetensors.torch import save_file

    save_file({"picks": torch.zeros(1)}, path)
    refused(path, "a safetensors file, but not a recorded trace")


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    def forbidden(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "run.safetensors"
    full().save(path)
    monkeypatch.setattr(Path, "open", forbidden)
    refused(path, r"cannot be read \(Permission denied\)")


def header_of(path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path, header, data: bytes) -> None:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def tensor(name, **entries):
    return lambda file: file.header[name].update(entries)


def said(**entries):
    return lambda file: file.about.update(entries)


def meta(**entries):
    return lambda file: file.header["__metadata__"].update(entries)


def layer(**entries):
    return lambda file: file.about["layers"][0].update(entries)


def fields(**entries):
    return lambda file: file.about["configs"][0]["fields"].update(entries)


def data(new):
    return lambda file: setattr(file, "data", new)


def extra_tensor(file):
    file.header["\x1b[2J"] = file.header["picks"]


def another_name(file):
    file.header["\x1b[2J"] = file.header.pop("offsets")


def no_picks(file):
    begin, end = file.header["sequences"]["data_offsets"]
    for name in file.header.keys() - {"__metadata__", "sequences"}:
        del file.header[name]
    file.header["sequences"]["data_offsets"], file.data = [0, end - begin], file.data[begin:end]


def no_about(file):
    file.about.clear()
    del file.header["__metadata__"]["about"]


def last_tensor(file):
    return max((e for name, e in file.header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])


def a_gap(file):
    last = last_tensor(file)
    last["data_offsets"] = [8 + number for number in last["data_offsets"]]
    file.data += b"\0" * 8


def more_than_needed(file):
    last_tensor(file)["data_offsets"][1] += 8
    file.data += b"\0" * 8


def two_sizes(file):
    other = v3(8, 4, 2, 4)
    file.about["configs"].append({"hash": other.digest(), "fields": other.to_dict()})
    file.about["layers"][1]["config"] = 1


def too_many(file):
    huge = v3(1 << 20, 4, 2, 4)
    file.about["configs"][0] = {"hash": huge.digest(), "fields": huge.to_dict()}


def no_layers(file):
    del file.about["layers"]


ATTACKS = [
    *((change, r"not a whole safetensors file \(") for change in (  # its own words follow
        tensor("picks", shape=[2, 12, 5]), tensor("picks", shape=[2, 12]), tensor("picks", shape=[2, -12, -4]),
        tensor("picks", shape=[True, 12, 8]), tensor("picks", shape=[1 << 60, 1 << 60, 4]),
        tensor("picks", shape=[1 << 47, 0, 4], data_offsets=[0, 0]), tensor("picks", dtype="F32"),
        tensor("weights", dtype="F16"), tensor("picks", dtype=["U8"]), tensor("weights", data_offsets=[0, 384]),
        tensor("picks", data_offsets=[0]), data(b"short"), data(b"\0" * 99_999), a_gap, more_than_needed, extra_tensor,
        meta(format_version=1),
    )),
    (tensor("picks", shape=[4, 24]), r"picks of the trace have shape \(4, 24\): three axes are due"),
    (tensor("weights", shape=[4, 24]), r"weights of the trace has shape \(4, 24\), not \(2, 12, 4\)"),
    (tensor("logits", shape=[2, 16, 12]), r"logits of the trace has shape \(2, 16, 12\), not \(2, 12, 16\)"),
    (tensor("picks", dtype="I8"), "picks has the type 'I8': U8 or I16 or I32 or I64 is allowed"),
    (tensor("phases", dtype="I8"), "phases has the type 'I8': U8 is allowed"),
    (tensor("input_ids", dtype="F32"), "input_ids has the type 'F32'"),
    (tensor("weights", dtype="I32"), "weights has the type 'I32'"),
    (tensor("picks", more=1), "'picks' is not described by dtype, shape and data_offsets"),
    (another_name, r"holds a tensor '\\x1b\[2J', which a trace does not have"),
    (no_picks, "picks is missing"),
    (two_sizes, "its layers differ in experts or experts per token"),
    (too_many, "4 of 1048576 experts a token: at most 1024 of 65536 are read"),
    (no_about, "about is missing"),
    (meta(format="other"), "not a recorded trace"),
    (meta(format_version="x"), "format_version is not a whole number"),
    (meta(format_version="٣"), "format_version is not a whole number"),
    (meta(format_version="99"), "trace format 99 is newer than 1, which moesaic .* reads: update moesaic"),
    (meta(format_version="0"), "trace format 0 was a draft of 1: record it again"),
    (no_layers, "about lacks 'layers'"),
    (said(more=1), "about has an unknown 'more'"),
    (said(layers=[]), "there is no layer"),
    (said(layers={}), "layers is not a list"),
    (layer(name="layers.1"), "two layers have the same name"),
    (layer(name=3), "the name of a layer is not a text"),
    (layer(name="x" * 5000), "the name of a layer is not a text of at most 4096"),
    (layer(config=7), "a layer names config '7': there are 1"),
    (layer(config=-1), "a layer names config '-1'"),
    (layer(origin="guessed"), "a layer has the origin 'guessed'"),
    (fields(n_routed_experts=0), "a config is not lawful"),
    (fields(n_routed_experts="16"), "a config is not lawful"),
    (fields(n_routed_experts=10**12 + 1, n_group=2), "a config is not lawful"),
    (fields(surprise=1), "a config is not lawful"),
    (fields(**{"\x1b[2J": 1}), r"a config is not lawful .*\\x1b\[2J"),
    (fields(routed_scaling_factor=3.5), "a config has the hash"),
    (said(labels=["one"]), "1 labels for 3 sequences"),
    (said(labels="abc"), "labels is not a list"),
    (said(labels=[1, 2, 3]), "a label is not a text"),
    (said(missing=[None]), "a missing layer is not a text"),
    (said(pieces={"-1": "x"}), "pieces are by vocabulary id, not by '-1'"),
    (said(pieces={"01": "x"}), "pieces are by vocabulary id, not by '01'"),
    (said(pieces={"1": 2}), "a piece is not a text"),
    (said(dtypes={"logits": "float32"}), "dtypes must name logits and weights"),
    (said(dtypes={"logits": "float32", "weights": "__import__"}), "dtypes must name logits and weights"),
    (said(model=None), "model is not a text"),
    (said(seed=1 << 70), "seed=1180591620717411303424 is not a whole number of 64 bits"),
    (said(seed=True), "seed=True is not a whole number"),
    (said(versions=["x"]), "versions is not a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ATTACKS, ids=[message[:40] for _, message in ATTACKS])
def test_a_header_that_lies_is_refused_and_named(tmp_path, change, message):
    path = tmp_path / "run.safetensors"
    full().save(path)
    rewrite_by(path, change)
    refused(path, message)


def rewrite_by(path, change):
    header, numbers = header_of(path)
    file = SimpleNamespace(header=header, about=json.loads(header["__metadata__"]["about"]), data=numbers)
    change(file)
    if file.about:
        header["__metadata__"]["about"] = json.dumps(file.about)
    rewrite(path, header, file.data)


def test_a_config_written_before_a_field_was_there_has_its_default(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)

    def older(file):
        (config,) = file.about["configs"]
        del config["fields"]["swiglu_up_offset"]
        config["hash"] = hashlib.sha256(json.dumps(config["fields"], sort_keys=True).encode()).hexdigest()[:12]

    rewrite_by(path, older)
    assert_equal(load(path), full())


def test_json_that_readers_disagree_on_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)
    header, data = header_of(path)
    text = json.dumps(header)
    twice = json.dumps({"picks": header["picks"]})[:-1]
    rewrite(path, text.replace('{"__metadata__"', f'{twice}, "__metadata__"').encode(), data)
    refused(path, "the header has the key 'picks' twice")
    about = header["__metadata__"]["about"]
    for inner, message in (
        (about[:-1] + ', "model": "x"}', "about has the key 'model' twice"),
        (about.replace('"seed": 7', '"seed": NaN'), "about holds NaN, which is not JSON"),
        ("[" * 100_000, "about is not JSON"),
        ("9" * 10_000, "about holds a number that is too long"),
        (about[:-9], "about is not JSON, or cut short"),
        ("[]", "about is not a JSON object"),
    ):
        rewrite(path, {**header, "__metadata__": {**header["__metadata__"], "about": inner}}, data)
        refused(path, message)
    rewrite(path, b"\xff\xfe{}", data)
    refused(path, r"not a whole safetensors file \(")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("picks", 17, r"picks reach from \d+ to 17: 0 to 16 is allowed"),
        ("phases", 2, "phases reach from 0 to 2: 0 to 1 is allowed"),
        ("sequences", 200, "3 labels for 201 sequences"),
        ("offsets", 250, "offsets end before they begin"),
    ],
)
def test_numbers_out_of_range_are_refused_and_named(tmp_path, name, value, message):
    path = tmp_path / "run.safetensors"
    full().save(path)
    header, data = header_of(path)
    where = header[name]["data_offsets"][0]
    rewrite(path, header, data[:where] + bytes([value]) + data[where + 1 :])
    refused(path, message)


def test_a_number_is_in_range_before_it_is_narrowed(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)

    def wide(file):  # 65536 would be 0 as int16
        begin, end = file.header["picks"]["data_offsets"]
        picks = np.frombuffer(file.data[begin:end], np.uint8).astype("<i8")
        picks[0] = 1 << 16
        for name, entry in file.header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [at + 7 * len(picks) for at in entry["data_offsets"]]
        file.header["picks"] |= {"dtype": "I64", "data_offsets": [begin, begin + 8 * len(picks)]}
        file.data = file.data[:begin] + picks.tobytes() + file.data[end:]

    rewrite_by(path, wide)
    refused(path, "picks reach from 1 to 65536: 0 to 16 is allowed")


def test_a_negative_id_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    picks = torch.tensor([[[0, 299]]], dtype=torch.int16)
    Trace(picks=picks, layers=("a",), configs=(v3(300, 1, 1, 2),), sequences=torch.zeros(1).long()).save(path)
    header, data = header_of(path)
    rewrite(path, header, data.replace(struct.pack("<h", 299), struct.pack("<h", -1)))
    refused(path, "picks reach from -1 to 0: 0 to 300 is allowed")


def test_numbers_start_at_multiples_of_eight_and_may_start_anywhere(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    header, data = header_of(path)
    for spaces in range(8):
        rewrite(path, json.dumps(header).encode() + b" " * spaces, data)
        trace = load(path)
        assert_equal(trace, full())
        assert trace.logits.data_ptr() % 4 == 0


def test_a_sequence_number_cannot_ask_for_memory(tmp_path):
    path = tmp_path / "run.safetensors"
    full(sequences=torch.full((12,), (1 << 24) - 1), labels=None).save(path)
    header, data = header_of(path)
    rewrite(path, header, data.replace(struct.pack("<i", (1 << 24) - 1), struct.pack("<i", 1 << 30)))
    refused(path, "sequences reach from 1073741824 to 1073741824: 0 to 16777215 is allowed")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)
    raw = path.read_bytes()
    for length in [*range(64), *range(64, len(raw), 37), len(raw) - 1]:
        path.write_bytes(raw[:length])
        refused(path, ".")


def tried(path) -> tuple[Trace | None, str]:
    try:
        return load(path), ""
    except ValueError as error:
        return None, str(error)


def test_random_damage_is_refused_or_leaves_a_lawful_trace(tmp_path):
    path = tmp_path / "run.safetensors"
    full().save(path)
    raw, rng, lawful = path.read_bytes(), random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 1, 1, 4))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        trace, error = tried(path)
        if trace is None:
            assert error.startswith(f"{path}: ")
            assert error.isprintable()
            continue
        lawful += 1
        assert trace.picks.min() >= 0
        assert trace.picks.max() <= 16
        assert math.prod(trace.weights.shape) == 2 * 12 * 4
    assert 50 < lawful < 1450, "damage in the numbers of weights and logits cannot be seen; most other damage is"


def test_a_drafts_number_is_not_read_as_this_format(monkeypatch, tmp_path):
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(writer, "FORMAT_VERSION", 2)
    full().save(path)
    refused(path, "trace format 2 is newer than 1")
    assert store.FORMAT_VERSION == 1
