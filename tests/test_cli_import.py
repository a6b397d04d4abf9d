"""`moesaic import` as a user meets it."""

import dataclasses
import json

import numpy as np
import pytest
from cases import v3
from commands import runner
from foreign import E, config_file, encoded, megatron_lines, picked, sglang_dump, sglang_record, vllm_array
from traces import made

from moesaic.cli.import_ import FORMATS, import_
from moesaic.cli.output import say_how_again
from moesaic.trace.file.reader import load
from moesaic.trace.imports import READERS


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path)
    sglang_dump(tmp_path / "a.pt", [sglang_record(picked(5))])
    np.save(tmp_path / "prose.npy", vllm_array(picked(5)))
    np.save(tmp_path / "code.npy", vllm_array(picked(4, seed=1)))
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"routed_experts": encoded(vllm_array(picked(5)))}]}))
    (tmp_path / "r.jsonl").write_text("\n".join(megatron_lines(picked(5))))
    return runner(monkeypatch, capsys, import_=import_)


def test_the_formats_of_the_command_are_those_that_are_read():
    assert FORMATS.keys() == READERS.keys()


@pytest.mark.parametrize(
    ("source", "file"), [("sglang", "a.pt"), ("vllm", "prose.npy"), ("vllm", "a.json"), ("megatron", "r.jsonl")]
)
@pytest.mark.parametrize("model", [("--config", "."), ("--config", "config.json"), ("--experts", E)])
def test_a_record_becomes_a_trace_file(run, source, file, model):
    code, out, err = run("import", source, file, *model, "-o", "x.safetensors")
    assert (code, err) == (0, "")
    trace = load("x.safetensors")
    assert np.array_equal(trace.picks.numpy(), picked(5))
    assert set(trace.origins) == {"imported"}
    assert trace.configs[0].rule_is_known == (model[0] == "--config")
    assert "4 MoE layers, top 4 of 16 experts" in out
    assert "5 tokens of 1 document" in out
    assert "moesaic stats x.safetensors" in out
    assert f"Reproduce: moesaic import {source} {file}" in out
    assert "moesaic steps" not in out, "nothing can be derived from ids alone"
    assert ("not known here" in out) == (model[0] == "--experts")


def test_files_are_labels_and_json_is_json(run):
    code, out, err = run("import", "vllm", "prose.npy", "code.npy", "--config", ".", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found)[:4] == ["moesaic", "torch", "command", "records"]
    assert found["command"] == "moesaic import vllm prose.npy code.npy --config . --json"
    assert [record["file"] for record in found["records"]] == ["run.safetensors"]
    assert found["labels"] == {"prose": 1, "code": 1}
    assert (found["format"], found["tokens"], found["documents"], found["detail"]) == ("vllm", 9, 2, "ids")
    assert found["notes"] == []
    assert load("run.safetensors").labels == ("prose", "code")


@pytest.mark.parametrize(("lang", "said"), [("en", "! every micro-batch"), ("zh", "! 每个 rank 的每个 micro-batch")])
def test_what_a_record_lacks_is_said_in_both_languages(run, lang, said):
    code, out, _ = run("import", "megatron", "r.jsonl", "--config", ".", "--lang", lang)
    assert code == 0
    assert said in out
    as_json = json.loads(run("import", "megatron", "r.jsonl", "--config", ".", "--lang", lang, "--json")[1])
    assert as_json["notes"][0] == said[2:] + as_json["notes"][0][len(said) - 2 :]


def test_a_terminal_is_shown_how_many_files_are_read(run, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    err = run("import", "vllm", "prose.npy", "code.npy", "--config", ".")[2]
    assert "Reading files" in err
    assert "100%" in err
    assert run("import", "vllm", "prose.npy", "--config", ".", "--json")[2] == ""


MISTAKES = {
    "unknown format": (["npz", "a.pt", "--experts", "16"], "FORMAT 'npz' is unknown: use one of sglang ("),
    "no model": (["vllm", "prose.npy"], "the largest id in a record is not the number of experts: give --config"),
    "two models": (["vllm", "prose.npy", "--config", ".", "--experts", "16"], "one of them"),
    "unknown preset": (["vllm", "prose.npy", "--config", "gpt-5"], "--config gpt-5: neither a file"),
    "another model": (
        ["vllm", "prose.npy", "--config", "mixtral"],
        "num_experts_per_tok=2 in the config, and the record holds 4 ids",
    ),
    "no experts": (["vllm", "prose.npy", "--experts", "0"], "Invalid value for '--experts'"),
    "missing file": (["vllm", "nowhere.npy", "--experts", "16"], "nowhere.npy: no such file"),
    "a file twice": (["vllm", "prose.npy", "prose.npy", "--experts", "16"], "prose.npy is given twice"),
    "no files": (["vllm"], "Missing argument 'FILE...'"),
    "wrong format": (["sglang", "prose.npy", "--experts", "16"], "prose.npy: not a file of torch.save"),
    "language": (["vllm", "prose.npy", "--experts", "16", "--lang", "fr"], "--lang 'fr' is unknown"),
    "out is a folder": (["vllm", "prose.npy", "--experts", "16", "-o", "."], "is a folder: give the name of a file"),
    "out is no trace": (
        ["vllm", "prose.npy", "--experts", "16", "-o", "r.jsonl"],
        "is there already and is no whole trace",
    ),
    "out is nowhere": (["vllm", "prose.npy", "--experts", "16", "-o", "no/x"], "--out no/x: cannot be written"),
    "out is the record": (["vllm", "prose.npy", "--experts", "16", "-o", "prose.npy"], "is one of the files to read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(run, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run("import", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_only_sizes_are_known_no_config_is_named(run):
    """The config in the trace has a hidden size and an activation that nobody told."""
    _, out, _ = run("import", "vllm", "prose.npy", "--experts", "16")
    assert out.endswith(", no config: only sizes are known\n")
    assert "with moesaic " in out
    assert run("import", "vllm", "prose.npy", "--experts", "16", "--lang", "zh")[1].endswith("，没有配置：只知道尺寸\n")
    found = json.loads(run("import", "vllm", "prose.npy", "--experts", "16", "--json")[1])
    assert (found["config"], found["records"][0]["config"]) == (None, None)
    digest = load("run.safetensors").configs[0].digest()
    run("import", "vllm", "prose.npy", "--config", ".")
    assert load("run.safetensors").configs[0].digest() != digest
    told = load("run.safetensors").configs[0].digest()
    assert run("import", "vllm", "prose.npy", "--config", ".")[1].endswith(f", config {told}\n")


def test_a_trace_that_names_no_versions_begins_with_what_it_has(capsys):
    trace = made(v3(16, 4, 2, 4))
    trace = dataclasses.replace(trace, versions={})
    say_how_again(trace, "en")
    assert capsys.readouterr().out.splitlines()[-1] == f"config {trace.configs[0].digest()}"
    say_how_again(dataclasses.replace(trace, seed=3), "en")
    assert capsys.readouterr().out.splitlines()[-1] == f"seed 3, config {trace.configs[0].digest()}"


def test_names_of_files_cannot_steer_a_terminal(run, tmp_path):
    (tmp_path / "evil\x1b[31m.npy").write_bytes((tmp_path / "prose.npy").read_bytes())
    code, out, _ = run("import", "vllm", "evil\x1b[31m.npy", "--config", ".", "-o", "x\x1b[2J.safetensors")
    assert code == 0
    assert "\\x1b[31m" in out.split("Reproduce")[0]
    assert "\x1b" not in out.split("Reproduce")[0]
