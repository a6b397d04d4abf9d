"""The command line as a user meets it: results on stdout, one line and exit 2 for a mistake, nothing half-written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

import moesaic
from moesaic.cli import _triton_tells_leaks, main
from moesaic.cli.sources import SAMPLE
from moesaic.hf.load import TINY, load_model


@pytest.fixture
def run(monkeypatch, capsys):
    """run("demo", "--lang", "zh") -> (exit code, stdout, stderr), in this process."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        return ending.value.code or 0, out, err

    return call


def test_help_is_quick_and_names_every_command():
    command = [sys.executable, "-c", "from moesaic.cli import main; main()", "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - start)
    assert {"demo", "steps", "train"} <= set(re.findall(r"\w+", shown))
    assert min(seconds) < 0.9, "0.3 s on an idle machine, 0.2 s measured; torch alone would take longer than this"


def test_version(run):
    assert run("--version") == (0, f"moesaic {moesaic.__version__}\n", "")


MISTAKES = {
    "unknown command": (["paint"], "No such command 'paint'"),
    "unknown option": (["demo", "--colour"], "No such option: --colour"),
    "not a number": (["demo", "--seed", "many"], "Invalid value for '--seed'"),
    "negative seed": (["demo", "--seed", "-1"], "Invalid value for '--seed'"),
    "huge seed": (["train", "tiny", "--seed", "99999999999999999999"], "Invalid value for '--seed'"),
    "foreign tokenizer": (["demo", "--model", "foreign"], "and the model knows 64: they do not belong together"),
    "unknown preset": (["demo", "--random", "--preset", "gpt-5"], "preset='gpt-5' is unknown: use one of deepseek-v3"),
    "preset of nothing random": (
        ["demo", "--preset", "mixtral"],
        "--preset mixtral is for the random gate: add --random",
    ),
    "layer of the random gate": (["demo", "--random", "--layer", "1"], "--random routes random input: leave out"),
    "unknown language": (["demo", "--lang", "fr"], "--lang 'fr' is unknown: use zh or en"),
    "random with text": (["demo", "--random", "--text", "x"], "--random routes random input: leave out"),
    "two texts": (["demo", "--text", "x", "--file", "y"], "--text and --file are both given: use one"),
    "missing file": (["demo", "--file", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
    "binary file": (["demo", "--file", "bytes.bin"], "bytes.bin: not UTF-8 text"),
    "empty file": (["demo", "--file", "empty.txt"], "empty.txt is empty: give a word at least"),
    "empty text": (["demo", "--text", "  \n"], "--text is empty: give a word at least"),
    "no model there": (["demo", "--model", "nowhere"], "nowhere: no such folder"),
    "not a model": (["demo", "--model", "."], "not a model folder: it has no config.json"),
    "not an MoE model": (["demo", "--model", "dense"], "not an MoE model"),
    "corrupt weights": (["demo", "--model", "corrupt"], "corrupt: the model cannot be loaded"),
    "unwritable output": (["demo", "--random", "--preset", "classic", "--out", "empty.txt/x"], "cannot be written"),
    "layer too high": (["demo", "--text", "hello", "--layer", "99"], "--layer 99 is not there: use 0 to 3"),
    "token too high": (["steps", "hello", "--token", "99"], "--token 99 is not there: use 0 to"),
    "negative token": (["steps", "hello", "--token", "-1"], "--token -1 is not there"),
    "unknown comparison": (["steps", "hello", "--vs", "magic"], "--vs 'magic' is unknown: use topk"),
    "steps of nothing": (["steps", " "], "TEXT is empty"),
    "no such trace": (["steps", "--trace", "nowhere.safetensors"], "nowhere.safetensors"),
    "corrupt trace": (["steps", "--trace", "bytes.bin"], "bytes.bin"),
    "trace and text": (["steps", "hello", "--trace", "t"], "--trace has its routing recorded already"),
    "nothing to train": (["train", "huge"], "'huge' is nothing to train: use tiny"),
    "resume of nothing": (["train", "tiny", "--resume", "nowhere"], "nowhere does not exist"),
    "resume with another seed": (["train", "tiny", "--resume", "dense", "--seed", "1"], "leave out --seed"),
    "resume into another folder": (["train", "tiny", "--resume", "dense", "--out", "x"], "leave out --out"),
    "resume of no run": (["train", "tiny", "--resume", "dense"], "dense is not a run of `moesaic train`"),
    "training into a full folder": (["train", "tiny", "--out", "dense"], "dense is not empty"),
    "training no steps": (["train", "tiny", "--steps", "0"], "steps=0 trains nothing"),
}


@pytest.fixture(scope="module")
def mistakes_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "bytes.bin").write_bytes(bytes(range(128, 256)))
    (folder / "empty.txt").touch()
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "dense")
    few = DeepseekV3Config.from_pretrained(TINY, vocab_size=64)
    DeepseekV3ForCausalLM(few).save_pretrained(folder / "foreign")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / "foreign")
    shutil.copytree(TINY, folder / "corrupt")
    weights = (folder / "corrupt" / "model.safetensors").read_bytes()
    (folder / "corrupt" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(mistake, run, mistakes_folder, monkeypatch):
    monkeypatch.chdir(mistakes_folder)
    before = sorted(mistakes_folder.rglob("*"))
    arguments, message = MISTAKES[mistake]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("moesaic: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err
    assert sorted(mistakes_folder.rglob("*")) == before, "something was left behind"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MemoryError(), 2, "moesaic: not enough memory for this: give less at once, or use a larger machine\n"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "moesaic: not enough memory for this"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "moesaic: not enough memory for this"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2, "moesaic: not enough memory for this"),
        (RuntimeError("a mistake of ours"), 3, "RuntimeError: a mistake of ours\n"),
        (ValueError("no\x1b[31m such file"), 2, r"moesaic: no\x1b[31m such file"),
    ],
)
def test_what_goes_wrong_is_never_taken_for_a_bad_verdict(run, monkeypatch, error, code, told):
    def fail(**_):
        raise error

    monkeypatch.setattr(moesaic.cli, "app", fail)
    found, out, err = run("doctor")
    assert (found, out) == (code, "")
    assert told in err


