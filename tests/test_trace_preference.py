import dataclasses
import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from cases import v3

from moesaic.trace.statistics import preference
from moesaic.trace.statistics.preference import Untestable, domain_preference, sequence_loads
from moesaic.trace.store import Trace
from moesaic.types import Routing

CONFIG = v3(32, 4, 2, 4)
DOMAINS = ("poem", "prose", "code", "诗")


def made(n_layers=2, n_sequences=40, length=60, own=0.7, lift=0.0, labels=None) -> Trace:
    """Sequences with habits of their own (`own`), as texts have; expert 7 gains `lift` in code."""
    labels = labels or tuple(DOMAINS[i % 4] for i in range(n_sequences))
    scores = torch.randn(n_layers, n_sequences, 1, 32) * own + torch.randn(n_layers, n_sequences, length, 32)
    scores[:, [label == "code" for label in labels], :, 7] += lift
    ids = scores.flatten(1, 2).topk(4).indices
    routings = {f"layers.{i}": Routing(None, torch.ones(layer.shape), layer) for i, layer in enumerate(ids)}
    sequences = torch.arange(n_sequences).repeat_interleave(length)
    return Trace.from_routings(routings, CONFIG, sequences=sequences, labels=labels)


def test_loads_by_document_add_up_to_the_load():
    trace = made(3, 5, 7)
    for layer in range(3):
        loads = sequence_loads(trace.picks[layer].numpy(), 32, trace.sequences.numpy())
        assert loads.sum(-1).tolist() == [28] * 5
        assert loads.sum(0).tolist() == np.bincount(trace.picks[layer].flatten(), minlength=32).tolist()


def test_sequences_with_habits_but_without_domains_give_no_findings():
    runs = [domain_preference(made(), permutations=300, seed=run).found().any() for run in range(40)]
    assert np.mean(runs) <= 0.15  # 5 % expected, 40 runs


def test_the_smallest_p_value_of_a_null_run_is_spread_evenly():
    """The corrected p of the strongest pair is uniform where there is nothing to find: not only rarely below 0.05."""
    least = [domain_preference(made(1, 24, 20), permutations=200, seed=run).p_value.min() for run in range(120)]
    assert np.mean(np.array(least) <= 0.5) == pytest.approx(0.5, abs=0.15)


def test_few_shuffles_give_no_more_false_findings():
    """With 19, p = 0.05 says that the true labels lead all 20 labellings: one null run in 20. A spread that leaves the
    true labels out, and is of 19 numbers, made that more than half of all runs."""
    runs = [domain_preference(made(2, 40, 20), permutations=19, seed=run).found().any() for run in range(100)]
    assert np.mean(runs) <= 0.12


def test_what_one_document_does_is_no_finding():
    """Every document has an expert that it alone uses much, and one document is a domain. Most often no shuffle of
    60 deals it there: in spreads of the shuffles alone, its expert would lie far out."""
    document, token = torch.arange(100).repeat_interleave(20), torch.arange(20).repeat(100)
    own = torch.where(token < 10, document, (document + 7 * token) % 100)  # and ten others use it once
    trace = Trace.from_routings(
        {"a": Routing(None, torch.ones(2000, 1), own[:, None])}, v3(100, 1, 1, 1), sequences=document
    )
    p = [domain_preference(trace, "x" + 99 * "y", permutations=60, seed=seed).p_value.min() for seed in range(20)]
    assert np.mean(np.array(p) <= 0.05) <= 0.2


def test_tokens_as_units_would_find_preferences_that_are_not_there():
    """The same null data, each token called a sequence: why the unit must be the sequence."""
    trace = made(2, 40, 60)
    per_token = Trace.from_routings(
        {name: trace.layer(i) for i, name in enumerate(trace.layers)}, CONFIG, sequences=torch.arange(len(trace))
    )
    labels = [trace.labels[s] for s in trace.sequences.tolist()]
    assert domain_preference(per_token, labels, permutations=200).found().any()
    assert not domain_preference(trace, permutations=200).found(0.01).any()


