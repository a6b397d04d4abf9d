"""Kneser-Ney is a distribution, equals its formula, and is a bar worth clearing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesaic.train.data import corpus
from moesaic.train.kneser_ney import KneserNeyBigram

VOCAB = 7
streams = arrays(np.int64, st.integers(2, 60), elements=st.integers(0, VOCAB - 1))


@given(streams)
def test_probabilities_after_any_token_sum_to_one(stream):
    bigram = KneserNeyBigram(stream, VOCAB)
    for before in range(VOCAB):
        p = bigram.probability(np.full(VOCAB, before), np.arange(VOCAB))
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1)


@given(streams)
def test_it_equals_the_formula_written_with_dictionaries(stream):
    pairs = Counter(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))

    def discount(counts):
        once, twice = list(counts).count(1), list(counts).count(2)
        return once / (once + 2 * twice) if once else 0.5

    kinds_before = Counter(after for _, after in pairs)
    big, small = discount(pairs.values()), discount(kinds_before.values())

    def unigram(w):
        spread = small * len(kinds_before) / len(pairs) / VOCAB
        return max(kinds_before[w] - small, 0) / len(pairs) + spread

    def expected(v, w):
        total = sum(count for (before, _), count in pairs.items() if before == v)
        if total == 0:
            return unigram(w)
        kinds = sum(before == v for before, _ in pairs)
        return max(pairs[v, w] - big, 0) / total + big * kinds / total * unigram(w)

    bigram = KneserNeyBigram(stream, VOCAB)
    for v in range(VOCAB):
        p = bigram.probability(np.full(VOCAB, v), np.arange(VOCAB))
        assert p == pytest.approx([expected(v, w) for w in range(VOCAB)])


def test_it_beats_an_add_one_unigram_and_an_add_one_bigram_on_real_text():
    train, held_out = (
        np.frombuffer("\0".join(text for _, text in corpus("manual", split)).encode(), np.uint8).astype(np.int64)
        for split in ("train", "held_out")
    )
    counts = np.bincount(train, minlength=256) + 1
    unigram = -np.log(counts / counts.sum())[held_out[1:]].mean()
    pairs = np.ones((256, 256))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    bigram = -np.log(pairs / pairs.sum(1, keepdims=True))[held_out[:-1], held_out[1:]].mean()
    loss = KneserNeyBigram(train, 256).loss(held_out)
    assert loss < bigram < unigram
