"""Experts chosen together, and how alike two recordings of the same tokens are."""

import dataclasses
import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch
from cases import v3
from rich.console import Console

from moesaic import rules
from moesaic.trace.chance.documents import Documents
from moesaic.trace.compare.diff import diff
from moesaic.trace.reroute.what_if import what_if
from moesaic.trace.statistics import coselection as coselection_module
from moesaic.trace.statistics.coselection import coselection, count_pairs, pair_rates
from moesaic.trace.statistics.preference import domain_preference
from moesaic.trace.statistics.stability import set_agreement, stability
from moesaic.trace.statistics.stats import stats
from moesaic.trace.statistics.tables import coselection_table, stability_table
from moesaic.trace.store import Trace

CONFIG = v3(32, 4, 2, 4)


def traced(picks: torch.Tensor, config=CONFIG, documents: int = 1, **fields) -> Trace:
    n_layers, n_tokens, _ = picks.shape
    return Trace(
        picks=picks.to(torch.int16),
        layers=tuple(f"model.layers.{i}.mlp" for i in range(n_layers)),
        configs=(config,) * n_layers,
        sequences=torch.arange(n_tokens) * documents // max(n_tokens, 1),
        **fields,
    )


def random_picks(config, *shape: int) -> torch.Tensor:
    return rules.select(torch.rand(int(np.prod(shape)), config.n_routed_experts), config).view(*shape, -1)


def shown(renderable) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("codes", [1, 100, 10**6])
def test_pairs_are_counted_as_a_loop_counts_them(codes, monkeypatch):
    monkeypatch.setattr(coselection_module, "CODES", codes)
    picks = torch.stack([torch.randperm(9)[:3] for _ in range(90)])  # 8 experts, id 8 is none
    sequences = torch.randint(0, 7, (90,))
    trace = dataclasses.replace(traced(picks[None], v3(8, 2, 2, 3)), sequences=sequences)
    counts = count_pairs(trace.picks[0].numpy(), 8, Documents.of(trace))
    per_document = np.zeros((7, 64))
    for token, row in enumerate(picks.tolist()):
        for a, b in itertools.combinations(sorted(e for e in row if e < 8), 2):
            per_document[sequences[token], 8 * a + b] += 1
    share = np.bincount(sequences, minlength=7) / 90
    assert counts.together.tolist() == per_document.sum(0).tolist()
    assert counts.squares.tolist() == (per_document**2).sum(0).tolist()
    assert counts.weighted == pytest.approx((per_document * share[:, None]).sum(0))