def test_a_planted_preference_is_found_and_named():
    found = domain_preference(made(lift=1.5))
    assert found.found()[:, 7].all()
    assert [found.domains[d] for d in found.domain[:, 7]] == ["code", "code"]
    assert (found.lift[:, 7] > 1.5).all()
    others = np.delete(found.found(), 7, axis=1)
    assert others.mean() < 0.05  # experts that 7 displaces may follow
    assert found.p_value.min() == pytest.approx(1 / 1001)


def test_what_was_found_reads_back_as_plain_numbers():
    found = domain_preference(made(lift=1.5))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["permutations"] == 1000
    assert len(read["preferences"]) == found.found().sum()
    rows = {(row["layer"], row["expert"]): row for row in read["preferences"]}
    assert rows["layers.1", 7] == {
        "layer": "layers.1",
        "expert": 7,
        "domain": "code",
        "lift": found.lift[1, 7],
        "p_value": found.p_value[1, 7],
    }


def test_rates_are_those_of_a_loop_over_the_tokens_that_were_compared():
    trace = made(n_sequences=12, length=20)
    found = domain_preference(trace, permutations=99)
    assert found.rates.shape == (2, 4, 32)
    for layer, index in ((0, 0), (1, 2)):
        of_domain = [trace.labels[s] == found.domains[index] for s in trace.sequences.tolist()]
        picks = trace.picks[layer][torch.tensor(of_domain)]
        assert found.rates[layer, index] == pytest.approx([int((picks == e).sum()) / len(picks) for e in range(32)])
    assert found.rates.sum(-1) == pytest.approx(np.full((2, 4), 4.0))


def test_preferences_in_the_console_are_two_sentences_and_in_a_notebook_a_table():
    found = domain_preference(made(lift=1.5))
    number = int(found.found().sum())
    said = f"{number} of 64 experts prefer a domain beyond chance (p <= 0.05, corrected), most of all layers."
    assert repr(found).startswith(said)
    assert f"e7 code ({found.lift[:, 7].max():.2f}x)" in repr(found)
    assert len(repr(found)) < 300
    none = dataclasses.replace(found, p_value=np.ones((2, 32)))
    assert repr(none).startswith("0 of 64 experts prefer a domain beyond chance (p <= 0.05, corrected)\n")
    html = dataclasses.replace(found, domains=("<b>", *found.domains[1:]))._repr_html_()
    assert f"e7:{found.lift[0, 7]:.1f}x" in html
    assert "显著性水平" in html
    assert "<b>" not in html


def test_lift_is_the_rate_in_the_domain_over_the_rate_in_all_text():
    ids = torch.tensor([[0, 1, 2, 3]] * 8 + [[0, 4, 5, 6]] * 8)
    trace = Trace.from_routings(
        {"a": Routing(None, torch.ones(16, 4), ids)}, CONFIG,
        sequences=torch.arange(8).repeat_interleave(2), labels=("x",) * 4 + ("y",) * 4,
    )  # fmt: skip
    found = domain_preference(trace)
    assert found.lift[0, 1] == pytest.approx(2.0)
    assert found.domains[found.domain[0, 1]] == "x"
    assert found.domains[found.domain[0, 4]] == "y"
    assert found.p_value[0, 0] == 1.0  # always used, so nowhere more
    assert np.isnan(found.lift[0, 31])
    assert found.p_value[0, 31] == 1.0  # never used
    assert found.p_value[0, 1] == pytest.approx(2 / 70, abs=0.015)  # with x for y the statistic is the same


def test_sequences_of_different_length_are_compared_by_rate():
    labels = tuple(DOMAINS[i % 4] for i in range(40))
    trace = made(labels=labels)
    position = torch.arange(len(trace)) % 60
    is_code = torch.tensor([labels[s] == "code" for s in trace.sequences.tolist()])
    short_code = trace.select(~is_code | (position < 15))
    assert not domain_preference(short_code).found(0.01).any()


