"""`moesaic bench generate`: a whole model under every implementation, and what is said of a wrong one."""

import json
import sys

import pytest
import torch
from transformers import GptOssConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.bench.generating import Script, compare_generating, random_model
from moesaic.cli import main
from moesaic.hf import experts as seam

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()


def tokens_of(rows, length):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 3])
def test_everybody_writes_the_given_tokens_and_is_timed_in_every_round(model, rows):
    heard, ran = [], []
    model.register_forward_pre_hook(lambda _, _args, given: heard.append(given["input_ids"]), with_kwargs=True)
    tokens = tokens_of(rows, 12)
    found = compare_generating(model, tokens, 4, ["eager", "grouped_mm"], 2, done=lambda _, name: ran.append(name))

    assert [one.name for one in found] == ["moesaic", "eager", "grouped_mm"]
    assert all(not one.note and one.difference <= 1e-5 for one in found)
    assert all(one.prefill.rounds == one.step.rounds == 2 and one.step.median > 0 for one in found)
    assert len(ran) == 2 + 3 * (2 + 1)
    runs = [torch.cat(heard[i : i + 4], dim=1) for i in range(0, len(heard), 4)]  # a prefill and three steps
    assert len(runs) == len(ran)
    assert all(torch.equal(run, tokens[:, :-1]) for run in runs)


