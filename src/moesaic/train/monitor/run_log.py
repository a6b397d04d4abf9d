"""The log of a run: a file of JSON lines that is only added to, so that whoever is killed leaves all but the last line.

A line that has no end yet is not read, and cut off by whoever goes on. Nothing here needs torch.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moesaic.train.monitor.lines import FORMAT, Line, check_line

LOG = "load.jsonl"  # its name in the folder of a run
BEGIN = f'{{"kind":"run","format":"{FORMAT}"'.encode()  # of every log


def log_path(path: Path | str) -> Path:
    """The log itself for a folder; a file, and a name that ends in .jsonl, is one itself."""
    path = Path(path)
    return path if path.is_file() or (path.suffix == ".jsonl" and not path.is_dir()) else path / LOG


def check_writable(path: Path) -> None:
    """Make the folder of a log and try it, before hours of training have gone by."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"path={path} cannot be written ({error.strerror}): name another file or folder") from None


@dataclass
class RunLog:
    """What a log says. header: its first line. Lists hold lines in their order; `resumed` is the last line of that
    kind, `end` that of a run that came to it. standing: the last judgement of each layer, "too_few" only where there is
    none yet; empty before the first verdict.

    most: keep at most about so many step lines, dropping every other of them where there are more; the newest stays.
    """

    header: Line = field(default_factory=dict)
    steps: list[Line] = field(default_factory=list)
    verdicts: list[Line] = field(default_factory=list)
    standing: list[str] = field(default_factory=list)
    alerts: list[Line] = field(default_factory=list)
    resumed: Line | None = None
    end: Line | None = None
    most: int | None = None

    @property
    def layers(self) -> list[Line]:
        return self.header.get("layers", [])

    @property
    def done(self) -> int:
        """How many steps were done, as far as it says."""
        after = self.header.get("after")
        told = [line["step"] for line in (*self.steps[-1:], self.resumed, self.end) if line is not None]
        return max([after if isinstance(after, int) else 0, *told])

    @property
    def total(self) -> int | None:
        """How many there are to be, as whoever went on with the run last knew it."""
        total = (self.resumed or self.header).get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def finished(self) -> bool:
        """It came to its end, and not before the last step."""
        return self.end is not None and (self.total is None or self.done >= self.total)

    @property
    def active(self) -> dict[tuple[str, str | None], Line]:
        """Alerts that began and did not end, by their kind and layer."""
        found: dict[tuple[str, str | None], Line] = {}
        for line in self.alerts:
            name = (line["alert"], line["layer"])
            if line["begins"]:
                found[name] = line
            else:
                found.pop(name, None)
        return found

    def add(self, line: Line) -> None:
        """Take in one line; kinds that a later version may add are passed over. ValueError for what is no line."""
        check_line(line, len(self.layers))
        kind = line["kind"]
        if kind == "run":
            if self.header:
                raise ValueError("it begins a second run")
            self.header = line
        elif kind == "step":
            self.end = None
            self.steps.append(line)
            if self.most is not None and len(self.steps) > 2 * self.most:
                self.steps[:] = self.steps[1::2] if len(self.steps) % 2 == 0 else self.steps[::2]
        elif kind == "verdict":
            self.verdicts[:] = [line] if self.most is not None else [*self.verdicts, line]
            before = self.standing or line["status"]
            self.standing = [old if new == "too_few" else new for old, new in zip(before, line["status"], strict=True)]
        elif kind == "alert":
            self.alerts.append(line)
        elif kind == "resume":
            self.resumed, self.end = line, None
        elif kind == "end":
            self.end = line