@pytest.mark.parametrize(
    ("short", "long", "tokens", "documents"),
    [
        ([20] * 30, [200] * 30, 20, (30, 30)),
        ([2] * 9 + [60] * 11, [200] * 40, 60, (11, 40)),
        (range(10, 130, 4), range(30, 330, 5), 42, (22, 57)),
    ],
    ids=["one length", "some very short", "mixed"],
)
def test_a_domain_of_shorter_documents_is_not_preferred_for_its_scatter(short, long, tokens, documents):
    """Random picks, so nothing to find: rates of 20 tokens scatter more than those of 200. While shuffles mixed both,
    every null run found something."""
    length = torch.tensor([*short, *long])
    document = torch.arange(len(length)).repeat_interleave(length)
    document = document[torch.randperm(len(document))]  # as in batches, where sequences lie side by side
    runs = []
    for run in range(30):
        ids = torch.rand(len(document), 32).topk(4).indices
        trace = Trace.from_routings({"a": Routing(None, torch.ones(ids.shape), ids)}, CONFIG, sequences=document)
        found = domain_preference(trace, "s" * len(short) + "l" * len(long), permutations=200, seed=run)
        runs.append(found.found().any())
    assert (found.tokens, found.documents) == (tokens, documents)
    assert np.mean(runs) <= 0.2


def test_long_documents_are_not_preferred_where_too_few_would_be_left():
    """One of five documents is 100 times as long: by its length alone 1 would be compared with 1."""
    length = torch.tensor(([40] * 4 + [4000]) * 2)
    ids = torch.rand(int(length.sum()), 32).topk(4).indices
    trace = Trace.from_routings(
        {"a": Routing(None, torch.ones(ids.shape), ids)}, CONFIG, sequences=torch.arange(10).repeat_interleave(length)
    )
    found = domain_preference(trace, "a" * 5 + "b" * 5, permutations=50)
    assert (found.tokens, found.documents) == (40, (5, 5))


def test_the_first_tokens_of_each_document_count():
    """Expert 0 in the first 3 tokens of the documents of x, expert 1 in those of y, which go on with 0."""
    ids = torch.tensor(([0] * 3) * 8 + ([1] * 3 + [0] * 7) * 8)[:, None]
    sequences = torch.arange(16).repeat_interleave(torch.tensor([3] * 8 + [10] * 8))
    trace = Trace.from_routings({"a": Routing(None, torch.ones(ids.shape), ids)}, v3(4, 1, 1, 1), sequences=sequences)
    for order in (slice(None), sequences.argsort(descending=True, stable=True)):
        found = domain_preference(trace.select(order), "x" * 8 + "y" * 8)
        assert found.tokens == 3
        assert found.lift[0, :2].tolist() == [2.0, 2.0]
        assert [found.domains[found.domain[0, e]] for e in (0, 1)] == ["x", "y"]


def test_the_same_seed_gives_the_same_numbers():
    trace = made()
    assert np.array_equal(domain_preference(trace, seed=3).p_value, domain_preference(trace, seed=3).p_value)


def test_five_layers_and_a_thousand_permutations_take_no_time():
    trace = made(5, 64, 128)
    start = time.perf_counter()
    domain_preference(trace)
    assert time.perf_counter() - start < 1.0


def test_a_test_in_pieces_is_the_test_in_one(monkeypatch):
    trace = made()
    whole = domain_preference(trace, permutations=100)
    monkeypatch.setattr(preference, "CELLS", 2000)
    pieces = domain_preference(trace, permutations=100)
    assert np.array_equal(whole.domain, pieces.domain)
    assert np.array_equal(whole.p_value, pieces.p_value)
    assert whole.lift == pytest.approx(pieces.lift, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "n_domains", "least"),
    [
        ("abab", 2, "0.33"),
        ("ababab", 2, "0.1"),  # 20 labellings, but with all a for b, and all b for a, the statistic is the same
        ("aabbcc", 3, "0.2"),
        ("a" + "b" * 19, 2, "0.05"),  # in the mean, and below it for half of all seeds
        ("abcdefghijklmnopqrst", 20, "1"),  # as of files with a label each
    ],
)
def test_documents_that_cannot_give_a_small_p_are_refused(labels, n_domains, least):
    n = len(labels)
    message = (
        f"no preference among {n} documents in {n_domains} domains could have a p-value below {least}, and alpha is"
    )
    with pytest.raises(Untestable, match=message) as no:
        domain_preference(made(1, n, 5), labels, permutations=20)
    assert f"{n} 个文档分属 {n_domains} 个领域，任何偏好的 p 值都不会低于 {least}，" in no.value.words["zh"]


