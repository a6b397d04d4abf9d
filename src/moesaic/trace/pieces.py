"""Text of tokens, as it may be shown. A piece comes from a file or a user, so it is data and never a command."""

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format (bidi included), surrogate, private, unassigned


def visible(text: str, most: int | None = None) -> str:
    """`text` on one line with everything that could steer a terminal or reorder a line escaped: "\\x1b", "\\u202e".

    most: characters of the result; longer ones end in "…".
    """
    shown = "".join(_escaped(c) if hidden(c) else c for c in text)
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def hidden(character: str) -> bool:
    """Whether a character is not to be seen but could change what is."""
    return unicodedata.category(character) in HIDDEN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
