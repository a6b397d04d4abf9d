"""`moesaic trace` as a user meets it: the record is what the model chose, and tokens lie where they are said to lie."""

import json

import pytest
import torch
from commands import runner
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from moesaic.cli import sources
from moesaic.cli.demo import demo
from moesaic.cli.output import progress
from moesaic.cli.steps import steps
from moesaic.cli.trace import moved, trace
from moesaic.hf.load import TINY, load_model
from moesaic.trace.file.reader import load
from moesaic.trace.recording.record import record
from moesaic.train.data import DOMAINS, corpus

VERSE = "床前明月光，疑是地上霜。\nTo be, or not to be 😀\n\n  \nfor x in y:\n"


@pytest.fixture(scope="module")
def loaded():
    return load_model()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, loaded):
    """The shipped model is loaded once; other folders as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moesaic.hf.load.load_model", lambda folder: loaded if folder == TINY else load_model(folder))
    return runner(monkeypatch, capsys, trace=trace, demo=demo, steps=steps)


def chosen(model, rows: list[list[int]]) -> list[torch.Tensor]:
    """What each MoE layer's experts are handed, by a spy of the test: ids [T, K] per layer."""
    caught: dict[int, list[torch.Tensor]] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, i=i: caught.setdefault(i, []).append(out[2]))
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(caught[i]) for i in sorted(caught)]


@pytest.mark.parametrize("detail", ["ids", "picks", "scores"])
def test_the_record_is_what_the_model_chose(run, loaded, detail):
    code, out, err = run("trace", "--text", VERSE, "--detail", detail)
    assert (code, err) == (0, "")
    model, tokenizer = loaded
    recorded = load("run.safetensors")
    row = tokenizer(VERSE)["input_ids"]
    assert recorded.input_ids.tolist() == row
    assert torch.equal(recorded.picks.long(), torch.stack(chosen(model, [row])))
    assert recorded.detail == detail
    assert (recorded.weights is None) == (detail == "ids")
    assert (recorded.logits is None) == (detail != "scores")
    assert recorded.n_sequences == 1
    assert recorded.labels == ("text",)
    assert "4 MoE layers, top 4 of 32 experts" in out
    assert f"{len(row)} tokens of 1 document (text 1)" in out
    assert ("moesaic steps --trace run.safetensors" in out) == (detail == "scores")
    assert "moesaic stats run.safetensors" in out
    assert "Reproduce: moesaic trace --text" in out


def test_a_document_longer_than_the_window_is_read_in_parts_and_stays_one_document(run, loaded):
    assert run("trace", "--text", VERSE * 20, "--window", "17")[0] == 0
    model, tokenizer = loaded
    recorded = load("run.safetensors")
    row = tokenizer(VERSE * 20)["input_ids"]
    assert len(row) > 10 * 17, "several batches, and a shorter rest"
    assert len(row) % 17
    parts = [row[at : at + 17] for at in range(0, len(row), 17)]
    agree = recorded.picks.long().sort(-1).values == torch.stack(chosen(model, parts)).sort(-1).values
    assert agree.all(-1).float().mean() > 0.99, "a batch of rows differs in the last bits"
    assert recorded.sequences.tolist() == [0] * len(row)


