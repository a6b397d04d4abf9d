"""`moesaic models`: what it says of names is so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import runner
from packaging.version import Version

from moesaic.cli.models import models
from moesaic.config import MoEConfig
from moesaic.families import (
    ALIASES,
    BY_THEMSELVES,
    CONVENTIONS,
    ENGINE,
    EXPERTS,
    FAMILIES,
    FAMILY_OF,
    FIXED,
    PRESETS,
    ROUTING,
    SPELLINGS,
)

PAGE = Path(__file__).parents[1] / "docs" / "en" / "hf-drop-in.md"


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys, models=models)


def test_served_and_refused_families_are_those_of_the_page():
    """The page is checked against the installed transformers (test_hf_families)."""
    rows = re.findall(r"^\| (`\w+`[^|]*|refused: [^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    page = {verdict.strip().replace("`", ""): set(names.replace(",", "").split()) for verdict, names in rows}
    assert {verdict: set(names.split()) for verdict, names in EXPERTS.items()} == page
    told = re.search(r"take no implementation: ([^.]*)\.", PAGE.read_text())[1]
    assert set(told.replace(",", " ").split()) == set(BY_THEMSELVES)


@pytest.mark.parametrize("family", SPELLINGS)
def test_spellings_are_those_of_transformers(family):
    """Every spelling is a field of the family's config that `from_hf` reads, and no field is left out."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the spellings are those of transformers 5.23")

    given = CONFIG_MAPPING[family]().to_dict()
    for field, own in SPELLINGS[family].items():
        spelled = own or field
        known = given.keys() | CONFIG_MAPPING[family].attribute_map.keys()
        assert spelled in known, f"{family} has no {spelled}"
        assert spelled in ALIASES.get(field, (field,))
    fields = MoEConfig.preset("deepseek-v3").to_dict()
    told = {f for f in fields if any(alias in given for alias in ALIASES.get(f, (f,)))} - set(FIXED.get(family, ()))
    assert set(SPELLINGS[family]) == told


def test_presets_belong_to_families_with_the_same_rule():
    for preset, family in FAMILY_OF.items():
        config = MoEConfig.preset(preset)
        spelled = SPELLINGS[family]
        assert all(getattr(config, f) == v for f, v in FAMILIES[family].items() if f not in spelled), preset
        assert family in ENGINE


def test_json_holds_everything(run):
    code, out, err = run("models", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["presets"].keys() == PRESETS.keys()
    assert found["presets"]["deepseek-v3"] == MoEConfig.preset("deepseek-v3").to_dict()
    assert found["aliases"] == {name: list(spelled) for name, spelled in ALIASES.items()}
    assert found["conventions"].keys() == CONVENTIONS.keys()
    assert found["conventions"]["deepspeed"] == {"router_dtype": "model"}
    assert FAMILIES.keys() <= found["families"].keys()
    assert found["experts"]["muse_spark"].startswith("refused")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_overview_names_everything(run, lang):
    code, out, err = run("models", "--lang", lang)
    assert (code, err) == (0, "")
    words = set(re.findall(r"[\w-]+", out))
    for name in (*PRESETS, *FAMILIES, *CONVENTIONS, *ENGINE, *BY_THEMSELVES, *ALIASES, *sum(ALIASES.values(), ())):
        assert name in words, name
    assert ("预设" in out) == (lang == "zh")


def test_a_preset_shows_every_field_with_its_value_and_spelling(run):
    code, out, _ = run("models", "mixtral")
    assert code == 0
    rows = {(cells := line.split())[0]: cells[1:] for line in out.splitlines() if line.startswith(" ") and line.strip()}
    for name, value in MoEConfig.preset("mixtral").to_dict().items():
        assert rows[name][0] == str(value)
    assert rows["n_routed_experts"][1] == "num_local_experts"
    assert rows["moe_intermediate_size"][1] == "intermediate_size"
    assert " ".join(rows["topk_method"][1:]) == "the family's rule"
    assert rows["output_size"][1:] == []
    found = json.loads(run("models", "mixtral", "--json")[1])
    assert found["fields"] == MoEConfig.preset("mixtral").to_dict()
    assert found["spellings"]["n_routed_experts"] == "num_local_experts"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek-v3", "its experts are computed: silu"),
        ("muse_spark", "its experts are refused: normalises the output"),
        ("dbrx", "computed by the family itself"),
        ("phimoe", "How this family routes is not known here"),
        ("qwen3_moe", "num_experts"),
        ("megatron", "group_score=k_over_m_sum"),
        ("classic", "relu"),
        ("kimi_k2", "noaux_tc"),
        ("openai_privacy_filter", "1/K"),
    ],
)
def test_every_kind_of_name_is_answered(run, name, said):
    code, out, _ = run("models", name)
    assert code == 0
    assert said in out
    assert run("models", name, "--lang", "zh")[0] == 0
    assert json.loads(run("models", name, "--json")[1])["kind"] in ("preset", "family", "convention")


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTING])
def test_no_family_whose_rule_is_known_is_called_unknown(run, family):
    for name in {family, family.removesuffix("_text")}:
        code, out, _ = run("models", name)
        assert code == 0
        assert "not known here" not in out, name
        found = json.loads(run("models", name, "--json")[1])
        assert found["kind"] == "preset" or found["rule"]


def test_unknown_names_and_languages_are_mistakes(run):
    code, out, err = run("models", "gpt-5")
    assert (code, out) == (2, "")
    assert "NAME 'gpt-5' is unknown: use a preset (deepseek-v3" in err
    assert run("models", "--lang", "fr")[0] == 2


def test_commands_load_nothing_heavy_for_their_help():
    code = "import moesaic.cli.models, moesaic.cli.trace, moesaic.cli.import_, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "numpy", "matplotlib"}
