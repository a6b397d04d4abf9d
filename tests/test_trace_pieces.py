"""Text of tokens is data: what could steer a terminal is escaped."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.trace.shown import visible


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("rou", "rou"),
        ("专家", "专家"),
        ("a\nb\t", r"a\nb\t"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
        ("\x9b2J", r"\x9b2J"),
        ("👩‍💻", "👩\\u200d💻"),
    ],
)
def test_what_steers_a_terminal_is_escaped_and_the_rest_stays(raw, shown):
    assert visible(raw) == shown


@given(st.text())
def test_nothing_hidden_is_left(text):
    assert not {unicodedata.category(c) for c in visible(text)} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_long_text_is_cut_with_a_mark():
    assert visible("a" * 9, most=4) == "aaa…"
    assert visible("aaaa", most=4) == "aaaa"
