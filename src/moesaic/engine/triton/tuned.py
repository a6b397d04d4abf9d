"""Tiles that `moesaic bench tune` measured on a GPU: a file of the user, read once when that GPU first computes.

A file that is broken, or was made on another GPU or with another Triton, is refused with one warning; the built-in
table serves then.
"""

import importlib.metadata
import json
import re
import warnings
from pathlib import Path
from typing import Any

from moesaic.engine.triton.blocks import Blocks, Tiles

FORMAT = "moesaic tiles 2"
Tuned = dict[str, dict[int, Tiles]]  # dtype -> most rows an expert, as in the built-in table -> tiles


def tuned_path(device: str) -> Path:
    """Where the tiles of a GPU of this name are looked for."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return Path.home() / ".cache" / "moesaic" / f"tiles-{name}.json"


def read_tuned(device: str) -> Tuned:
    """Those of the GPU's file; nothing where there is none or it is refused."""
    path = tuned_path(device)
    try:
        return parse_tuned(json.loads(path.read_text(encoding="utf-8")), device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path}: not used ({error}): run `moesaic bench tune` again, or remove it", UserWarning, stacklevel=2
        )
        return {}


def parse_tuned(found: Any, device: str) -> Tuned:
    """Raises ValueError, LookupError, TypeError or AttributeError for what is no table of this GPU and this Triton."""
    if found["format"] != FORMAT:
        raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
    if found["device"] != device:
        raise ValueError(f"it was made on {found['device']}, this is {device}")
    here = importlib.metadata.version("triton")
    if found["versions"]["triton"] != here:
        raise ValueError(f"it was made with triton {found['versions']['triton']}, here is {here}")
    return {dtype: {int(most): _tiles(ops) for most, ops in rows.items()} for dtype, rows in found["tiles"].items()}


def _tiles(ops: dict[str, list[int]]) -> Tiles:
    tiles = Tiles(**{op: _blocks(op, numbers) for op, numbers in ops.items()})
    if len({tiles.up.rows, tiles.matmul.rows, tiles.d_hidden.rows}) > 1:
        raise ValueError("up, matmul and d_hidden have different rows: they share one layout")
    return tiles


def _blocks(op: str, numbers: list[int]) -> Blocks:
    blocks = Blocks(*numbers)
    sizes = (blocks.rows, blocks.columns, blocks.depth)
    whole = all(type(number) is int and number > 0 for number in blocks)
    if not whole or not all(16 <= size <= 512 and size & (size - 1) == 0 for size in sizes):
        raise ValueError(f"{op} {list(numbers)} are no tiles: powers of two from 16")
    if blocks.warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"{op} has {blocks.warps} warps: give 1, 2, 4, 8 or 16")
    return blocks
