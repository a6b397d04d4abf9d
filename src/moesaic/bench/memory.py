"""Peak memory of a forward and backward over weights and their gradients, each contender in its own process."""

import ctypes
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from moesaic.bench.contenders import Call, Contender, our_engines, peers_named
from moesaic.bench.gate import errors_of, is_right, truth_of
from moesaic.bench.problem import Problem, make_experts, make_problem
from moesaic.bench.runner import EAGER, FAILED, Result, Row, bound_of, compare, failed, forget_gradients, run_once
from moesaic.bench.shapes import Cell

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
T = TypeVar("T")
WARM_TOKENS = 16  # loads code and starts threads, whose memory is not counted
METHOD = (
    "a process for each; after a forward and backward of 16 tokens the kernel's high-water mark of resident memory is "
    "reset (/proc/self/clear_refs; where that is refused, resident memory is sampled every millisecond) and read after "
    "the forward, and again after the backward; what was resident before is taken off, the bytes of the weights' "
    "gradients too where they are there, in the backward; the larger one counts"
)


@dataclass(frozen=True)
class Request:
    """Names only, for another process to make the contender again."""

    cell: Cell
    engines: Sequence[str]
    peers: Sequence[str]
    contender: str


def run_memory_cell(cell: Cell, engines: Sequence[str], peers: Sequence[str]) -> Result:
    """Measure everybody, eager first: its errors are the measure of correctness."""
    start, result, eager = time.perf_counter(), Result(cell), {}
    contenders = [*our_engines(engines, cell.dtype), *peers_named(peers)]
    for contender in sorted(contenders, key=lambda c: c.name != EAGER):
        row = Row(contender.name, contender.kind)
        result.rows.append(row)
        row.note = contender.refuses(cell) or ""
        if row.note:
            continue
        try:
            found = _in_a_process(Request(cell, engines, peers, contender.name))
        except Exception as error:
            row.note = failed(error)
            continue
        if found is None:
            row.note = f"{FAILED} its process died, perhaps out of memory"
            continue
        extra, row.errors = found
        if not is_right(row.errors, eager, bound_of(contender, cell.dtype)):
            row.note = "wrong"
            continue
        row.extra_bytes = extra
        eager = row.errors if contender.name == EAGER else eager
    compare(result.rows)
    result.seconds = time.perf_counter() - start
    return result


def _in_a_process(request: Request) -> tuple[int, dict[str, float]] | None:
    context = get_context("forkserver")  # imports once, and runs nothing before it forks
    context.set_forkserver_preload(["transformers", __name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_probe, request).result()
        except BrokenProcessPool:
            return None


def _probe(request: Request) -> tuple[int, dict[str, float]]:
    cell = request.cell
    torch.set_num_threads(cell.threads)
    everybody: list[Contender] = [*our_engines(request.engines, cell.dtype), *peers_named(request.peers)]
    contender = next(c for c in everybody if c.name == request.contender)
    experts = make_experts(cell.shape, cell.dtype)
    warm = make_problem(replace(cell, tokens=min(WARM_TOKENS, cell.tokens)), experts)
    warm_call = contender.build(warm)
    run_once(warm, warm_call)
    forget_gradients(warm, warm_call, weights_too=True)
    problem = make_problem(cell, experts)
    call = contender.build(problem)
    extra, out = peak_of_step(problem, call)
    grads_of = getattr(call, "expert_grads", problem.expert_grads)
    return extra, errors_of(problem, truth_of(problem), out, grads_of=grads_of)


def peak_of_step(problem: Problem, call: Call) -> tuple[int, torch.Tensor]:
    """(bytes over weights and gradients at the peak of a forward and backward, the output).

    The two apart, for gradients are not there before the backward: taken off a peak in forward they would hide it.
    """
    _give_free_memory_back()
    start, gradients = _resident("VmRSS"), sum(parameter.nbytes for parameter in problem.parameters())
    out, forward = peak_of(lambda: call(problem.tokens, problem.expert_ids, problem.weights), start)
    _, backward = peak_of(lambda: out.backward(problem.out_grad), start)
    return max(forward, backward - gradients), out


def peak_of(run: Callable[[], T], start: int | None = None) -> tuple[T, int]:
    """What `run` returns, and by how many bytes resident memory rose at the most: above `start`, else above what is
    there now."""
    if start is None:
        _give_free_memory_back()
    before = _resident("VmRSS") if start is None else start
    try:
        CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now (proc(5))
    except OSError:
        return _sampled(run, before)
    return run(), _resident("VmHWM") - before


def _sampled(run: Callable[[], T], before: int) -> tuple[T, int]:
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, _resident("VmRSS"))
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
        highest = max(highest, _resident("VmRSS"))
    finally:
        done.set()
        watcher.join()
    return result, highest - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise ValueError(f"{STATUS} does not say {field}: memory is measured on Linux only")
    return int(found[1]) << 10


def _give_free_memory_back() -> None:
    """glibc keeps what was freed; the run would take it again without a rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
