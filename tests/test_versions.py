"""What reports, logs and records say of the programs that made them."""

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

import torch
from packaging.version import Version

import moesaic
from moesaic.versions import versions

ROOT = Path(__file__).parents[1]


def test_torch_is_named_with_its_build_and_packages_as_far_as_they_are_installed(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")  # pip knows this one as 2.15.0
    assert list(versions("numpy", "no-such-package").items()) == [
        ("moesaic", moesaic.__version__),
        ("python", platform.python_version()),
        ("torch", "2.15.0+cu132"),
        ("numpy", importlib.metadata.version("numpy")),
    ]


def test_the_oldest_releases_that_are_tested_are_the_oldest_that_are_admitted():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *tables["dependencies"],
        *tables["optional-dependencies"]["train"],
        *tables["optional-dependencies"]["dev"],
    ]
    admitted = {
        name: Version(least) for name, least in (re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in asked)
    }
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    tested = {name: Version(version) for name, version in pins if name != "pyparsing"}
    assert tested == {name: least for name, least in admitted.items() if name not in ("ruff", "pyrefly")}