def test_memory_does_not_grow_with_the_pairs_of_one_document(monkeypatch):
    """100,000 tokens of one document have 600,000 pairs: 4.8 MB as codes, and twice that to sort them."""
    monkeypatch.setattr(coselection_module, "CODES", 12_000)
    trace = traced(random_picks(CONFIG, 1, 100_000))
    documents, picks = Documents.of(trace), trace.picks[0].numpy()
    tracemalloc.start()
    count_pairs(picks, 32, documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("config", [CONFIG, v3(12, 1, 1, 5), v3(64, 8, 3, 6)], ids=["32", "12", "64"])
def test_the_rate_of_pairs_is_that_of_random_routing(config):
    picks = random_picks(config, 60_000)
    chosen = torch.zeros(60_000, config.n_routed_experts).scatter(1, picks, 1.0)
    measured = (chosen.T @ chosen / 60_000).numpy()
    np.fill_diagonal(measured, 0.0)
    rates = pair_rates(config)
    assert rates.sum() == pytest.approx(config.num_experts_per_tok * (config.num_experts_per_tok - 1), rel=1e-6)
    group = np.arange(config.n_routed_experts) // config.experts_per_group
    inside = (group[:, None] == group) & ~np.eye(config.n_routed_experts, dtype=bool)
    assert rates[inside].mean() == pytest.approx(measured[inside].mean(), rel=0.02)


@pytest.mark.parametrize("config", [CONFIG, v3(32, 1, 1, 4)], ids=["groups", "flat"])
@pytest.mark.parametrize("alike", [1, 25])
def test_random_routing_has_no_pairs(alike, config):
    """Also where all tokens of a document choose alike, and experts differ in load."""
    found = 0
    for _ in range(40):
        scores = torch.rand(60 if alike > 1 else 1500, 32) + torch.linspace(0, 0.2, 32)
        picks = rules.select(scores, config).repeat_interleave(alike, 0)[None]
        found += bool(coselection(traced(picks, config, 60)).pairs)
    assert found <= 5  # 5 % of 40 expected, at most


@pytest.mark.parametrize("documents", [1, 60])
def test_two_experts_that_go_together_are_found(documents):
    picks = random_picks(v3(32, 1, 1, 4), 2, 3000)
    with_both = torch.rand(3000) < 0.05
    picks[1, with_both] = torch.tensor([5, 20, 1, 9])[None].repeat(int(with_both.sum()), 1)
    picks[1, with_both, 2:] = torch.stack([torch.randperm(4)[:2] + 28 for _ in range(int(with_both.sum()))])
    found = coselection(traced(picks, v3(32, 1, 1, 4), documents))
    strongest = found.pairs[0]
    pairs = {(pair.layer, pair.first, pair.second) for pair in found.pairs}
    assert (1, 5, 20) in pairs
    assert all(layer == 1 for layer, _, _ in pairs)
    assert strongest.lift > 1.5
    assert strongest.p_value <= 0.05
    assert found.by_documents == (documents == 60)
    assert found.tests == 2 * 32 * 31 // 2
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {row["layer"] for row in read["pairs"]} == {"model.layers.1.mlp"}
    said = f"{len(pairs)} of 992 pairs of experts are chosen together beyond chance, most of all layers.1"
    assert repr(found).startswith(said)
    assert f"layers.1 e{strongest.first} e{strongest.second} ({strongest.lift:.2f}x)" in repr(found)
    assert "e5 e20" in shown(found)
    assert "<td" in found._repr_html_()
    for lang in ("en", "zh"):
        assert "e5 e20" in shown(coselection_table(found, lang, 40))
        assert "+" in shown(coselection_table(dataclasses.replace(found, pairs=found.pairs * 2), lang, 1))


def test_what_has_no_pairs_is_said():
    none = coselection(traced(random_picks(CONFIG, 1, 200)))
    assert "no pair is chosen together beyond chance" in shown(coselection_table(none))
    assert "没有专家对同时被选中得超出随机" in none._repr_html_()
    assert repr(none).startswith("0 of 496 pairs of experts are chosen together beyond chance\n")
    assert coselection(traced(torch.full((1, 50, 4), 32))).pairs == ()
    assert coselection(traced(torch.zeros(1, 0, 4))).pairs == ()
    with pytest.raises(ValueError, match="num_experts_per_tok=1 leaves no pairs"):
        coselection(traced(random_picks(v3(8, 1, 1, 1), 1, 9), v3(8, 1, 1, 1)))
    with pytest.raises(
        ValueError, match="n_routed_experts=8192 has too many pairs to count: co-selection takes 4096 at"
    ):
        coselection(traced(random_picks(v3(8192, 1, 1, 4), 1, 9), v3(8192, 1, 1, 4)))
    with pytest.raises(ValueError, match="alpha=2"):
        coselection(none if isinstance(none, Trace) else traced(random_picks(CONFIG, 1, 9)), alpha=2)


# stability


def test_agreement_of_sets_is_that_of_python():
    a, b = (np.random.default_rng(seed).integers(0, 9, (300, 4)) for seed in (0, 1))
    a, b = (np.stack([np.random.default_rng(i).permutation(9)[:4] for i in range(s, s + 300)]) for s in (0, 1000))
    a[:3], b[:3] = 8, 8  # nobody
    a[3] = 8
    jaccard, same = set_agreement(a, b, 8)
    for token in range(300):
        ours, theirs = ({e for e in row[token].tolist() if e < 8} for row in (a, b))
        if not ours | theirs:
            assert np.isnan(jaccard[token])
            assert np.isnan(same[token])
        else:
            assert jaccard[token] == pytest.approx(len(ours & theirs) / len(ours | theirs))
            assert same[token] == (ours == theirs)


def test_a_trace_is_stable_against_itself_and_slots_may_differ():
    trace = traced(random_picks(CONFIG, 3, 200), documents=10)
    found = stability(trace, dataclasses.replace(trace, picks=trace.picks.flip(-1)))
    for layer in range(3):
        assert found.jaccard[layer].value == found.same_set[layer].value == 1.0
        assert found.load_correlation[layer].value == pytest.approx(1.0)
        assert not found.jaccard[layer].is_chance
    assert found.checked is False


def test_unrelated_routings_agree_as_chance_does():
    inside = dict.fromkeys(("jaccard", "same_set", "load_correlation"), 0)
    for _ in range(60):
        found = stability(traced(random_picks(CONFIG, 1, 300)), traced(random_picks(CONFIG, 1, 300)))
        for name in inside:
            inside[name] += getattr(found, name)[0].is_chance
    assert inside["jaccard"] >= 45  # 54 expected
    assert inside["load_correlation"] >= 45
    assert inside["same_set"] >= 40


def test_a_moved_checkpoint_agrees_in_part():
    logits = torch.randn(400, 32)
    before, after = (rules.select(logits + noise, CONFIG) for noise in (0.0, torch.randn(400, 32) * 0.3))
    a, b = (traced(picks[None], documents=20) for picks in (before, after))
    found = stability(a, b)
    expected = [
        len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(before.tolist(), after.tolist(), strict=True)
    ]
    assert found.jaccard[0].value == pytest.approx(np.mean(expected))
    assert found.errors[0] == pytest.approx(np.std(expected) / np.sqrt(400), rel=0.5)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["layers"][0]["jaccard"]["value"] == pytest.approx(np.mean(expected))
    for lang in ("en", "zh"):
        assert "layers.0" in shown(stability_table(found, lang))
    assert shown(found) == shown(stability_table(found))
    assert "Jaccard" in found._repr_html_()


def test_a_layer_without_data_has_no_agreement():
    a = traced(torch.full((1, 50, 4), 32))
    found = stability(a, a)
    assert found.missing == a.layers
    assert found.notes()[0] == "first record: Nothing is said of layers.0: the record has no data of it."
    assert not found.jaccard[0].is_known
    assert found.to_dict()["layers"][0]["jaccard"] is None
    assert "no data" in shown(stability_table(found))
    assert stability(traced(torch.zeros(0, 0, 4)), traced(torch.zeros(0, 0, 4))).jaccard == ()


def test_traces_of_other_tokens_are_refused_with_the_reason():
    ids = torch.arange(60)
    a = traced(random_picks(CONFIG, 2, 60), input_ids=ids, documents=3)
    other = ids.clone()
    other[7] = 99
    for b, message in (
        (traced(random_picks(CONFIG, 2, 61)), "60 tokens in one and 61 in the other"),
        (traced(random_picks(CONFIG, 1, 60)), "2 MoE layers in one and 1 in the other"),
        (traced(random_picks(v3(16, 4, 2, 4), 2, 60), v3(16, 4, 2, 4)), "32 experts in one and 16 in the other"),
        (dataclasses.replace(a, input_ids=other), "token 7 is id 7 in one and 99 in the other"),
        (dataclasses.replace(a, sequences=ids // 30), "their sequences are of other lengths, from token 20 on"),
        (dataclasses.replace(a, layers=("x\x1b.layers.4", "y")), r"the other has 'x\\\\x1b.layers.4'"),
    ):
        with pytest.raises(ValueError, match=message):
            stability(a, b)
    assert stability(a, dataclasses.replace(a, picks=a.picks.roll(1, 1))).checked is True


def test_what_is_not_known_of_the_two_records_is_said():
    a = traced(random_picks(CONFIG, 2, 60), origins=("experts", "imported"))
    b = dataclasses.replace(a, origins=("router", "router"), missing=("model.layers.7.mlp",))
    found = stability(a, b)
    assert found.notes() == [
        "first record: The picks of layers.1 come from the record of another program, not read at the experts.",
        "second record: The picks of all layers were read at the router's output, not at the experts.",
        "second record: Nothing is said of layers.7: the record has no data of it.",
        "Not both records hold token ids, so whether the tokens are the same could not be checked.",
    ]
    assert found.notes("zh")[2] == "第二份记录：对 layers.7 不作判断：记录中没有它的数据。"
    assert found.to_dict()["missing"] == ["model.layers.7.mlp"]
    assert found.to_dict()["notes"]["en"] == found.notes()
    for lang in ("en", "zh"):
        text = " ".join(shown(stability_table(found, lang)).split())
        assert all(" ".join(note.split()) in text for note in found.notes(lang))
    with pytest.raises(ValueError, match="lang='fr' is unknown"):
        found.notes("fr")
    assert repr(found).startswith("the same experts for 100.0% to 100.0% of 60 tokens, by layer\n")
    assert len(repr(found)) < 700


def test_a_token_with_an_expert_twice_is_refused_everywhere_by_name():
    trace = traced(random_picks(CONFIG, 2, 60))
    picks = trace.picks.clone()
    picks[1, 7] = torch.tensor([4, 9, 2, 9])
    twice = dataclasses.replace(trace, picks=picks, labels=("a",))
    message = "token 7 of layers.1 has expert e9 twice, which no top-k gives: correct the picks"
    for ask in (
        stats, coselection, domain_preference, what_if, lambda it: stability(trace, it), lambda it: diff(it, trace),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ask(twice)
    picks[1, 7] = torch.tensor([32, 9, 32, 2])  # the id E may stand in several slots
    stats(dataclasses.replace(trace, picks=picks))