@pytest.mark.parametrize("labels", ["aaabbbb", "aabbccc", "a" + "b" * 24])
def test_the_fewest_documents_that_are_tested_can_be_significant(labels):
    """Four experts for the last domain and four for all the others: nothing could be clearer."""
    own = torch.tensor([4 * (label == labels[-1]) for label in labels])
    ids = (own[:, None] + torch.arange(4)).repeat_interleave(9, 0)
    trace = Trace.from_routings(
        {"a": Routing(None, torch.ones(ids.shape), ids)},
        CONFIG,
        sequences=torch.arange(len(labels)).repeat_interleave(9),
    )
    p = [domain_preference(trace, labels, seed=seed).p_value.min() for seed in range(5)]
    assert np.mean(p) < 0.05


def test_what_is_within_reach_is_what_alpha_asks_for():
    """4 documents of 8 have one of 70 labellings, and so has the other half: a p-value of 2/70 at least."""
    eight, six = made(1, 8, 5), made(1, 6, 5)
    assert domain_preference(eight, "ab" * 4, alpha=0.03).permutations == 1000
    with pytest.raises(Untestable, match=r"8 documents .* below 0\.029, and alpha is 0\.01: give more documents a"):
        domain_preference(eight, "ab" * 4, alpha=0.01)
    assert domain_preference(six, "ab" * 3, alpha=0.2).documents == (3, 3)
    few = {"permutations": 19, "alpha": 0.04}
    with pytest.raises(Untestable, match=r"of 19 permutations no p-value is below 0\.05, and alpha is 0\.04") as no:
        domain_preference(made(1, 40, 5), **few)
    assert no.value.words["zh"] == "置换 19 次，p 值不会低于 0.05，而 alpha 是 0.04"
    with pytest.raises(ValueError, match=r"alpha=0 must lie between 0 and 1"):
        domain_preference(eight, "ab" * 4, alpha=0)


def test_memory_grows_neither_with_documents_times_domains_nor_with_labels_that_have_no_tokens(monkeypatch):
    """600 documents of 150 domains, the last of a million sequences: members of domains in 201 shuffles are 72 MB."""
    monkeypatch.setattr(preference, "CELLS", 300_000)
    trace = made(1, 600, 2)
    trace = dataclasses.replace(trace, sequences=trace.sequences + 999_400, labels=None)
    labels = tuple(map(str, np.arange(1_000_000) % 150))
    tracemalloc.start()
    domain_preference(trace, labels, permutations=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_what_cannot_be_tested_is_refused():
    trace = made(1, 4, 5)
    with pytest.raises(ValueError, match="3 labels for 4 sequences: give one label a sequence"):
        domain_preference(trace, ["a", "b", "a"])
    with pytest.raises(ValueError, match="1 domain with tokens: a preference needs at least two"):
        domain_preference(trace, ["a"] * 4)
    with pytest.raises(
        ValueError, match=r"no preference among 4 documents in 2 domains could have a p-value below 0\.33"
    ):
        domain_preference(trace, ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="permutations=0 gives no p-value: use 1000"):
        domain_preference(made(1, 8, 5), permutations=0)
    empty = trace.select(slice(0, 0))
    with pytest.raises(ValueError, match="0 domains with tokens"):
        domain_preference(empty)
    unlabelled = Trace.from_routings({"a": trace.layer(0)}, CONFIG, sequences=trace.sequences)
    with pytest.raises(ValueError, match="no domain labels"):
        domain_preference(unlabelled)
