"""A record that goes to a file while the model runs: its parts lie beside the file until they are put together."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moesaic.trace.file.parts import Part
from moesaic.trace.file.reader import load
from moesaic.trace.file.writer import folder_beside, target
from moesaic.trace.store import Trace


class Stream:
    """Where a record goes. written: the file is there. keeps_parts: they hold what the file does not."""

    def __init__(self, path: Path) -> None:
        self.path, self.written, self.keeps_parts = path, False, False
        self.folder = folder_beside(path)
        self._parts: list[Part] = []

    def part(self, name: str, dtype: torch.dtype) -> Part:
        """Room for the rows of one tensor."""
        del dtype  # a part takes that of its first rows
        self._parts.append(Part(self.folder / name, self.path))
        return self._parts[-1]

    def flush(self) -> None:
        """Write what waits to be: whoever finds the parts then finds all of them."""
        for part in self._parts:
            part.flush()

    def read(self) -> Trace:
        """The trace, once its file is there."""
        if self.written:
            return load(self.path)
        over = self.keeps_parts or not self.folder.exists()
        when = "was not written: the block failed" if over else "is there when the block has ended"
        raise ValueError(f"{self.path}: {when}; a record without to= is there at any time")


@contextmanager
def streaming(path: Path) -> Iterator[Stream]:
    """Inside the block there is room for the parts; afterwards they are gone, unless they are kept. ValueError where
    `path` is a folder, another file than a trace, or cannot be written."""
    stream = Stream(target(path))
    try:
        yield stream
    finally:
        if not stream.keeps_parts:
            shutil.rmtree(stream.folder, ignore_errors=True)
