"""What commands print for programs."""

import json

import pytest

from moesaic.cli.output import print_json
from moesaic.trace.shown import hidden

NASTY = '专家\x1b[2J\x9b\u202e\ud800 \U000e0041\n"'


def test_json_keeps_chinese_and_escapes_what_could_steer_a_terminal(capsys):
    print_json({NASTY: [NASTY]})
    text = capsys.readouterr().out
    assert json.loads(text) == {NASTY: [NASTY]}
    assert "专家" in text
    assert not any(hidden(character) for character in text.removesuffix("\n"))


def test_json_is_strict(capsys):
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"x": float("nan")})
    assert capsys.readouterr().out == ""