def test_the_model_is_left_as_it_came(model):
    model.set_experts_implementation("batched_mm")
    model.generation_config.eos_token_id = 3
    settings = model.generation_config
    compare_generating(model, tokens_of(1, 8), 2, ["eager"], rounds=1)
    assert model.config._experts_implementation == "batched_mm"
    assert model.generation_config is settings
    assert settings.eos_token_id == 3
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": 7},  # which is written
        {"suppress_tokens": [1, 2]},
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1, "min_length": 100},
        {"num_beams": 4},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["a"]},
        {"max_time": 1e-9},
        {"use_cache": False},
        {"do_sample": True, "temperature": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_a_model_says_of_searching_and_stopping_is_left_out(model, settings):
    model.generation_config.update(**settings)
    heard = []
    model.register_forward_pre_hook(lambda _, _args, given: heard.append(given["input_ids"].shape), with_kwargs=True)
    tokens = tokens_of(2, 10)
    tokens[:, -3] = 7
    assert all(not one.note for one in compare_generating(model, tokens, 4, [], rounds=1))
    assert heard == 4 * [(2, 6), *3 * [(2, 1)]]


def engine_of(give):
    return lambda *_, **__: lambda tokens, *_: give(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("give", [torch.zeros_like, torch.neg, lambda x: x * torch.nan], ids=["zeros", "other", "nan"])
def test_an_engine_that_computes_something_else_is_wrong(model, monkeypatch, dtype, give):
    monkeypatch.setattr(seam, "select_engine", engine_of(give))
    (ours,) = compare_generating(model.to(dtype), tokens_of(1, 8), 2, [], rounds=1)
    assert ours.note.startswith("wrong: ")
    assert ours.prefill is ours.step is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_not_wrong(model, dtype):
    assert all(not one.note for one in compare_generating(model.to(dtype), tokens_of(2, 40), 2, ["grouped_mm"], 1))


@pytest.fixture
def wrong_engine(monkeypatch):
    monkeypatch.setattr(seam, "select_engine", engine_of(lambda tokens: -9 * tokens))


@pytest.mark.usefixtures("wrong_engine")
def test_the_wrong_and_the_failing_have_no_speed(model):
    ours, eager, unknown = compare_generating(model, tokens_of(1, 8), 2, ["eager", "nobody"], rounds=1)
    assert ours.note.startswith("wrong: ")
    assert ours.difference > 1e-2
    assert ours.prefill is ours.step is None
    assert eager.step is not None
    assert unknown.note.startswith("failed: ")
    assert "nobody" in unknown.note


def test_seconds_are_told_apart_by_the_first_token():
    script = Script(torch.zeros(1, 4, dtype=torch.int64), one_of_many=True)
    script.begun, script.at = 10.0, [13.0, 13.5, 14.0, 14.5]
    assert (script.prefill, script.step) == (3.0, 0.5)


@pytest.mark.parametrize(("new", "length"), [(1, 8), (8, 8)])
def test_too_few_tokens_are_refused(model, new, length):
    with pytest.raises(ValueError, match=f"{new} of {length} tokens to write"):
        compare_generating(model, tokens_of(1, length), new, ["eager"])


def test_random_weights_need_a_config_only(tmp_path):
    sizes = {**SIZES, "num_hidden_layers": 3, "num_local_experts": 8}
    GptOssConfig(**sizes, layer_types=["full_attention"] * 3).save_pretrained(tmp_path)
    model = random_model(tmp_path, 2, torch.bfloat16)
    assert len(model.model.layers) == len(model.config.layer_types) == 2
    assert model.dtype == torch.bfloat16
    assert len(random_model(tmp_path, None).model.layers) == 3
    (tmp_path / "config.json").write_text('{"model_type": "nobody", "num_experts": 8}')
    with pytest.raises(ValueError, match=r"no model can be made of its config\.json"):
        random_model(tmp_path, 2)
    with pytest.raises(ValueError, match="no such folder"):
        random_model(tmp_path / "missing", 2)


def test_random_weights_are_of_the_dtype_of_their_config(tmp_path):
    Qwen3MoeConfig(**SIZES, dtype="bfloat16").save_pretrained(tmp_path)
    assert random_model(tmp_path, None).dtype == torch.bfloat16
    assert random_model(tmp_path, None, torch.float16).dtype == torch.float16


def test_layers_that_are_all_dense_are_refused(tmp_path):
    Qwen3MoeConfig(**SIZES, mlp_only_layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--layers 1: none of the first 1 layers has experts: give more"):
        random_model(tmp_path, 1)


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--read", "8") -> (exit code, stdout, stderr) of `moesaic bench generate`, in this process."""
    monkeypatch.setattr("moesaic.bench.machine.onednn_isa", lambda: "some instructions")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moesaic", "bench", "generate", *arguments])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code or 0, *capsys.readouterr()

    return call


def test_the_shipped_model_is_told_in_a_table(run):
    code, out, _ = run("--read", "9", "--write", "2", "--batch", "2", "--rounds", "1")
    assert code == 0
    assert "DeepseekV3ForCausalLM, 5 layers, weights of" in out
    assert "reads 2 texts of 9 tokens, writes 2" in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert [len(lines[name]) for name in ("moesaic", "eager", "grouped_mm")] == [3, 5, 5]
    assert out.rstrip().endswith("reproduce: moesaic bench generate --read 9 --write 2 --batch 2 --rounds 1")


def test_a_program_reads_seconds_and_tokens_a_second(run, tmp_path):
    Qwen3MoeConfig(**SIZES).save_pretrained(tmp_path)
    options = ("--random", "--layers", "1", "--dtype", "bfloat16", "--read", "8", "--write", "3", "--rounds", "1")
    code, out, _ = run(str(tmp_path), *options, "--peers", "eager", "--batch", "4", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["weights"], told["layers"], told["dtype"]) == ("random", 1, "bfloat16")
    ours = told["results"][0]
    assert ours["reads_tokens_per_second"] == 32 / ours["prefill_seconds"]["median"]
    assert ours["writes_tokens_per_second"] == 4 / ours["step_seconds"]["median"]


@pytest.mark.usefixtures("wrong_engine")
def test_wrong_numbers_of_ours_end_with_1(run, monkeypatch):
    options = ("--read", "4", "--write", "2", "--rounds", "1", "--peers", "")
    code, out, _ = run(*options)
    assert code == 1
    assert "moesaic: wrong: logits differ" in out
    monkeypatch.setattr(seam, "select_engine", engine_of(lambda tokens: tokens * torch.nan))
    code, out, _ = run(*options, "--json")
    assert code == 1
    assert json.loads(out)["results"][0]["difference"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "2"), "add --random"),
        (("--dtype", "int8"), "--dtype 'int8' is unknown"),
        (("--read", "100000"), "tokens together, and the model takes"),
        (("--batch", "5000", "--read", "500"), "--batch 5000: the shipped texts have"),
    ],
)
def test_mistakes_are_told_in_one_line(run, options, said):
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
