"""Every family of the installed transformers that takes experts implementations: served or refused, as the page says.

`python tests/test_hf_families.py --write` writes the table into the pages.
"""

import argparse
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import relative
from packaging.version import Version
from torch import nn

from moesaic.cli.models import WORDS
from moesaic.families import ENGINE
from moesaic.hf.experts import experts_forward, serve

MODELS = Path(transformers.__file__).parent / "models"
ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*/hf-drop-in.md"))
TABLE = re.compile(r"(?<=<!-- families of transformers )(?P<version>[\d.]+) -->\n\n(?P<rows>(?:\|[^\n]*\n)+)")
# for configs that leave open how large their experts are; ernie4_5_vl_moe's experts are given their width
SIZES = {"num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 6}


def families() -> list[str]:
    """Names of the folders of models whose experts take an implementation by name."""
    paths = sorted(MODELS.glob("*/modeling_*.py"))
    return [path.parent.name for path in paths if "@use_experts_implementation" in path.read_text()]


def classes_in(module, base: type) -> list[type]:
    found = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, base)]
    return [cls for cls in found if cls.__module__ == module.__name__]


@cache
def experts_of(family: str) -> tuple[nn.Module, ...]:
    """The experts modules of a family, without memory behind their weights."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    classes = [cls for cls in classes_in(modeling, nn.Module) if "_apply_gate" in vars(cls)]
    return tuple(built(cls, classes_in(configs, transformers.PreTrainedConfig)) for cls in classes)


def built(cls: type, configs: list[type]) -> nn.Module:
    """Experts of this class, from the first config of the family that has what they ask for."""
    errors = []
    for config in sorted(configs, key=lambda config: "Text" not in config.__name__):
        for sizes, width in (({}, ()), (SIZES, ()), ({}, (6,))):
            try:
                with torch.device("meta"):
                    return cls(config(**sizes), *width)
            except Exception as error:  # each config has its own way to miss a field
                errors.append(f"{config.__name__}: {error}")
    raise AssertionError(f"{cls.__name__}: {'; '.join(errors)}")


def made_small(experts: nn.Module, n: int = 4, hidden: int = 8, width: int = 6) -> nn.Module:
    """The same module with n experts of random weights."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = 2 * width if experts.has_gate else width
    shapes = {up: (n, rows, hidden), "down_proj": (n, hidden, width)}
    for name, (_, out, into) in shapes.items():
        shape = (n, into, out) if experts.is_transposed else (n, out, into)
        setattr(experts, name, nn.Parameter(torch.randn(shape)))
        if experts.has_bias:
            setattr(experts, name + "_bias", nn.Parameter(torch.randn(n, out)))
    experts.num_experts = n
    experts.config._experts_implementation = "eager"
    return experts


def judged(experts: nn.Module) -> str:
    """What we say of experts: what they compute, or why not."""
    try:
        spec, has_bias, *_ = serve(experts)
    except ValueError as error:
        return "refused: " + str(error).split(": moesaic")[0].split(" ", 1)[1]
    numbers = {"limit": None, "alpha": 1.0, "up_offset": 0.0, "gate_softcap": None, "up_softcap": None}
    words = [f"{name}={getattr(spec, name):g}" for name, usual in numbers.items() if getattr(spec, name) != usual]
    words += [name for name in ("interleaved", "transposed") if getattr(spec, name)]
    return ", ".join([f"`{spec.activation}`", *words, *["biases"] * has_bias, *["not gated"] * (not spec.gated)])


def rows(lang: str) -> str:
    """The table: what is computed, and by which families; the refused last, in words of the page."""
    words = WORDS[lang]["verdicts"]
    by_verdict: dict[str, list[str]] = {}
    for family in families():
        for verdict in {judged(experts): None for experts in experts_of(family)}:
            by_verdict.setdefault(verdict, []).append(family)
    ordered = sorted(by_verdict.items(), key=lambda item: (item[0].startswith("refused"), -len(item[1]), item[0]))
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {words.get(verdict, verdict)} | {', '.join(names)} |" for verdict, names in ordered),
    ]
    return "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("family", families())
def test_the_served_compute_what_their_own_forward_computes(family):
    for experts in map(made_small, experts_of(family)):
        if judged(experts).startswith("refused"):
            pytest.skip(judged(experts))
        leaves = [torch.randn(9, 8).mul_(3).requires_grad_(), torch.rand(9, 2).requires_grad_(), *experts.parameters()]
        tokens, weights = leaves[:2]
        ids = torch.rand(9, 4).topk(2).indices
        theirs, ours = experts(tokens, ids, weights), experts_forward(experts, tokens, ids, weights)
        assert relative(ours.detach(), theirs.detach()) < 1e-5
        direction = torch.randn_like(theirs)
        pairs = zip(
            torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
        )
        assert max(relative(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_page_lists_every_family(page):
    table = TABLE.search(page.read_text())
    if Version(transformers.__version__) < Version(table["version"]):
        pytest.skip(f"the page lists the families of transformers {table['version']}")
    assert table["version"] == transformers.__version__
    assert table["rows"] == rows(page.parent.name)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_first_pages_count_the_families_that_are_served(page):
    served = sum(not verdict.startswith("refused") for verdict in ENGINE.values())
    assert f"{served} of the {len(ENGINE)} families" in (ROOT / page).read_text("utf-8")


def write(page: Path) -> None:
    page.write_text(
        TABLE.sub(lambda _: f"{transformers.__version__} -->\n\n{rows(page.parent.name)}", page.read_text())
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    for page in PAGES:
        write(page)