def test_no_command_shows_the_help(run):
    code, out, err = run()
    assert "Usage" in out
    assert (code, err) == (2, "")


@pytest.mark.parametrize(
    ("triton", "told"), [(None, False), ("3.7.1", False), ("3.9.0+git1", True), ("3.10.0", True), ("4.0", True)]
)
def test_what_is_left_is_freed_at_the_exit_where_triton_would_list_it(monkeypatch, triton, told):
    monkeypatch.setitem(sys.modules, "triton", triton and SimpleNamespace(__version__=triton))
    assert _triton_tells_leaks() is told


def test_a_closed_pipe_and_a_terminal_without_chinese_are_no_mistakes(tmp_path):
    demo = f"{sys.executable} -m moesaic demo --random --preset classic --lang zh --out {tmp_path}"
    for command, ending in ((f"{demo} | head -1", 128 + signal.SIGPIPE), (f"PYTHONIOENCODING=ascii {demo}", 0)):
        run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (ending, "")


def test_random_demo_prints_the_article_in_both_languages(run, tmp_path):
    for lang, last in (("zh", "✅ 演示完成!"), ("en", "✅ Demonstration done!")):
        code, out, err = run("demo", "--random", "--preset", "deepseek-v3", "--lang", lang, "--out", tmp_path / lang)
        assert (code, err) == (0, "")
        assert last in out
        assert (tmp_path / lang / "moe_routing_visualization.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "moesaic", "demo", "--out", str(out)]
    env = {"COLUMNS": "160", "PATH": "", "PYTHONPATH": str(Path(moesaic.__file__).parents[1])}  # the code under test
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert run.stderr == ""
    return out, run.stdout


@pytest.mark.slow  # a timing: on an idle machine only
def test_budgets_of_seconds_are_kept(tmp_path):
    """The demo in 10 s and the help in 0.3 s on 2 cores, best of three."""
    for arguments, budget in ((["demo", "--out", str(tmp_path)], 10.0), (["--help"], 0.3)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "moesaic", *arguments], capture_output=True, check=True)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < budget


def test_demo_shows_verdicts_preferences_and_15_steps(demo_folder):
    out, shown = demo_folder
    assert "English verse" in shown
    assert "Chinese verse" in shown
    assert re.search(r"15\s+output\s+expert_ids, weights", shown)
    assert "classic top-4 would take" in shown
    assert f"Reproduce: moesaic demo --out {out}" in shown
    assert {path.name for path in out.iterdir()} == {"routing.png", "load.png", "trace.safetensors"}


