"""Checkpoints of a run that may be killed at any moment, and Ctrl-C that loses nothing."""

import json
import shutil
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

WHOLE = "whole.json"  # written last: sizes of all the other files of a checkpoint
KEPT = 2


class Checkpoints(TrainerCallback):
    """Marks each checkpoint of the Trainer when all of it is there, and only then drops those before the last two.

    What a killed process has left half written has no mark, and `last_checkpoint` passes over it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.interrupted = False

    def on_save(self, args, state, control, **kwargs):  # noqa: ARG002 (the Trainer's signature)
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        write_whole(checkpoint / WHOLE, json.dumps(_sizes(checkpoint)))
        for old in [path for path in _numbered(self.folder) if (path / WHOLE).exists()][:-KEPT]:
            (old / WHOLE).unlink()  # first: while it is taken apart it is none
            shutil.rmtree(old)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def saving_on_interrupt(self) -> Generator[None]:
        """Inside the block Ctrl-C ends training after the step that runs, with a checkpoint; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: Any) -> None:
            if self.interrupted:
                signal.default_int_handler(number, frame)
            self.interrupted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint in the folder of a run; None where there is none, and training starts anew.

    Half-written ones are removed. Raises ValueError for one that was whole and is not any more.
    """
    for path in _numbered(folder):
        if not (path / WHOLE).exists():
            shutil.rmtree(path)
    whole = _numbered(folder)
    if not whole:
        return None
    last = whole[-1]
    try:
        expected = json.loads((last / WHOLE).read_text("utf-8"))
        found = _sizes(last)
        damaged = next((name for name, size in expected.items() if found.get(name) != size), None)
    except (ValueError, AttributeError):
        damaged, expected, found = WHOLE, {}, {}
    if damaged is not None:
        was, now = expected.get(damaged, "more"), found.get(damaged, 0)
        other = f"from {whole[-2].name}" if len(whole) > 1 else "from step 0"
        raise ValueError(f"{last}: {damaged} has {now} bytes where {was} were written: remove it to go on {other}")
    return last


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that has finished."""
    for path in _numbered(folder):
        shutil.rmtree(path)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one move, so that an interruption leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints in their order."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(WHOLE))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
