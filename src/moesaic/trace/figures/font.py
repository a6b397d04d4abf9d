"""The fonts of our figures: DejaVu Sans, which matplotlib ships, and our subset with Chinese characters."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FONT_FILE = Path(__file__).parents[2] / "assets" / "font" / "MoesaicCJK.ttf"


@cache
def font_family() -> list[str]:
    """Families in the order in which a glyph is looked for; registers our font with matplotlib once."""
    from matplotlib.font_manager import fontManager

    fontManager.addfont(FONT_FILE)
    regular = fontManager.ttflist[-1]
    fontManager.ttflist.append(dataclasses.replace(regular, weight=700))  # or every bold title logs that there is none
    return ["DejaVu Sans", regular.name]


@contextmanager
def figure_style() -> Iterator[None]:
    """matplotlib settings for drawing our figures, put back afterwards."""
    import matplotlib

    settings = {
        "font.family": font_family(),
        "axes.unicode_minus": False,
        "axes.titlesize": 13,
        "figure.facecolor": "w",
    }
    with matplotlib.rc_context(settings):
        yield
