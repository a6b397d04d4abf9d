"""`moesaic check`: what it prints, and its exit codes."""

import json
import re
import shutil

import pytest
import typer
from cases import v3
from hf_models import tiny
from safetensors.torch import load_file, save_file
from traces import made
from typer.testing import CliRunner

from moesaic.cli.check import check
from moesaic.conformance import PROBES
from moesaic.conformance.targets import find
from moesaic.hf.added_bias import add_bias
from moesaic.hf.load import TINY
from moesaic.hf.modules import moe_layers

app = typer.Typer()
app.command()(check)

SOUND = """
import torch
def gate(logits, bias, config):
    scores = logits.sigmoid()
    ids = (scores + bias).topk(config.num_experts_per_tok).indices
    weights = scores.gather(-1, ids)
    return ids, config.routed_scaling_factor * weights / (weights.sum(-1, keepdim=True) + 1e-20)
"""
GLM = {"model_type": "glm4_moe", "hidden_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1,
       "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True}  # fmt: skip


def run(*arguments, env=None):
    plain = {"COLUMNS": "160", "TERM": "dumb", **(env or {})}
    return CliRunner().invoke(app, [str(a) for a in arguments], env=plain)


def rows_of(output):
    """Probe -> (level, result) as the table shows them."""
    row = r"^ ([a-z][\w-]+) +(wrong|fragile|错误|脆弱) +(\S+)  "
    return {m[1]: (m[2], m[3]) for m in re.finditer(row, output, re.MULTILINE)}


@pytest.fixture(scope="module")
def shipped():
    return run(TINY)


def test_a_record_or_weights_in_place_of_a_gate_are_called_what_they_are(tmp_path):
    made(v3(8, 2, 2, 2)).save(tmp_path / "run.safetensors")
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    for name, what in (("run", "a record of a run, which moesaic stats judges"), ("model", "a binary file")):
        result = run(str(tmp_path / f"{name}.safetensors"))
        assert isinstance(result.exception, ValueError)
        expected = f"{name}.safetensors is {what}: give a model folder, a config.json, module:Class or a preset"
        assert str(result.exception).endswith(expected)


def test_a_model_folder_conforms_and_its_fragile_points_are_listed(shipped):
    assert shipped.exit_code == 0
    rows = rows_of(shipped.output)
    assert rows.keys() == {probe.id for probe in PROBES}
    assert rows["definition"] == ("wrong", "pass")
    assert rows["bias-cast"] == ("fragile", "FAIL")
    assert rows["softmax-before-mask"] == ("wrong", "-")
    assert ".bfloat16(): 5.0001 becomes 5.0000" in shipped.output
    assert "in production: " in shipped.output
    assert "→ rank by (score, -id)" in shipped.output
    assert "No result differs from the definition." in shipped.output
    assert re.search(r"^\d+ passed, 0 wrong, 7 fragile, 2 not applicable\.$", shipped.output, re.MULTILINE)
    assert "Reproduce: moesaic" in shipped.output


def test_strict_makes_fragile_findings_a_bad_verdict():
    assert run(TINY, "--strict", "--level", "wrong").exit_code == 0
    assert run(TINY, "--strict").exit_code == 1


def test_a_preset_is_our_gate_and_passes_strictly():
    result = run("deepseek-v2", "--strict", "--lang", "zh")
    assert result.exit_code == 0
    assert "moesaic Router, deepseek-v2：160 个专家，取前 6，8 组保留 3 组，softmax" in result.output
    assert "没有任何结果与定义不同。" in result.output
    assert rows_of(result.output)["group-score"] == ("错误", "通过")


def test_json_is_one_strict_document():
    result = run(TINY, "--json", "--level", "wrong")
    document = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(document)[:4] == ["moesaic", "torch", "command", "records"]
    assert document["command"].split()[0] == "moesaic"
    assert document["records"] == []
    assert document["conforms"] is True
    assert document["config"]["n_routed_experts"] == 32
    assert {r["level"] for r in document["results"]} == {"wrong"}
    first = document["results"][0]
    assert first.keys() == {
        "probe", "level", "name", "outcome", "says", "numbers", "story", "advice", "references"
    }  # fmt: skip
    assert first["outcome"] == "pass"


PHI = {
    "model_type": "phimoe", "hidden_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def test_a_gate_whose_rule_is_not_known_is_no_good_verdict(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI))
    result = run(tmp_path, "--level", "wrong")
    assert result.exit_code == 2
    assert "No probe could tell whether it follows its definition." in result.output
    assert "The rule of this family is not known here" in result.output
    assert "No result differs" not in result.output
    as_json = run(tmp_path, "--level", "wrong", "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["conforms"] is None


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module in the current folder, under a name of its own: imports are kept."""

    def write(text):
        name = f"gate_{abs(hash((str(tmp_path), text)))}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        return f"{name}:gate"

    return write


def test_code_in_the_current_folder_is_judged_by_the_rule_that_is_named(code, tmp_path):
    (tmp_path / "glm.json").write_text(json.dumps(GLM))
    target = code(SOUND)
    assert run(target, "--config", tmp_path / "glm.json", "--level", "wrong").exit_code == 0
    assert run(target, "--config", "glm4-moe", "--level", "wrong").exit_code == 0
    by_v3 = run(target, "--json")  # it knows no groups
    assert by_v3.exit_code == 1
    failed = {r["probe"]: r for r in json.loads(by_v3.stdout)["results"] if r["outcome"] == "fail"}
    assert failed["group-score"]["numbers"]["row"] == 0
    assert "one-group" not in failed


def test_what_a_gate_prints_is_kept_out_of_the_result(code):
    loud = "print('imported')\n" + SOUND.replace("    scores =", "    print('I am asked')\n    scores =", 1)
    result = run(code(loud), "--config", "glm4-moe", "--json", "--level", "wrong")
    assert json.loads(result.stdout)["conforms"] is True
    assert result.stderr.count("imported") == 1
    assert result.stderr.count("I am asked") > 20
    assert "I am asked" not in run(code(loud), "--config", "glm4-moe", "--level", "wrong").stdout


def test_a_terminal_is_shown_which_probe_is_asked_and_a_pipe_nothing():
    assert run("classic").stderr == ""
    shown = run("classic", env={"TTY_COMPATIBLE": "1", "TERM": "xterm"})
    assert shown.exit_code == 0
    assert "bias-steady" in shown.stderr


@pytest.mark.parametrize(
    "error", ["ValueError('n_group must be 3,\\n  not 8')", "RuntimeError('n_group must be 3,\\n  not 8')"]
)
def test_what_a_class_says_when_it_cannot_be_built_is_told_whole(code, error):
    target = code(
        f"import torch\nclass gate(torch.nn.Module):\n    def __init__(self, config):\n        raise {error}\n"
    )
    told = str(run(target).exception)
    assert told.startswith(f"gate: cannot be built ({error[: error.index('(')]}: n_group must be 3, not 8): ")


def test_a_failing_gate_is_told_what_to_do(code):
    target = code(SOUND.replace("scores.gather", "(scores + bias).gather"))
    result = run(target, "--config", "glm4-moe", "--lang", "zh")
    assert result.exit_code == 1
    assert rows_of(result.output)["biased-weight"] == ("错误", "失败")
    assert "→ 从不带偏置的分数里取权重" in result.output
    assert "在合法输入上结果与定义不同" in result.output


def test_names_and_messages_of_foreign_code_cannot_steer_the_terminal(code):
    spoiled = "    if not len(logits):\n        raise ValueError('\\x1b[31m[bold]red')\n    scores ="
    target = code(SOUND.replace("    scores =", spoiled, 1) + "gate.__qualname__ = 'a\\x1b[1m'\n")
    result = run(target)
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "the gate raised ValueError: \\x1b[31m[bold]red" in result.output
    assert "a\\x1b[1m: 256 experts" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder, file or preset: give a model folder, a config.json, module:Class"),
        (["nowhere:Gate"], "nowhere:Gate: cannot be imported .ModuleNotFoundError: No module named 'nowhere'"),
        (["math:nope"], "math:nope: cannot be imported .AttributeError: module 'math' has no attribute 'nope'"),
        (["math:pi"], "a float is no gate: give a module, a class or a function"),
        (["torch.nn:Bilinear"], "Bilinear: cannot be built .TypeError: Bilinear.__init__.. missing 2 required"),
        (["pathlib:Path"], "Path is no torch.nn.Module: give one, or a function"),
        (["math:pi", "--config", "nowhere"], "--config nowhere: no such file or folder"),
        (["gate.py"], "gate.py is a file of code: name the gate in it, as gate:Gate"),
        (["deepseek-v3", "--layer", "0"], "--layer 0 is for a model: deepseek-v3 is one gate, leave --layer out"),
        (["math:floor", "--layer", "3"], "--layer 3 is for a model: math:floor is one gate"),
        (["math:floor"], "floor cannot be asked: on plain logits it raised TypeError: math.floor.. takes exactly one"),
        (["deepseek-v3", "--lang", "fr"], "--lang 'fr' is unknown"),
        (["deepseek-v3", "--level", "bad"], "--level 'bad' is unknown: use wrong or fragile"),
        (["deepseek-v3", "--config", "mixtral"], "--config 'mixtral' is for module:Class"),
        ([TINY, "--layer", "9"], "layer=9 is not there: use 0 to "),
    ],
)
def test_what_cannot_be_judged_is_a_users_mistake(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "not a model folder: it has no config.json: give a model folder or a config.json"),
        ("{", "not JSON, or cut short"),
        ("[]", "not a JSON object"),
        ('{"hidden_size": 4}', "names no model_type"),
        ('{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}', "not an MoE"),
        ('{"model_type": "no_such_family"}', "no model can be built"),
        ('{"model_type": "mixtral", "hidden_size": "x"}', "Field 'hidden_size' expected int, got str"),
        ('{"model_type": ["mixtral"]}', "no model can be built"),
        (
            '{"model_type": "mixtral", "num_local_experts": 1000000000000, "hidden_size": 64, "num_hidden_layers": 2}',
            "a gate of these sizes cannot be built (RuntimeError: ",
        ),
        ("[" * 100_000, "not JSON, or cut short"),
    ],
)
def test_a_folder_without_a_moe_model_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    result = run(tmp_path)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_damaged_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    result = run(tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "the model cannot be loaded" in str(result.exception)


def test_weights_that_are_not_all_there_are_refused_and_never_drawn(tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.gate.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = run(tmp_path)
    assert isinstance(result.exception, ValueError)
    assert "weights are incomplete, 1 are missing, such as model.layers.1.mlp.gate.weight" in str(result.exception)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_gate_is_judged_with_the_bias_that_was_added_to_it(family, tmp_path):
    model = tiny(family)
    add_bias(model)
    for layer in moe_layers(model):
        layer.bias.normal_()
    model.save_pretrained(tmp_path)
    gate = find(str(tmp_path))
    assert dict(gate.module.named_buffers())[gate.bias_name].equal(moe_layers(model)[0].bias)
    result = run(tmp_path)
    rows = rows_of(result.output)
    assert result.exit_code == 0
    assert rows["definition"] == rows["bias-shift"] == rows["biased-weight"] == ("wrong", "pass")


def test_help_says_that_code_is_run():
    output = " ".join(run("--help").output.replace("│", " ").split())
    assert "imported from the current folder: that runs its code" in output
