"""All cells in order into a journal, within some minutes, and on from there the next time."""

import faulthandler
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.campaign import Journal, resumed
from moesaic.bench.gpu.cells import GpuCell
from moesaic.bench.gpu.judge import DeviceLost, check_device
from moesaic.bench.gpu.limits import Bandwidth, measure_bandwidth, measure_flops
from moesaic.bench.gpu.run import Bench, Measured, run_decode, run_experts, run_memory
from moesaic.bench.gpu.special import run_kernels, run_router
from moesaic.bench.machine import commit, sources
from moesaic.bench.problem import make_experts
from moesaic.bench.runner import failed
from moesaic.bench.timing import Clock
from moesaic.engine.triton.tuned import tuned_path
from moesaic.types import ExpertWeights
from moesaic.versions import versions

JOURNAL = "journal.jsonl"
SAME = ("device", "versions", "commit", "sources", "tiles", "smoke")  # for two runs to be one table
LAST_SECONDS = 12.0  # kept for measuring the ceilings again and for the report
STUCK_SECONDS = 240.0  # no cell takes so long, compiling included: a kernel that never ends would take all there are
PACKAGES = ("triton", "transformers", "liger-kernel")
ASK_NVIDIA = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def gpu_machine(clock: Clock, *, smoke: bool, command: str, named_commit: str | None) -> dict[str, Any]:
    """Hardware, versions, what was run. `named_commit` where the sources are no checkout."""
    found: dict[str, Any] = {"device": "cpu, interpreted", "capability": None}
    if clock.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            **_nvidia(),
        }
    return {
        "kind": "machine",
        **found,
        "versions": versions(*PACKAGES) | {"cuda": torch.version.cuda},
        "commit": named_commit or commit(),
        "sources": sources(),
        "tiles": tiles_digest(found["device"]),
        "smoke": smoke,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def tiles_digest(device: str) -> str:
    """Which tiles the engine takes: "built-in", or those of a file that `moesaic bench tune` wrote."""
    path = tuned_path(device)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "built-in"


def _nvidia() -> dict[str, str]:
    """What torch does not say; nothing where nvidia-smi is missing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(ASK_NVIDIA)}", "--format=csv,noheader", "--id=0"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(ASK_NVIDIA, (part.strip() for part in asked.stdout.split(",")), strict=False))


def open_journal(out: Path, machine: dict[str, Any]) -> Journal:
    """That of the folder, or a new one. Raises ValueError where the one there is of another machine or other code."""
    path = out / JOURNAL
    if not path.exists():
        journal = Journal(path)
        journal.add(machine)
        return journal
    return resumed(path, machine, SAME)


def measured_in(journal: Journal) -> list[Measured]:
    return [Measured.of(line) for line in journal.lines if line["kind"] == "cell"]


@dataclass
class GpuCampaign:
    """Runs cells into a journal until the time is up. rounds: None for what suits each cell."""

    journal: Journal
    clock: Clock
    seconds: float
    rounds: int | None = None
    _flops: dict[str, float] = field(default_factory=dict)
    _bandwidth: Bandwidth | None = None
    _weights: tuple[Any, ExpertWeights | None] = (None, None)

    def run(self, cells: Iterable[GpuCell], report: Callable[[str], object] = lambda _line: None) -> list[GpuCell]:
        """Measure what is not in the journal yet; returns what there was no time for.

        Raises DeviceLost where the process must start again; the journal then holds the cell that was to blame.
        """
        start, left_out = time.perf_counter(), []
        done = {line["key"] for line in self.journal.lines if line["kind"] == "cell"}
        for cell in cells:
            if cell.key in done:
                continue
            if note := self.journal.given_up(cell.key):
                self.journal.add(Measured(cell, note=note).to_dict())
            elif time.perf_counter() - start > self.seconds - LAST_SECONDS:
                left_out.append(cell)
            else:
                with self.journal.trying(cell.key), never_stuck(self.clock):
                    result = self._measure(cell)
                report(f"{time.perf_counter() - start:6.0f} s  {cell.key}: {headline(result)}")
        for dtype in self._flops:
            self._measure_flops(dtype, "end")
        if self._bandwidth is not None:
            self._measure_bandwidth("end")
        return left_out

    def _measure(self, cell: GpuCell) -> Measured:
        begin, lost = time.perf_counter(), None
        try:
            result = self._run(cell)
        except DeviceLost as error:
            result, lost = Measured(cell, error.rows, note=failed(error)), error
        except Exception as error:  # a cell that cannot be is a row, never the end
            result = Measured(cell, note=failed(error))
        result.seconds = time.perf_counter() - begin
        self.journal.add(result.to_dict())
        if lost is not None:
            raise lost
        check_device(self.clock)
        return result

    def _run(self, cell: GpuCell) -> Measured:
        bench = self._bench(cell.dtype)
        if cell.kind == "router":
            return run_router(cell, bench)
        runs = {"experts": run_experts, "decode": run_decode, "memory": run_memory, "kernels": run_kernels}
        return runs[cell.kind](cell, self._experts(cell), bench)

    def _bench(self, dtype: str) -> Bench:
        for name in (dtype, "float64"):
            if name not in self._flops:
                self._flops[name] = self._measure_flops(name, "begin")
        if self._bandwidth is None:
            self._bandwidth = self._measure_bandwidth("begin")
        return Bench(self.clock, self._flops, self._bandwidth, self.rounds)

    def _experts(self, cell: GpuCell) -> ExpertWeights:
        """Weights of a shape and dtype, kept until another is asked for."""
        key, experts = self._weights
        if key != (cell.shape, cell.dtype) or experts is None:
            self._weights = (None, None)
            experts = make_experts(cell.shape, cell.dtype, self.clock.device)
            self._weights = ((cell.shape, cell.dtype), experts)
        return experts

    def _measure_flops(self, dtype: str, when: str) -> float:
        flops = measure_flops(dtype, self.clock)
        self.journal.add({"kind": "ceiling", "when": when, "what": f"P {dtype}", "value": flops})
        return flops

    def _measure_bandwidth(self, when: str) -> Bandwidth:
        bandwidth = measure_bandwidth(self.clock)
        for what, value in bandwidth._asdict().items():
            self.journal.add({"kind": "ceiling", "when": when, "what": f"B {what}", "value": value})
        return bandwidth


@contextmanager
def never_stuck(clock: Clock) -> Iterator[None]:
    """Ends the process, with the line where it waits for the device, after STUCK_SECONDS."""
    if clock.is_cuda:
        faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        if clock.is_cuda:
            faulthandler.cancel_dump_traceback_later()


def headline(result: Measured) -> str:
    """A cell in a few words, for the progress of a run."""
    if result.note:
        return result.note
    ours = next((row for row in result.rows if row.kind == "ours" and row.median_ms is not None), None)
    if ours is None or ours.median_ms is None:
        return next((row.note for row in result.rows if row.note), "done")
    return f"{ours.median_ms:.4g} ms" + (f", {ours.ratio:.2f} x {ours.best_peer}" if ours.ratio else "")
