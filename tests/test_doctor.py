"""`moesaic doctor`: what it says is what the library does."""

import json
import sys

import pytest
import torch
from cases import needs_onednn

from moesaic.bench import forms
from moesaic.bench.forms import FormTimes, engine_form, time_forms
from moesaic.bench.machine import onednn_isa
from moesaic.cli import main
from moesaic.cli.doctor_table import WORDS, _engines
from moesaic.cli.examine import SWITCH_ON, held_back, transformers_seam, try_engine, wrong
from moesaic.engine import memory
from moesaic.engine.matmul_forms import ANY
from moesaic.engine.select import ENGINES, best_engine


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--lang", "zh") -> (exit code, stdout, stderr). oneDNN is not asked, which takes seconds."""
    monkeypatch.setattr("moesaic.bench.machine.onednn_isa", lambda: "AVX2")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesaic", "doctor", *args])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        return ending.value.code or 0, out, err

    return call


def test_json_says_what_auto_takes_and_how_every_engine_did(run):
    code, out, err = run("--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["torch_isa"] == torch.backends.cpu.get_cpu_capability()
    cells = {(row["device"], row["dtype"]): row for row in found["engines"]}
    assert {("cpu", dtype) for dtype in ("float32", "bfloat16", "float16", "float64")} <= cells.keys()
    assert ("cuda" in {device for device, _ in cells}) == torch.cuda.is_available()
    for (device, dtype), row in cells.items():
        assert (row["auto"], row["reason"]) == best_engine(device, getattr(torch, dtype))
        assert row["engines"].keys() == ENGINES.keys()
        assert row["engines"][row["auto"]] is True
    assert found["transformers"]["known"]
    assert "measured" not in found


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_tables_hold_the_same_in_words(lang, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("--lang", lang)
    assert (code, err) == (0, "")
    words = WORDS[lang]
    for key in ("versions", "machine", "cpu", "isa", "onednn_isa", "memory", "ok"):
        assert words[key] in out
    assert torch.__version__ in out
    assert all(name in out for name in ENGINES)
    for line in SWITCH_ON:
        assert f"  {line}\n" in out, "a line of code is not broken, so that it can be copied"


def test_both_languages_have_the_same_words():
    assert WORDS["en"].keys() == WORDS["zh"].keys()


def test_an_unknown_language_is_a_mistake(run):
    code, out, err = run("--lang", "fr")
    assert (code, out) == (2, "")
    assert err == "moesaic: --lang 'fr' is unknown: use zh or en\n"


def broken(tokens, expert_ids, weights, experts, spec):
    return ENGINES["grouped"](tokens, expert_ids, weights * 1.001, experts, spec)


def refusing(tokens, *_):
    raise ValueError(f"dtype={tokens.dtype}\nis not served in [T, K]: use 'reference'")


def test_an_engine_that_is_wrong_is_a_bad_verdict(run, monkeypatch):
    monkeypatch.setitem(ENGINES, best_engine("cpu", torch.float32)[0], broken)
    code, out, _ = run()
    assert code == 1
    assert WORDS["en"]["wrong"].format(where="cpu float32, cpu float64") in out, "1e-3 is noise in 16 bits"


def test_an_engine_that_refuses_says_so_and_is_no_bad_verdict_unless_auto_takes_it(run, monkeypatch):
    monkeypatch.setitem(ENGINES, "picky", refusing)
    code, out, _ = run("--json")
    rows = json.loads(out)["engines"]
    assert code == 0
    assert rows[0]["engines"]["picky"] == "dtype=torch.float32 is not served in [T, K]: use 'reference'"
    assert "not served in [T, K]" in " ".join(run()[1].split())
    assert wrong({"engines": [{**row, "auto": "picky"} for row in rows]}) == [f"cpu {row['dtype']}" for row in rows]


def test_a_wrong_gradient_is_found():
    def frozen(tokens, expert_ids, weights, experts, spec):
        return ENGINES["reference"](tokens, expert_ids, weights + 0 * weights.detach(), experts, spec)

    def half(tokens, expert_ids, weights, experts, spec):
        weights = weights * 0.5 + weights.detach() * 0.5  # the same value, half the slope
        return ENGINES["reference"](tokens, expert_ids, weights, experts, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "fine", frozen)
        patch.setitem(ENGINES, "half", half)
        assert try_engine("fine", "cpu", "float32") is None
        assert try_engine("half", "cpu", "float32") == "off by 5.0e-01 of the largest value, 1e-05 is allowed"


def test_an_error_that_is_none_of_ours_is_named_with_its_kind(monkeypatch):
    monkeypatch.setitem(ENGINES, "absent", lambda *_: {}["triton"])
    assert try_engine("absent", "cpu", "float32") == "KeyError: 'triton'"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_why_the_reference_is_off_in_16_bits_is_said_where_it_is(lang):
    def told(**engines):
        row = {"device": "cpu", "dtype": "float16", "auto": "cpu", "reason": "", "engines": {"cpu": True, **engines}}
        return any(
            getattr(part, "renderable", None) == WORDS[lang]["reference"] for part in _engines([row], WORDS[lang])
        )

    assert told(reference="off by 1.0e-02 of the largest value, 4e-03 is allowed")
    assert not told(reference=True)


def test_without_the_seam_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    seam = transformers_seam()
    assert not seam["known"]
    assert "transformers.integrations.moe" in seam["reason"]


@pytest.mark.parametrize(
    ("isa", "onednn", "expected"),
    [
        (["avx512f", "avx512_bf16"], "Intel AVX-512 with Intel DL Boost", True),
        (["avx512f", "avx512_bf16"], "Intel AVX-512 with Intel DL Boost and bfloat16 support", False),
        (["avx512f"], "Intel AVX-512 with Intel DL Boost", False),
        (["amx_bf16"], "unknown", False),
    ],
)
def test_a_limit_on_onednn_is_noticed(isa, onednn, expected):
    assert held_back({"isa": isa, "onednn_isa": onednn}) == expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_what_onednn_uses_is_known_where_it_refuses_bfloat16_too(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert onednn_isa() != "unknown"


@pytest.fixture
def small(monkeypatch):
    for name, value in {"OUT": 64, "IN": 32, "ROUNDS": 1, "SQUARE": 16, "ROWS": (1, 4)}.items():
        monkeypatch.setattr(forms, name, value)
    monkeypatch.setattr(forms, "l3_bytes", lambda: 1 << 16)
    monkeypatch.setattr("moesaic.bench.ceiling.read_speed", lambda: 1e9)
    monkeypatch.setattr(forms.time_forms, "__defaults__", ((1, 4),))


@pytest.mark.usefixtures("small")
def test_measures_name_the_fastest_form_and_the_engine_s(run):
    code, out, err = run("--json", "--measure")
    measured = json.loads(out)["measured"]
    assert code == 0
    assert "Measuring" in err
    assert measured["read_gb_per_s"] == 1.0
    assert all(speed > 0 for speed in measured["square_gflops"].values())
    assert [(row["dtype"], row["rows"]) for row in measured["forms"]] == [
        (dtype, rows) for dtype in ("float32", "bfloat16", "float16") for rows in (1, 4)
    ]
    for row in measured["forms"]:
        assert row["us"][row["fastest"]] == min(row["us"].values())
        assert row["slower"] == pytest.approx(row["engine_us"] / row["us"][row["fastest"]])
        assert row["engine"] in {*forms.OWN, *forms.wide_forms()}
        assert forms.VECTOR in row["us"]
        assert (forms.WHOLE in row["us"]) == (row["dtype"] != "float32")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_slow_engine_is_pointed_out(lang, run, monkeypatch):
    times = [
        FormTimes("float32", rows, {forms.STRAIGHT: 1e-3, forms.TURNED: 4e-4}, taken, forms.STRAIGHT)
        for rows, taken in ((1, 1e-3), (4, 4.1e-4))
    ]
    monkeypatch.setattr(forms, "time_forms", lambda dtype: times if dtype == torch.float32 else [])
    monkeypatch.setattr(forms, "square_flops", lambda _dtype: 1e9)
    monkeypatch.setattr("moesaic.bench.ceiling.read_speed", lambda: 1e9)
    code, out, _ = run("--measure", "--lang", lang)
    assert code == 0
    assert "400 *" in out
    assert f"[{WORDS[lang]['rows']}, {forms.IN}]" in out, "brackets are not markup"
    assert WORDS[lang]["slow"].format(n=1, all=2, x=1.25) in out


@pytest.mark.parametrize("rows", [1, 5])
def test_every_form_computes_the_same(rows):
    w, x = torch.randn(700, 64, dtype=torch.bfloat16).mT, torch.randn(rows, 64)
    for label, form in {**forms.OWN, **forms.wide_forms()}.items():
        out = torch.full((rows, 700), torch.nan)
        form(x, w if label in forms.wide_forms() else w.float(), out, memory.Workspace())
        torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("label", [*forms.OWN, *forms.wide_forms()])
def test_the_engine_s_form_is_seen_from_what_it_runs(label, monkeypatch, with_threads):
    """Whatever the engine's tables say, now or later, is named rightly, in the weight's own dtype and in another."""
    with_threads(2)
    form, x = {**forms.OWN, **forms.wide_forms()}[label], torch.randn(2, 1024).bfloat16()
    w = torch.randn(2100, 1024).bfloat16().mT
    if label in forms.OWN:
        w = w.float()
    monkeypatch.setattr("moesaic.engine.multiply.matmul_dtype", lambda _dtype: torch.float32)
    monkeypatch.setattr("moesaic.engine.multiply.narrow_table", lambda _w, _dtype: ())
    monkeypatch.setattr("moesaic.engine.multiply.table_for", lambda _dtype, _w: ((ANY, form),))
    assert engine_form(x, w) == label
    if label in forms.OWN:
        needs_onednn(*([torch.bfloat16] if label == forms.ONEDNN else []))
        monkeypatch.setattr("moesaic.engine.multiply.narrow_table", lambda _w, _dtype: ((ANY, form),))
        assert engine_form(x, w.bfloat16()) == label


@pytest.mark.usefixtures("small")
def test_weights_fill_the_cache_twice_or_a_quarter_of_memory(monkeypatch):
    one = 64 * 32 * 4
    assert len(forms._weights(torch.float32)) == 2 * (1 << 16) // one + 1
    monkeypatch.setattr(forms, "available_bytes", lambda: 4 * 5 * one)
    assert len(forms._weights(torch.float32)) == 6
    assert [times.rows for times in time_forms(torch.float32, (2, 3))] == [2, 3]
