"""Tables in a terminal of 80 columns: numbers and names stand whole."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from cases import v3
from rich.console import Console, Group
from rich.table import Table

from moesaic import rules
from moesaic.cli.models import models
from moesaic.trace.compare.diff import diff
from moesaic.trace.compare.diff_table import diff_table
from moesaic.trace.reroute.what_if import what_if
from moesaic.trace.reroute.what_if_table import what_if_table
from moesaic.trace.statistics.coselection import coselection
from moesaic.trace.statistics.load_table import load_table, preference_table
from moesaic.trace.statistics.preference import domain_preference
from moesaic.trace.statistics.stability import stability
from moesaic.trace.statistics.stats import layer_reports, stats
from moesaic.trace.statistics.tables import coselection_table, layers_table, numbers_table, stability_table
from moesaic.trace.store import Trace

CONFIG = v3(32, 4, 2, 4)
N_TOKENS = 4000


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Of four domains, with experts that prefer one, pairs that go together, and scores."""
    draw = torch.Generator().manual_seed(0)
    sequences = torch.arange(N_TOKENS) * 40 // N_TOKENS
    routings, biases = {}, {}
    for layer in range(2):
        logits = torch.randn(N_TOKENS, 32, generator=draw)
        logits[:, :8] += 2 * torch.nn.functional.one_hot(sequences % 4, 8).float()
        logits[:, 9] += logits[:, 8]
        bias = torch.randn(32, generator=draw) * 0.01
        routings[f"model.layers.{layer}.mlp"], biases[f"model.layers.{layer}.mlp"] = (
            rules.route(logits, bias, CONFIG),
            bias,
        )
    labels = tuple(("english_verse", "chinese_verse", "manual", "python")[i % 4] for i in range(40))
    return Trace.from_routings(routings, CONFIG, biases, sequences=sequences, labels=labels)


def parts(renderable) -> Iterator[Table]:
    if isinstance(renderable, Group):
        for part in renderable.renderables:
            yield from parts(part)
    elif isinstance(renderable, Table):
        yield renderable


def assert_whole(renderable) -> None:
    """Every word of every cell but those of the last column, which may go on anywhere, stands in one line."""
    console = Console(width=80, no_color=True)
    tables = list(parts(renderable))
    assert tables
    for table in tables:
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert max(map(len, text.splitlines())) <= 80
        for column in table.columns[:-1]:
            words = {word for cell in column.cells for word in str(cell).split()}
            assert not {word for word in words if word not in text}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_numbers_and_names_of_a_record_stand_whole(trace, lang):
    run = stats(trace, capacity=[1.0, 1.25, 12.125], nodes=4)
    assert_whole(numbers_table(run, lang))
    assert_whole(load_table(layer_reports(trace), lang))
    assert_whole(preference_table(domain_preference(trace, permutations=199), lang))
    assert_whole(coselection_table(coselection(trace), lang))
    dropped = what_if(trace, drop_experts=[7], nodes=4)
    assert_whole(what_if_table(dropped, lang))
    assert_whole(diff_table(diff(trace, dropped.trace), lang))
    assert_whole(stability_table(stability(trace, dropped.trace), lang))
    if lang == "en":  # verdicts are words, which Chinese does not part by spaces
        assert_whole(layers_table(run, lang))


@pytest.mark.parametrize("name", [None, "deepseek-v3", "gpt_oss", "mixtral"])
def test_what_is_known_of_models_stands_whole(name, monkeypatch):
    drawn = []
    monkeypatch.setattr(Console, "print", lambda _, what, **__: drawn.append(what))
    models(name)
    monkeypatch.undo()
    tables = [what for what in drawn if isinstance(what, Table)]
    assert tables
    for table in tables:
        assert_whole(table)


def test_a_name_that_is_too_long_for_a_line_goes_on_in_the_next(trace):
    long = "encoder." + "x" * 48 + ".0"
    text = diff_table(diff(*[dataclasses.replace(trace, layers=(long, "layers.1"))] * 2))
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(text)
    joined = "".join(line.split()[0] for line in capture.get().splitlines() if line.strip())
    assert "x" * 48 in joined
