"""Text of tokens and names of layers are data: what could steer a terminal is escaped."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.trace.shown import counted, finite, html_table, listed, piece_of, short_layers, visible


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


class Spelling:
    """A tokenizer of one token: what it decodes to and how it is spelled."""

    def __init__(self, text: str, spelled: str | None) -> None:
        self.text, self.spelled = text, spelled

    def decode(self, _ids: list[int]) -> str:
        return self.text

    def id_to_token(self, _number: int) -> str | None:
        return self.spelled


@pytest.mark.parametrize(
    ("text", "spelled", "piece"),
    [
        (" rou", "Ġrou", " rou"),
        ("był", "byÅĤ", "był"),  # letters that byte-level tokenizers borrow are letters where they are text
        ("\ufffd", "ĵ", "<0x93>"),
        (" \ufffd", "Ġåº", " <0xE5><0xBA>"),
        ("", "<|endoftext|>", "<|endoftext|>"),
        ("\ufffd", "<0xE5>", "<0xE5>"),  # SentencePiece spells its bytes so
        ("\ufffd", "▁字", "▁字"),
        ("", None, ""),
    ],
)
def test_a_token_is_its_text_or_its_bytes_and_never_borrowed_letters(text, spelled, piece):
    assert piece_of(Spelling(text, spelled), 0) == piece


def test_pieces_of_the_shipped_tokenizer_hold_no_borrowed_letters():
    from moesaic.hf.load import load_model

    _, tokenizer = load_model()
    pieces = {piece_of(tokenizer, number) for number in range(len(tokenizer))}
    assert "<0xE5>" in pieces
    assert not {piece for piece in pieces if any(0x100 <= ord(c) <= 0x143 for c in piece)}


def test_layers_have_their_short_names_unless_two_would_be_called_alike():
    assert short_layers(["model.layers.1.mlp", "model.layers.2.mlp"]) == ["layers.1", "layers.2"]
    assert short_layers(["encoder.block.1.mlp", "decoder.block.1.mlp", "x.block.2.mlp"]) == [
        "encoder.block.1.mlp", "decoder.block.1.mlp", "block.2",
    ]  # fmt: skip
    assert (short_layers([""]), short_layers([""], "zh")) == (["the layer"], ["该层"])
    assert (listed([""]), listed([""], "zh")) == ("the layer", "该层")
    many = [f"model.layers.{i}.mlp" for i in range(5)]
    assert listed(many) == "layers.0, layers.1, layers.2 and 2 more"
    assert listed(many, "zh") == "layers.0、layers.1、layers.2 等 5 层"


def test_counts_have_their_plural_and_numbers_that_are_not_finite_are_none():
    assert (counted(1, "document"), counted(2000, "document")) == ("1 document", "2,000 documents")
    assert [finite(x) for x in (1, 0.5, math.nan, -math.inf, None)] == [1.0, 0.5, None, None, None]


def test_cells_of_html_are_escaped():
    html = html_table(["<b>", "x"], [["<script>", "\u202e&"]])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "\\u202e&amp;" in html
    assert "<b>" not in html
