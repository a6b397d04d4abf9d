"""How names, tokens and rows of numbers are shown. Text comes from a file or a user: it is data, never a command."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format (bidi included), surrogate, private, unassigned
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32  # values drawn one by one; longer rows are pooled by their maximum into half as many bars
NAMED = 3  # layers that a sentence names
NAME_WIDTH = 24  # of a column of names, of the 80 of a terminal
NOTES = {
    "en": {
        "router": "The picks of {layers} were read at the router's output, not at the experts.",
        "derived": "The picks of {layers} were derived from scores by a rule, not read at the experts.",
        "imported": "The picks of {layers} come from the record of another program, not read at the experts.",
        "missing": ("Nothing is said of {layers}: the record has no data of it.",
                    "Nothing is said of {layers}: the record has no data of them."),
        "all": "all layers", "some": "{}", "comma": ", ", "more": " and {more} more",
        "nameless": "the layer",
    },
    "zh": {
        "router": "{layers}的选择取自路由器的输出，不是在专家处读到的。",
        "derived": "{layers}的选择是按规则由分数推导的，不是在专家处读到的。",
        "imported": "{layers}的选择来自其他程序的记录，不是在专家处读到的。",
        "missing": ("对 {layers} 不作判断：记录中没有它的数据。", "对 {layers} 不作判断：记录中没有这些层的数据。"),
        "all": "所有层", "some": "{} ", "comma": "、", "more": " 等 {n} 层",
        "nameless": "该层",
    },
}  # fmt: skip
CELL = "padding:2px 8px;text-align:right;vertical-align:top;white-space:nowrap"


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


def short_layer(name: str, lang: str = "en") -> str:
    """ "layers.3" for "model.layers.3.mlp", visibly; a name without a number stays. A layer that was recorded by itself
    has no name: it is "the layer"."""
    if not name:
        return words_of(NOTES, lang)["nameless"]
    found = re.search(r"[^.]+\.\d+", name)
    return visible(found.group() if found else name, 60)


def short_layers(names: Sequence[str], lang: str = "en") -> list[str]:
    """`short_layer` of each; the whole name where two would be called alike ("encoder.block.1", "decoder.block.1")."""
    short = [short_layer(name, lang) for name in names]
    often = Counter(short)
    return [visible(name, 60) if often[brief] > 1 else brief for name, brief in zip(names, short, strict=True)]


def fits(names: Sequence[str]) -> bool:
    """Whether names are short enough to stand in one line of a table; longer ones go on in the next."""
    return max(map(len, names), default=0) <= NAME_WIDTH


def listed(layers: Sequence[str], lang: str = "en") -> str:
    """The first few layers by their short names, and how many more there are."""
    words = words_of(NOTES, lang)
    named = words["comma"].join(short_layers(layers, lang)[:NAMED])
    return named + (words["more"].format(n=len(layers), more=len(layers) - NAMED) if len(layers) > NAMED else "")


def origin_notes(layers: Sequence[str], origins: Sequence[str], lang: str = "en") -> list[str]:
    """A sentence for every origin of picks (see Trace.origins) other than the experts themselves."""
    words, notes = words_of(NOTES, lang), []
    for origin in dict.fromkeys(origins):
        if origin != "experts":
            here = [layer for layer, its in zip(layers, origins, strict=True) if its == origin]
            named = words["all"] if len(here) == len(layers) > 1 else words["some"].format(listed(here, lang))
            notes.append(words[origin].format(layers=named))
    return notes


def missing_notes(missing: Sequence[str], lang: str = "en") -> list[str]:
    """A sentence about the layers without data; none where there are none."""
    one, more = words_of(NOTES, lang)["missing"]
    return [(one if len(missing) == 1 else more).format(layers=listed(missing, lang))] if missing else []


def counted(n: int, noun: str) -> str:
    """ "1 document", "1,024 documents"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def finite(value: Any) -> float | None:
    """The number, or None where it is not finite or not there, as strict JSON needs it."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def words_of(words: dict[str, Any], lang: str) -> Any:
    """What is said in a language; ValueError where there is nothing."""
    if lang not in words:
        raise ValueError(f"lang={visible(str(lang), 20)!r} is unknown: use 'zh' or 'en'")
    return words[lang]


def sparkline(values: Tensor, width: int = SPARK_WIDTH, low: float | None = None) -> str:
    """Values as bars of eight heights between their least, or `low`, and greatest; longer rows are pooled by their
    maximum."""
    numbers = values.flatten().tolist()
    if len(numbers) > width:
        step = math.ceil(2 * len(numbers) / width)
        numbers = [max(numbers[i : i + step]) for i in range(0, len(numbers), step)]
    finite = [v for v in numbers if math.isfinite(v)]
    if not finite:
        return " " * len(numbers)
    low = min(finite) if low is None else low
    span = max(finite) - low or 1.0
    return "".join(SPARKS[int((v - low) / span * 7.999)] if math.isfinite(v) else " " for v in numbers)


def short(value: float, digits: int = 3) -> str:
    """Fixed digits, without the zero before the point: .125, 1.250."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-").startswith("0.") else text


