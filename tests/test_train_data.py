"""The shipped corpus and tokenizer, and the packing of documents into windows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.train.data import CORPUS, DOMAINS, corpus
from moesaic.train.packing import Mixture, token_stream, windows
from moesaic.train.tokenizer import END_OF_TEXT

TINY = CORPUS.parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_shares_of_the_domains_are_whole_windows_of_a_batch_of_ten():
    assert sum(domain.share for domain in DOMAINS.values()) == pytest.approx(1)
    assert all(domain.share * 10 == pytest.approx(round(domain.share * 10)) for domain in DOMAINS.values())


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_held_out_document_was_trained_on(domain):
    train, held_out = corpus(domain, "train"), corpus(domain, "held_out")
    assert len(train) + len(held_out) == len({document.title for document in train + held_out})
    assert not {document.text for document in train} & {document.text for document in held_out}
    # Nor a couplet (over 8 characters) or paragraph of one: what is in common is a title, an import or a rubric.
    long, boilerplate = (8, 0.005) if domain == "chinese_verse" else (30, 0.05)
    seen = {line.strip() for document in train for line in document.text.splitlines() if len(line) > long}
    lines = {line.strip() for document in held_out for line in document.text.splitlines() if len(line) > long}
    assert len(lines) > 300
    assert len(lines & seen) < boilerplate * len(lines)


def test_chinese_verse_has_more_than_300_thousand_characters_in_simplified_script():
    text = "".join(document.text for document in corpus("chinese_verse", "train"))
    assert len(text) > 300_000
    assert text.count("来") > 1000
    assert "來" not in text


def test_unknown_domains_and_splits_are_refused_by_name():
    with pytest.raises(ValueError, match="domain='latin' is not in the corpus: use one of english_verse"):
        corpus("latin", "train")
    with pytest.raises(ValueError, match="split='test' is unknown"):
        corpus("manual", "test")


def test_weights_tokenizer_and_corpus_stay_under_12_megabytes():
    files = [path for folder in (TINY, CORPUS) for path in Path(folder).iterdir()]
    assert 5_000_000 < sum(path.stat().st_size for path in files) < 12_000_000


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_the_tokenizer_is_lossless_on_any_unicode(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


@pytest.mark.parametrize(
    "text", ["  spaces  ,  kept .\t\r\n\n", "don 't", "春江潮水连海平，海上明月共潮生。", "é é ﬁ \u200b"]
)
def test_spaces_accents_and_widths_come_back_as_they_went_in(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer("")["input_ids"] == []
    assert len(tokenizer) == 4096
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_token_id == 0


def test_a_stream_ends_every_document_and_loses_none(tokenizer):
    documents = corpus("chinese_verse", "held_out")[:5]
    stream = token_stream(tokenizer, documents)
    assert (stream == tokenizer.eos_token_id).sum() == 6
    assert tokenizer.decode(stream) == END_OF_TEXT + "".join(text + END_OF_TEXT for _, text in documents)


@given(st.integers(2, 60), st.integers(2, 9), st.integers(0, 8))
def test_windows_predict_every_token_once_up_to_a_short_rest(size, length, offset):
    rows = windows(np.arange(size), length, offset=offset)
    predicted = rows[:, 1:].flatten()
    assert predicted.tolist() == list(range(offset + 1, offset + 1 + len(predicted)))
    assert max(0, size - offset - 1) - len(predicted) < length - 1


def test_every_batch_of_the_mixture_has_each_domain_in_its_share():
    streams = {domain: np.full(100, i) for i, domain in enumerate(DOMAINS)}
    mixture = Mixture(streams, num_batches=7, batch_size=10, length=9, seed=0)
    batches = mixture.windows[:, 0].reshape(7, 10)
    assert len(mixture) == 70
    for i, domain in enumerate(DOMAINS.values()):
        assert ((batches == i).sum(1) == round(domain.share * 10)).all()


def test_a_mixture_repeats_nothing_before_all_was_seen_and_follows_its_seed():
    streams = {domain: np.arange(1000) for domain in DOMAINS}
    first, again, other = (
        Mixture(streams, num_batches=10, batch_size=10, length=9, seed=seed).windows for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert not (first == other).all()
    starts = first.reshape(10, 10, 9)[:, :3, 0].flatten()
    assert len(set(starts.tolist())) == len(starts)
