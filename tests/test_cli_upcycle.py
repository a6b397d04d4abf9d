"""`moesaic upcycle`: a whole folder with the same output, or one line and nothing."""

import json
import shutil

import pytest
import torch
import transformers as hf
from commands import runner
from dense_models import dense, ids, logits

from moesaic.cli.upcycle import upcycle
from moesaic.hf.load import TINY


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys, upcycle=upcycle)


@pytest.fixture
def folder(tmp_path, capsys):
    dense().bfloat16().save_pretrained(tmp_path / "dense")
    shutil.copy(TINY / "tokenizer.json", tmp_path / "dense")
    (tmp_path / "dense" / "LICENSE").write_text("as you like")
    (tmp_path / "dense" / "training.json").write_text("{}")
    capsys.readouterr()  # the progress of saving
    return tmp_path


def test_the_command_writes_a_folder_that_plain_transformers_loads(run, folder):
    code, out, _ = run("upcycle", folder / "dense", "--out", folder / "new" / "moe", "--experts", 4, "--granularity", 2)
    assert code == 0
    assert "Qwen3ForCausalLM -> Qwen3MoeForCausalLM: 3 layers of 8 experts, top 4" in out
    assert "output: the same" in out
    lines = out.splitlines()
    at = lines.index("Next:")
    moe = folder / "new" / "moe"
    assert [line.split("  ")[1].strip() for line in lines[at + 1 : at + 3]] == [
        f"moesaic trace {moe} --corpus --detail scores", f"moesaic check {moe}",
    ]  # fmt: skip
    assert lines[at + 4].startswith("Reproduce: moesaic upcycle")
    assert lines[at + 5].startswith("with moesaic ")
    assert "seed 0, config " in lines[at + 5]
    loaded = (hf.AutoModelForCausalLM.from_pretrained(folder / part, dtype="auto") for part in ("dense", "new/moe"))
    before, after = loaded
    assert after.dtype == torch.bfloat16
    tokens = ids()
    expected = logits(before, tokens).float()
    assert ((logits(after, tokens) - expected).abs().amax(-1).median() / expected.abs().max()) < 0.02
    there = {file.name for file in (folder / "new" / "moe").iterdir()}
    assert there == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert [file.name for file in (folder / "new").iterdir()] == ["moe"]


def test_the_command_speaks_chinese_and_says_when_the_output_is_another(run, folder):
    code, out, _ = run("upcycle", folder / "dense", "--out", folder / "moe", "--noise", 0.5, "--lang", "zh")
    assert code == 0
    assert "3 层，每层 8 个专家，取 2 个" in out
    assert "输出：已改变" in out
    assert f"moesaic check {folder / 'moe'} --lang zh" in out


def test_the_command_says_as_json_what_it_made(run, folder):
    code, out, _ = run("upcycle", folder / "dense", "--out", folder / "moe", "--noise", 0.5, "--seed", 3, "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["layers"], said["experts"], said["top_k"]) == (3, 8, 2)
    assert said["options"]["noise"] == 0.5
    assert said["parameters"] > said["dense_parameters"]


def test_the_command_refuses_in_one_line_and_leaves_nothing(run, folder):
    def refused(*arguments):
        code, out, err = run("upcycle", *arguments, "--out", folder / "moe")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert not (folder / "moe").exists()
        return err

    assert "no config.json there" in refused(folder)
    assert "granularity=7 does not cut the width 48" in refused(folder / "dense", "--granularity", 7)
    assert "is an MoE model already" in refused(TINY)
    (folder / "dense" / "model.safetensors").write_bytes(b"cut")
    assert "the model cannot be loaded" in refused(folder / "dense")
    (folder / "dense" / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(folder / "dense")
    assert [file.name for file in folder.iterdir()] == ["dense"]
    code, _, err = run("upcycle", folder / "dense", "--out", folder / "dense")
    assert (code, "is there already: give a new folder" in err) == (2, True)


def test_a_disk_that_is_full_leaves_no_half_a_folder(run, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    code, _, err = run("upcycle", folder / "dense", "--out", folder / "moe")
    assert code == 2
    assert "cannot be written (No space left on device)" in err
    assert [file.name for file in folder.iterdir()] == ["dense"]


def test_weights_that_do_not_fit_the_config_are_named_with_both_shapes(run, folder):
    path = folder / "dense" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    code, _, err = run("upcycle", folder / "dense", "--out", folder / "moe")
    assert code == 2
    assert err.count("\n") == 1
    wide, hidden = config["intermediate_size"], config["hidden_size"]
    assert f"is {[hidden, wide]} in the weights and {[hidden, wide + 8]} by config.json, and others differ too" in err
    assert not (folder / "moe").exists()