def test_a_model_of_few_positions_reads_as_many(run, loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", 31)
    found = json.loads(run("trace", "--text", VERSE * 20, "--json")[1])
    assert (found["window"], found["windows"]) == (31, -(-found["tokens"] // 31))
    seen = []
    reads = loaded[0].register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run("demo", "--out", "demo")
    run("steps", VERSE * 20)
    reads.remove()
    assert len(seen) > 10
    assert max(seen) == 31


def test_windows_are_named_where_a_document_was_cut(run):
    n = -(-len(load_model()[1](VERSE * 20)["input_ids"]) // 17)
    _, out, _ = run("trace", "--text", VERSE * 20, "--window", "17")
    assert f"\nThe document is read in {n} windows of 17 tokens, each by itself; --window 1024 reads further at" in out
    assert out.endswith(", windows of 17 tokens\n")
    _, out, _ = run("trace", "--text", f"To be\n{'床前明月光，' * 20}", "--lines", "--window", "17", "--lang", "zh")
    assert "\n2 个文档中有 1 个分成 " in out
    assert "每个窗口 17 个 token；用 --window 1024 一次可以读得更长" in out
    assert out.endswith("，窗口 17 个 token\n")
    assert "window" not in run("trace", "--text", "To be")[1]
    found = json.loads(run("trace", "--text", VERSE * 20, "--window", "17", "--json")[1])
    assert (found["window"], found["windows"]) == (17, n)


def test_nothing_reads_further_than_the_model(run):
    _, out, _ = run("trace", "--text", VERSE * 200, "--window", "1024")
    assert "windows of 1024 tokens, each by itself\n" in out


def test_pieces_and_offsets_lead_back_to_the_text(run):
    assert run("trace", "--text", VERSE * 3, "--lines")[0] == 0
    recorded = load("run.safetensors")
    lines = [line for line in (VERSE * 3).splitlines() if line.strip()]
    assert recorded.n_sequences == len(lines) == 9
    of_line = [[] for _ in lines]
    for token, (sequence, number) in enumerate(
        zip(recorded.sequences.tolist(), recorded.input_ids.tolist(), strict=True)
    ):
        start, end = recorded.offsets[token].tolist()
        text = lines[sequence][start:end]
        of_line[sequence].append((start, end))
        piece = recorded.pieces[number]
        assert piece == text or len(text) == 1, "only parts of one character are named otherwise"
    for line, places in zip(lines, of_line, strict=True):
        assert (places[0][0], places[-1][1]) == (0, len(line))
        assert all(start <= before for (start, _), (_, before) in zip(places[1:], places[:-1], strict=True))
    assert set(recorded.pieces) == set(recorded.input_ids.tolist())


def test_files_are_documents_with_their_names(run, tmp_path):
    (tmp_path / "a.txt").write_text(VERSE, encoding="utf-8")
    (tmp_path / "b.py").write_text("for x in y:\n    pass\n")
    (tmp_path / "c.txt").write_text(VERSE, encoding="utf-8")
    code, out, _ = run("trace", "--file", "a.txt", "--file", "b.py", "--file", "c.txt")
    assert code == 0
    recorded = load("run.safetensors")
    assert recorded.labels == ("a.txt", "b.py", "c.txt")
    assert recorded.n_sequences == 3
    assert "(a.txt 1, b.py 1, c.txt 1)" in out
    first, last = (recorded.picks[:, recorded.sequences == i] for i in (0, 2))
    assert torch.equal(first, last), "every document is read by itself"
    run("trace", "--file", "a.txt", "--file", "b.py", "--lines", "-o", "lines.safetensors")
    assert load("lines.safetensors").labels == ("a.txt",) * 3 + ("b.py",) * 2


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (("zh.txt", "sub/zh.txt", "b.txt"), ("zh.txt", "sub/zh.txt", "b.txt")),
        (("en/wiki.txt", "zh/wiki.txt"), ("en/wiki.txt", "zh/wiki.txt")),
        (("old/en/x", "new/en/x", "x"), ("old/en/x", "new/en/x", "x")),
        (("old/en/x", "old/zh/x"), ("en/x", "zh/x")),
    ],
)
def test_files_of_one_name_are_told_apart_by_their_folders(run, tmp_path, files, labels):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"from {file}")
    assert run("trace", *(part for file in files for part in ("--file", file)))[0] == 0
    assert load("run.safetensors").labels == labels


def test_a_byte_order_mark_is_no_text(run, tmp_path):
    for name, encoding in (("plain.txt", "utf-8"), ("marked.txt", "utf-8-sig")):
        (tmp_path / name).write_text(VERSE, encoding=encoding)
        run("trace", "--file", name, "-o", f"{name}.safetensors")
    plain, marked = (load(f"{name}.txt.safetensors") for name in ("plain", "marked"))
    assert torch.equal(plain.input_ids, marked.input_ids)
    assert torch.equal(plain.offsets, marked.offsets)


def test_a_work_of_the_corpus_is_one_document(run):
    """Passages of one play are alike and no independent draws. Tokens are in the shares of the training."""
    code, out, err = run("trace", "--corpus")
    assert (code, err) == (0, "")
    recorded = load("run.safetensors")
    works = {label: recorded.labels.count(label) for label in DOMAINS}
    assert works == {"english_verse": 3, "chinese_verse": 52, "manual": 10, "python": 20}
    assert recorded.n_sequences == len(set(recorded.sequences.tolist())) == 85
    read = [recorded.labels[number] for number in recorded.sequences.tolist()]
    shares = {label: read.count(label) / len(read) for label in DOMAINS}
    assert shares == pytest.approx({name: domain.share for name, domain in DOMAINS.items()}, abs=0.01)
    assert "85 documents (chinese_verse 52, python 20, manual 10, english_verse 3)" in out
    run("trace", "--corpus", "--window", "1000", "-o", "far.safetensors")
    assert len(load("far.safetensors")) <= len(recorded), "windows of another length hold no more text"


def test_what_is_read_of_a_held_out_work_lies_in_it(loaded):
    """Every work once; its windows lie apart in it, do not overlap, and say what the work says there."""
    documents = sources.held_out()
    texts = {domain: [work.text for work in corpus(domain, "held_out")] for domain in DOMAINS}
    found = [next(i for i, text in enumerate(texts[d.label]) if text.startswith(d.text)) for d in documents]
    assert len(set(zip(found, [d.label for d in documents], strict=True))) == len(documents)
    tokens = sources.tokens_of(loaded[1], documents)
    for number, document in enumerate(documents):
        places = tokens.offsets[tokens.sequences == number]
        assert (places[1:, 0] >= places[:-1, 0]).all()
        assert len(places) <= document.tokens
        ids = torch.cat([batch.flatten() for batch in tokens.batches])[tokens.sequences == number].tolist()
        for (start, end), token in zip(places.tolist(), ids, strict=True):
            assert tokens.pieces[token] == document.text[start:end] or "<0x" in tokens.pieces[token]
    play = tokens.offsets[tokens.sequences == 0]
    assert (len(play), tokens.windows[0]) == (1280, 10)
    assert (play[128::128, 0] - play[127:-1:128, 1] > 500).all(), "ten windows apart, not the first page"


def test_json_is_one_document_and_nothing_else(run):
    code, out, err = run("trace", "--text", "To be", "--json", "--lang", "zh")
    assert (code, err) == (0, "")
    found = json.loads(out)
    recorded = load(found["file"])
    assert found["tokens"] == len(recorded)
    assert found["layers"] == list(recorded.layers)
    assert found["bytes"] > 0
    assert list(found)[:4] == ["moesaic", "torch", "command", "records"]
    assert found["command"] == "moesaic trace --text 'To be' --json --lang zh"
    assert [(record["file"], record["config"]) for record in found["records"]] == [(found["file"], found["config"])]
    assert (found["labels"], found["documents"], found["detail"]) == ({"text": 1}, 1, "picks")
    assert (found["n_routed_experts"], found["num_experts_per_tok"], found["seed"]) == (32, 4, 0)


def test_chinese_is_chinese(run):
    out = run("trace", "--text", "To be", "--lang", "zh")[1]
    assert "4 个 MoE 层" in out
    assert "接下来：" in out
    assert "Next" not in out
    commands = [line for line in out.splitlines() if line.startswith("   moesaic")]
    assert len(commands) == 2
    assert all(" --lang zh   " in line for line in commands), "what follows speaks the same language"


def test_an_older_trace_is_replaced_and_it_is_said(run):
    assert "place of an older trace" not in run("trace", "--text", "To be")[1]
    assert "(in the place of an older trace)\n" in run("trace", "--text", "or not to be")[1]
    assert "（替换了旧的记录）\n" in run("trace", "--text", "To be", "--lang", "zh")[1]
    assert load("run.safetensors").pieces.keys() == {int(i) for i in load("run.safetensors").input_ids}


def test_a_link_to_a_file_that_is_not_there_yet_is_written_through(run, tmp_path):
    (tmp_path / "link").symlink_to("new.safetensors")
    code, out, _ = run("trace", "--text", "To be", "-o", "link")
    assert (code, "place of an older trace" in out) == (0, False)
    assert (tmp_path / "link").is_symlink()
    assert len(load("new.safetensors")) > 0


def test_labels_cannot_steer_a_terminal(run, tmp_path):
    (tmp_path / "evil\x1b[31m[bold].txt").write_text("To be")
    out = run("trace", "--file", "evil\x1b[31m[bold].txt")[1].split("Reproduce")[0]
    assert "evil\\x1b[31m[bold].txt 1" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("detail", ["ids", "picks", "scores"])
def test_what_is_recorded_goes_to_the_file_and_no_more_than_was_asked_for(run, monkeypatch, detail):
    asked = []

    def spy(model, detail, **options):
        asked.append(detail)
        return record(model, detail, **options)

    def no_room(_dtype):
        raise AssertionError("rows are kept in memory")

    monkeypatch.setattr(sources, "record", spy)
    monkeypatch.setattr("moesaic.trace.recording.recorder.Column", no_room)
    assert run("trace", "--text", VERSE, "--detail", detail)[0] == 0
    assert asked == [detail]
    assert load("run.safetensors").detail == detail


def test_a_tokenizer_that_tells_no_offsets_leaves_them_out():
    class Slow:
        """A tokenizer in Python: no offsets."""

        is_fast = False

        def __call__(self, texts, return_offsets_mapping):
            assert not return_offsets_mapping
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

        def decode(self, ids):
            return chr(ids[0])

    found = sources.tokens_of(Slow(), [sources.Document("a", "ab"), sources.Document("b", "b")], 1)
    assert found.offsets is None
    assert found.pieces == {97: "a", 98: "b"}
    assert [batch.tolist() for batch in found.batches] == [[[97], [98], [98]]]
    assert found.sequences.tolist() == [0, 0, 1]
    assert (found.labels, found.windows) == (("a", "b"), (2, 1))


def test_a_model_without_the_usual_arguments_is_read_too(loaded, tmp_path):
    model, tokenizer = loaded
    forward = model.forward

    def plain(input_ids):
        return forward(input_ids=input_ids, use_cache=False)

    tokens = sources.tokens_of(tokenizer, [sources.Document("a", "To be")])
    heard = []
    model.forward = plain
    try:
        sources.record_documents(model, tokens, "picks", tmp_path / "run.safetensors", done=heard.append)
    finally:
        del model.forward
    assert heard == [len(load(tmp_path / "run.safetensors"))]


def test_the_bar_is_on_stderr_and_only_in_a_terminal(capsys):
    with progress("Reading", 3) as done:
        done(3)
    assert capsys.readouterr() == ("", "")


MISTAKES = {
    "nothing to read": (["--window", "8"], "give one of --text, --file (as often as needed) and --corpus"),
    "two things to read": (["--text", "x", "--corpus"], "give one of --text, --file (as often as needed) and --corpus"),
    "empty text": (["--text", " \n"], "--text is empty: give a word at least"),
    "empty file": (["--file", "empty.txt"], "empty.txt is empty: give a word at least"),
    "empty file of lines": (["--file", "empty.txt", "--lines"], "empty.txt is empty: give a word at least"),
    "missing file": (["--file", "nowhere.txt"], "--file nowhere.txt: cannot be read (No such file"),
    "binary file": (["--file", "bytes.bin"], "bytes.bin: not UTF-8 text"),
    "unknown detail": (["--text", "x", "--detail", "all"], "--detail 'all' is unknown: use one of ids, picks, scores"),
    "no window": (["--text", "x", "--window", "0"], "Invalid value for '--window'"),
    "window beyond the model": (["--text", "x", "--window", "4096"], "the model reads 1024 tokens at most"),
    "unknown language": (["--text", "x", "--lang", "fr"], "--lang 'fr' is unknown"),
    "no such device": (["--text", "x", "--device", "banana"], "--device 'banana' is not there: use cpu"),
    "no such model": (["nowhere", "--text", "x"], "nowhere: no such folder"),
    "not a model": ([".", "--text", "x"], "it has no config.json: give the folder of a Hugging Face model"),
    "a file twice": (
        ["--file", "twice.txt", "--file", "./twice.txt"],
        "--file twice.txt: is given twice, and a document",
    ),
    "a link to it": (
        ["--file", "twice.txt", "--file", "again.txt"],
        "--file again.txt: is given twice, and a document",
    ),
    "a dense model": (["dense", "--text", "x"], "not an MoE model"),
    "a foreign tokenizer": (["foreign", "--text", "x"], "and the model knows 64: they do not belong together"),
    "out is a folder": (["--text", "x", "-o", "."], "--out .: is a folder"),
    "out is no trace": (["--text", "x", "-o", "bytes.bin"], "--out bytes.bin: is there already and is no whole trace"),
    "out is weights": (
        ["--text", "x", "-o", "dense/model.safetensors"],
        "is there already and is no whole trace: give another",
    ),
    "out is a device": (["--text", "x", "-o", "/dev/null"], "--out /dev/null: is there already and is no whole trace"),
    "out is nowhere": (["--text", "x", "-o", "no/run.safetensors"], "cannot be written (No such file"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that cannot be traced."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16)).save_pretrained(folder / "dense")
    DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(TINY, vocab_size=64)).save_pretrained(folder / "foreign")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "foreign" / name).write_bytes((TINY / name).read_bytes())
    (folder / "empty.txt").touch()
    (folder / "twice.txt").write_text("To be")
    (folder / "again.txt").symlink_to("twice.txt")
    (folder / "bytes.bin").write_bytes(bytes(range(128, 256)))
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(run, folders, monkeypatch, mistake):
    monkeypatch.chdir(folders)
    arguments, message = MISTAKES[mistake]
    before = sorted(folders.rglob("*"))
    monkeypatch.setattr(sources, "record_documents", None)  # refused before the model runs
    code, out, err = run("trace", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(folders.rglob("*")) == before


def test_a_device_too_small_for_the_model_is_not_called_absent():
    class Large:
        def to(self, _device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        moved(Large(), "cuda")