class LogReader:
    """Reads a log as it grows: `poll` takes in what is new, and starts again where the file was cut or replaced."""

    def __init__(self, path: Path, *, most: int | None = None) -> None:
        self.path, self.most = path, most
        self._restart()

    def poll(self) -> RunLog:
        """All that the log says by now. OSError where it cannot be read, ValueError where it is no log."""
        with self.path.open("rb") as file:
            if not self._goes_on(file):
                self._restart()
            file.seek(self.offset)
            for line, _ in lines_of(file, self.path, self.log, self.number):
                self.number, self.offset, self._last = self.number + 1, self.offset + len(line), line
        return self.log

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the line that was read last is still where it was."""
        file.seek(self.offset - len(self._last))
        return file.read(len(self._last)) == self._last

    def _restart(self) -> None:
        self.log, self.offset, self.number, self._last = RunLog(most=self.most), 0, 0, b""


def reader_of(path: Path | str, *, most: int | None = None) -> LogReader:
    """A reader of a run's log, by its file or its folder, that has read it once. ValueError where it is none or holds
    no whole line."""
    path = log_path(path)
    reader = LogReader(path, most=most)
    try:
        reader.poll()
    except FileNotFoundError:
        below = sorted(log.parent.name for log in path.parent.glob(f"*/{LOG}"))
        such = f", such as {path.parent / below[-1]}" if below else ""
        raise ValueError(f"{path}: there is no such file: give a folder that ms.LoadMonitor writes to{such}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not reader.log.header:
        raise ValueError(f"{path}: empty so far, nothing to show: look again when training has begun")
    return reader


def read_log(path: Path | str) -> RunLog:
    """What `reader_of` reads."""
    return reader_of(path).log


def lines_of(file: BinaryIO, path: Path, log: RunLog, number: int = 0) -> Iterator[tuple[bytes, Line]]:
    """(bytes, line) of every line with an end, taken in by `log`, from where the file stands: after `number` lines."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        number += 1
        if number == 1 and not line.startswith(BEGIN):
            raise ValueError(f"{path}: not a log of ms.LoadMonitor: give one, or the folder that it is in")
        try:
            parsed = json.loads(line)
            log.add(parsed)
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error}): take it out, or all from there on") from None
        yield line, parsed


class LogWriter:
    """Adds lines to a log, each handed to the system at once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file

    def write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def open_log(path: Path, header: Line, *, step: int | None, resume: bool) -> tuple[LogWriter, RunLog]:
    """A log to add to after `step`, and what it holds up to there; later lines, and one without an end, are cut off.

    A new log gets the header. One that holds steps is gone on with only where training does: step > 0, or resume,
    which without a step means its own last one, and begins it again, and says so, where training is at step 0.
    ValueError, with nothing changed, for one of another model, one that a new run would cut, and what is no log.
    """
    check_writable(path)
    with path.open("a+b") as file:
        file.seek(0)
        head = file.read(len(BEGIN))
    if not BEGIN.startswith(head):  # neither empty nor cut off in its first words
        raise ValueError(f"path={path} is no log of ms.LoadMonitor: name another file")
    whole = LogReader(path, most=1).poll()
    known = step is not None
    step = (whole.done if resume else 0) if step is None else step
    if whole.steps and not step and not resume:
        way_out = "begin again, as training does" if known else "go on after them, attach(model, step=N) after step N"
        raise ValueError(
            f"path={path} holds {whole.done} steps of an earlier run: name another folder, or use resume=True to "
            f"{way_out}"
        )
    if whole.header and (whole.steps or step) and whole.header.get("config") != header["config"]:
        raise ValueError(
            f"path={path} is the log of another model (config {whole.header.get('config')}, here {header['config']}): "
            "name another folder"
        )
    if not whole.header or not step:
        if whole.steps:
            sys.stderr.write(f"moesaic: training begins at step 0: {path} drops its {whole.done} steps of before\n")
        path.write_bytes(b"")
        writer, kept = LogWriter(path, path.open("ab")), RunLog()
        writer.write(header)
        kept.add(json.loads(json.dumps(header)))
        return writer, kept
    kept, end = RunLog(most=1), 0
    with path.open("r+b") as file:
        for line in file:
            parsed = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}
            if parsed.get("step", 0) > step:
                break
            kept.add(parsed)
            end += len(line)
        file.truncate(end)
    return LogWriter(path, path.open("ab")), kept