def test_demo_as_json_has_the_numbers_it_shows_and_how_to_get_them_again(run, tmp_path, demo_folder):
    code, out, err = run("demo", "--json", "--out", tmp_path)
    assert (code, err) == (0, "")
    found = json.loads(out)
    trace = moesaic.load(tmp_path / "trace.safetensors")
    assert torch.equal(trace.picks, moesaic.load(demo_folder[0] / "trace.safetensors").picks)
    assert sum(found["tokens_by_domain"].values()) == found["tokens"] == len(trace)
    shown = " ".join(demo_folder[1].split())
    for domain, count in found["tokens_by_domain"].items():
        assert f"{domain} {count:,}" in shown
    for index, layer in enumerate(found["layers"]):
        assert layer["verdict"]["en"] in shown
        assert layer["load"] == torch.bincount(trace.picks[index].flatten().long(), minlength=32).tolist()
    assert found["domains"]["preferences"][0]["lift"] > 1
    followed = found["followed"]
    assert f"layer {followed['layer']}, token {followed['token']} {followed['text']} of {followed['domain']}" in shown
    assert [step["number"] for step in followed["steps"]] == list(range(1, 16))
    assert followed["steps"][-1]["value"] is not None
    assert [Path(file).name for file in found["files"]] == ["routing.png", "load.png", "trace.safetensors"]
    assert found["command"] == f"moesaic demo --json --out {tmp_path}"
    assert (found["seed"], found["config"]) == (0, trace.configs[0].digest())
    assert found["versions"]["torch"] == torch.__version__


def test_random_demo_as_json_is_one_document(run, tmp_path):
    code, out, err = run("demo", "--random", "--preset", "classic", "--seed", "3", "--json", "--out", tmp_path)
    found = json.loads(out)
    assert (code, found["seed"], found["tokens_by_domain"], found["domains"]) == (0, 3, {}, None)
    assert sum(found["layers"][0]["load"]) == found["tokens"] * 2
    assert "MoE" in err, "the article's transcript"


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_the_demo_wait_without_spinning_unless_told_to(tmp_path, given, policy):
    command = [sys.executable, "-m", "moesaic", "demo", "--random", "--preset", "classic", "--out", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=env | {"OMP_DISPLAY_ENV": "TRUE"})
    if "OMP_WAIT_POLICY" not in shown.stderr:
        pytest.skip("this torch has another OpenMP")
    assert f"OMP_WAIT_POLICY = '{policy}'" in shown.stderr


def test_demo_finds_the_shipped_model_balanced_and_its_experts_specialised(demo_folder):
    from moesaic.trace.statistics.preference import domain_preference
    from moesaic.trace.statistics.stats import layer_reports

    trace = moesaic.load(demo_folder[0] / "trace.safetensors")
    assert trace.n_layers >= 4
    assert len(trace) == 12_640
    for report in layer_reports(trace):
        assert report.is_healthy, report.verdict()
        assert (report.by_documents, report.n_documents) == (True, 85), "works, not windows of them"
        assert report.design_effect > 40, "windows of one work are alike"
    preferences = domain_preference(trace)
    found = preferences.found(0.05)
    assert found.any(axis=1).all(), "in every layer some expert prefers a domain beyond chance"
    assert {preferences.domains[d] for d in preferences.domain[found]} == set(preferences.domains)
    assert "1000 permutations of 82 documents, by their first 39 tokens" in " ".join(demo_folder[1].split())


def test_demo_record_is_what_the_model_selects(demo_folder):
    """The picks of the file, against a second forward whose router outputs are caught by hand."""
    from moesaic.cli import sources

    trace = moesaic.load(demo_folder[0] / "trace.safetensors")
    model, tokenizer = load_model()
    caught: list[torch.Tensor] = []
    gate = model.model.layers[2].mlp.gate
    handle = gate.register_forward_hook(lambda _m, _a, output: caught.append(output[2]))
    with torch.inference_mode():
        for ids in sources.tokens_of(tokenizer, sources.held_out()).batches:
            model(input_ids=ids, use_cache=False)
    handle.remove()
    layer = next(i for i, name in enumerate(trace.layers) if ".2." in name)
    assert torch.equal(trace.picks[layer].long(), torch.cat(caught))


