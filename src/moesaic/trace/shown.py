"""How names, tokens and rows of numbers are shown. Text comes from a file or a user: it is data, never a command."""

import math
import re
import unicodedata

from torch import Tensor

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format (bidi included), surrogate, private, unassigned
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32  # values drawn one by one; longer rows are pooled by their maximum into half as many bars


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


def short_layer(name: str) -> str:
    """ "layers.3" for "model.layers.3.mlp", visibly; a name without a number stays."""
    found = re.search(r"[^.]+\.\d+", name)
    return visible(found.group() if found else name, 60)


def words_of(words: dict[str, dict], lang: str) -> dict:
    """The words of a language; ValueError where there are none."""
    if lang not in words:
        raise ValueError(f"lang={visible(str(lang), 20)!r} is unknown: use 'zh' or 'en'")
    return words[lang]


def sparkline(values: Tensor, width: int = SPARK_WIDTH) -> str:
    """Values as bars of eight heights between their least and greatest; longer rows are pooled by their maximum."""
    numbers = values.flatten().tolist()
    if len(numbers) > width:
        step = math.ceil(2 * len(numbers) / width)
        numbers = [max(numbers[i : i + step]) for i in range(0, len(numbers), step)]
    finite = [v for v in numbers if math.isfinite(v)]
    if not finite:
        return " " * len(numbers)
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(SPARKS[int((v - low) / span * 7.999)] if math.isfinite(v) else " " for v in numbers)


def short(value: float, digits: int = 3) -> str:
    """Fixed digits, without the zero before the point: .125, 1.250."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-").startswith("0.") else text