def piece_of(tokenizer: Any, number: int) -> str:
    """The text of a token, raw. A token that is only part of a character has none: the bytes that byte-level
    tokenizers spell as letters are then written "<0xE5>", and any other spelling stays.

    Takes tokenizers of transformers and of the library tokenizers.
    """
    text = tokenizer.decode([number])
    if text and "\ufffd" not in text:
        return text
    spelled = (getattr(tokenizer, "convert_ids_to_tokens", None) or tokenizer.id_to_token)(number) or ""
    if not spelled or not set(spelled) <= BYTES.keys():
        return spelled
    read = bytes(BYTES[letter] for letter in spelled).decode("utf-8", "surrogateescape")
    if not any(map(_is_stray_byte, read)):
        return spelled
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if _is_stray_byte(c) else c for c in read)


def _is_stray_byte(character: str) -> bool:
    """A byte that is no UTF-8, as "surrogateescape" marks it."""
    return 0xDC80 <= ord(character) <= 0xDCFF


PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level BPE spells as they are
UNPRINTED = [byte for byte in range(256) if byte not in PRINTED]  # it shifts these to letters from U+0100 on
BYTES = {chr(b): b for b in PRINTED} | {chr(0x100 + i): b for i, b in enumerate(UNPRINTED)}


def console_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str = "",
    caption: str = "",
    left: Sequence[int] = (0,),
    folds: Sequence[int] = (),
) -> Table:
    """Cells as a table for a console, none of them markup. left: columns of words. folds: columns that go on
    in the next line where there is no room, as the first one does where a name in it is long; others end in "…"."""
    rows = list(rows)
    table = Table(
        box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left",
        caption=caption or None, caption_justify="left", pad_edge=False,
    )  # fmt: skip
    for index, head in enumerate(heads):
        whole = index not in folds and (index > 0 or fits([str(row[0]) for row in rows]))
        side, over = "left" if index in left else "right", "ellipsis" if whole else "fold"
        table.add_column(head, justify=side, no_wrap=whole, overflow=over)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


class Shown:
    """A result that shows its `table(lang)`: on a console, and in a notebook, Chinese folded below; no scripts, nothing
    loaded, every text escaped."""

    def table(self, lang: str = "en") -> RenderableType:
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        return self.table()

    def _repr_html_(self) -> str:
        en, zh = (_html(self.table(lang)) for lang in ("en", "zh"))
        return (
            f'<div style="font-size:13px;line-height:1.4"><div lang="en">{en}</div>'
            f'<details><summary>中文</summary><div lang="zh">{zh}</div></details></div>'
        )


def _html(part: Any) -> str:
    """A text, a table, or a group of them."""
    if isinstance(part, Group):
        return "".join(map(_html, part.renderables))
    if not isinstance(part, Table):
        return "".join(f"<div>{escape(visible(line))}</div>" for line in str(part).splitlines())
    rows = zip(*(map(str, column.cells) for column in part.columns), strict=True)
    title, caption = (f"<div>{escape(visible(str(said)))}</div>" if said else "" for said in (part.title, part.caption))
    return title + html_table([str(column.header) for column in part.columns], rows) + caption


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain cells as a table, escaped, the first column to the left."""
    left = CELL.replace("right", "left")

    def cells(tag: str, texts: Sequence[str]) -> str:
        shown = (escape(visible(text.replace("\n", " "))) for text in texts)
        return "".join(f'<{tag} style="{CELL if i else left}">{text}</{tag}>' for i, text in enumerate(shown))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    table = '<table style="border-collapse:collapse;margin-top:6px">'
    return f"{table}<thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table>"