def test_a_text_is_one_document_however_it_is_read(run, tmp_path):
    """Windows of one text counted as documents would claim to hold for texts like it."""
    (tmp_path / "long.txt").write_text(SAMPLE * 20, encoding="utf-8")
    _, out, _ = run("demo", "--file", tmp_path / "long.txt", "--out", tmp_path / "demo")
    run("trace", "--file", tmp_path / "long.txt", "-o", tmp_path / "run.safetensors")
    demo, traced = moesaic.load(tmp_path / "demo" / "trace.safetensors"), moesaic.load(tmp_path / "run.safetensors")
    assert (demo.n_sequences, traced.n_sequences) == (1, 1)
    assert torch.equal(demo.picks, traced.picks)
    assert (
        f"documents: 1 (long.txt {len(demo):,})\nThe document is read in {-(-len(demo) // 128)} windows of 128" in out
    )
    assert "windows of 128 tokens\n" in out
    for file in (tmp_path / "demo" / "trace.safetensors", tmp_path / "run.safetensors"):
        assert f"the {len(demo):,} tokens of one document only" in " ".join(run("stats", file)[1].split())


def test_the_name_of_a_file_cannot_steer_the_terminal(run, tmp_path):
    (file := tmp_path / "x\x1b[31m.txt").write_text(SAMPLE, encoding="utf-8")
    _, out, err = run("demo", "--file", file, "--out", tmp_path / "demo")
    assert "\x1b" not in out + err
    assert out.count(r"x\x1b[31m.txt") == 3  # documents, the token that is followed, the command


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_demo_of_a_text_and_of_a_file_agree(run, tmp_path, lang):
    (tmp_path / "text.txt").write_text(SAMPLE, encoding="utf-8")
    by_text = run("demo", "--text", SAMPLE, "--lang", lang, "--out", tmp_path / "a")
    by_file = run("demo", "--file", tmp_path / "text.txt", "--lang", lang, "--out", tmp_path / "b")
    assert by_text[0] == by_file[0] == 0
    a, b = (moesaic.load(tmp_path / name / "trace.safetensors") for name in "ab")
    assert torch.equal(a.picks, b.picks)
    asked = {"zh": "负载均衡吗", "en": "Is the load balanced"}
    assert [word in by_text[1] for word in asked.values()] == [lang == "zh", lang == "en"]


def test_demo_calls_a_collapsed_model_collapsed(run, tmp_path):
    """Tools that look at hidden channels, or re-derive picks from logits, call such a model healthy."""

    model, tokenizer = load_model()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias[:4] = 50
    model.save_pretrained(tmp_path / "collapsed")
    tokenizer.save_pretrained(tmp_path / "collapsed")
    code, out, _ = run("demo", "--model", tmp_path / "collapsed", "--out", tmp_path / "out")
    assert code == 1
    assert "collapsed onto 4 of 32 experts" in " ".join(out.split())


def test_steps_of_a_text_and_of_its_record_are_the_same(run, tmp_path):
    code, out, err = run("steps", "专家 routing", "--layer", "2", "--token", "1", "--vs", "topk")
    assert (code, err) == (0, "")
    assert [int(n) for n in re.findall(r"^ {1,3}(\d+) {2,4}[a-z]", out, re.MULTILINE)] == list(range(1, 16))
    assert "classic top-4" in out
    run("demo", "--text", "专家 routing", "--out", tmp_path)
    trace = tmp_path / "trace.safetensors"
    recorded = run("steps", "--trace", trace, "--layer", "2", "--token", "1", "--vs", "topk")[1]
    tables = [shown.split("Reproduce:")[0].splitlines()[2:] for shown in (out, recorded)]  # less the titles
    assert tables[0] == tables[1]
    zh = run("steps", "--trace", trace, "--lang", "zh")[1]
    assert "权重归一化" in zh


@pytest.mark.slow  # the final report reads all held-out text
def test_training_says_what_it_learnt(run, tmp_path):
    code, out, _ = run("train", "tiny", "--steps", "2", "--out", tmp_path / "run")
    assert code == 0
    assert "Kneser-Ney" in out
    assert json.loads((tmp_path / "run" / "training.json").read_text())["finished"]
