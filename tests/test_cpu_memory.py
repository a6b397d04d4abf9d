"""The CPU engine's memory: who takes the pages of a new gradient, and when."""

import io
import mmap
import os
import threading
import weakref
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import problem
from torch import nn

from moesaic.engine import memory, outer
from moesaic.engine.cpu import cpu
from moesaic.engine.spec import ExpertSpec

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux alone tells who takes page faults")

PAGE = mmap.PAGESIZE


def new_pages(n_bytes):
    """Float32 numbers in pages of their own that nobody has touched, none of them huge."""
    area = mmap.mmap(-1, n_bytes)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(area, dtype=torch.float32)


def faults() -> dict[str, int]:
    """Page faults of every thread of this process until now."""
    found = {}
    for path in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            found[path.name] = int((path / "stat").read_text().rpartition(")")[2].split()[7])
    return found


def faults_of_writing(tensor) -> int:
    before = faults()
    tensor.zero_()
    return sum(count - before.get(thread, 0) for thread, count in faults().items())


@pytest.fixture
def asked(monkeypatch):
    """What would be asked of the system: (address, bytes, advice)."""
    calls = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *args: calls.append(args) or 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return calls


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="another BLAS than MKL may share rows out")
@pytest.mark.parametrize("rows", [1, 8])
def test_new_pages_of_a_gradient_are_written_by_one_thread_each(with_threads, rows):
    with_threads(2)
    g, x, pages = torch.randn(rows, 512), torch.randn(rows, 2048), 512 * 2048 * 4 // PAGE
    outer.outer_by_rows(torch.empty(512, 2048), g, x, beta=0.0)  # the threads begin
    writers = set()
    for half in (slice(0, 256), slice(256, 512)):
        out = new_pages(512 * 2048 * 4).view(512, 2048)
        out.numpy()[256 - half.start : 512 - half.start] = 0  # the other half's pages are there
        before = faults()
        outer.outer_by_rows(out, g, x, beta=0.0)
        taken = {thread: count - before.get(thread, 0) for thread, count in faults().items()}
        writer = max(taken, key=taken.__getitem__)
        assert taken.pop(writer) >= 0.9 * pages / 2
        assert sum(taken.values()) <= 0.1 * pages / 2
        writers.add(writer)
    assert len(writers) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_pages_that_were_asked_for_are_there(with_threads, threads):
    with_threads(threads)
    madvise, page, size = memory._madvise(), new_pages(PAGE), 3 * memory.PORTION + 5 * PAGE
    if madvise is None or madvise(page.data_ptr(), PAGE, memory.POPULATE):
        pytest.skip("this system hands out no pages in one go")
    if len(os.sched_getaffinity(0)) < threads:
        pytest.skip("bound to too few CPUs")
    assert faults_of_writing(new_pages(size)) >= size // PAGE
    asked_for = new_pages(size)
    memory.populate(asked_for)
    assert faults_of_writing(asked_for) < 100


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pages_of_large_gradients_are_asked_for(monkeypatch, dtype, permuted):
    monkeypatch.setattr(memory, "LARGE", 1 << 20)
    given = []
    monkeypatch.setattr(memory, "populate", given.append)
    for elements, large in (((1 << 20) // dtype.itemsize - 64, False), ((1 << 20) // dtype.itemsize, True)):
        weight = torch.empty(elements // 64, 8, 8, dtype=dtype)
        weight = weight.mT if permuted else weight
        gradient = memory.new_gradient(weight)
        assert (gradient.shape, gradient.stride(), gradient.dtype) == (weight.shape, weight.stride(), dtype)
        assert bool(given) == large


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_experts_without_rows_have_zeros_in_a_new_gradient(monkeypatch, large, permuted):
    monkeypatch.setattr(memory, "LARGE", 0 if large else 1 << 30)
    for _ in range(3):
        torch.full((6, 32, 64), torch.nan)  # what is freed here comes again
        weight = torch.empty(6, 64, 32).mT if permuted else torch.empty(6, 32, 64)
        gradient = memory.new_gradient(weight, [1, 4])
        assert not gradient[[1, 4]].count_nonzero()
        gradient.fill_(torch.nan)


def test_a_large_gradient_behaves_as_any_other(monkeypatch):
    """For an optimiser, a norm, a copy, a file, other processes; and its pages are given back."""
    monkeypatch.setattr(memory, "LARGE", 1 << 16)
    held, real = [], memory._pages
    monkeypatch.setattr(memory, "_pages", lambda n: held.append(weakref.ref(area := real(n))) or area)
    x, ids, weights, experts = problem(5, 256, 64)
    ids = ids.clamp(max=3)
    cpu(x, ids, weights, experts, ExpertSpec()).square().sum().backward()
    pages = [w.grad for w in experts[:2]]
    assert len(held) == 2
    assert all(area() is not None for area in held)
    small = [nn.Parameter(w.detach().clone()) for w in experts[:2]]
    for parameter, grad in zip(small, pages, strict=True):
        parameter.grad = grad.clone()
        assert torch.equal(deepcopy(grad), grad)
        assert not grad[4:].any()
    torch.save(pages, file := io.BytesIO())
    file.seek(0)
    assert all(map(torch.equal, torch.load(file), pages))
    for parameters in (experts[:2], small):
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        torch.optim.AdamW(parameters).step()
    assert all(map(torch.equal, experts[:2], small))
    pages[0].share_memory_()
    assert torch.equal(pages[0], small[0].grad)
    for w in experts[:2]:
        w.grad = None
    del grad
    pages.clear()
    assert all(area() is None for area in held)


def test_where_there_are_no_pages_torch_says_so(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 0)

    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", full)
    assert not memory.new_gradient(torch.empty(2, 64, 64), [0, 1]).any()
    with pytest.raises(RuntimeError, match="allocate memory"):
        memory.new_gradient(torch.empty(1).expand(1 << 50))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_large_gradient_is_not_shared_with_a_process_that_is_forked(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 0)
    gradient = memory.new_gradient(torch.empty(2, 64, 64))
    child = os.fork()
    if child == 0:
        try:
            gradient.numpy()[:] = 1
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert not gradient.any()


def test_every_whole_page_is_asked_for_once_and_none_of_anybody_else(with_threads, asked):
    with_threads(2)
    tensor = torch.empty(5 * memory.PORTION + 3 * PAGE, dtype=torch.uint8)[17:-23]
    memory.populate(tensor)
    first, *portions = sorted(asked)
    assert {advice for *_, advice in asked} == {memory.POPULATE}
    assert first[:2] == (portions[0][0], PAGE), "whether it can be done is tried on one page"
    assert 0 <= portions[0][0] - tensor.data_ptr() < PAGE
    assert 0 <= tensor.data_ptr() + tensor.nbytes - sum(portions[-1][:2]) < PAGE
    for (start, size, _), (after, *_) in pairwise(portions):
        assert start + size == after
        assert size == memory.PORTION


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_threads_ask_as_torch_has(with_threads, monkeypatch, threads):
    """Each waits until all the others ask as well."""
    with_threads(threads)
    together, met = threading.Barrier(threads), []

    def madvise(_start, size, _advice):
        if size > PAGE:
            together.wait(timeout=20)
            met.append(threading.get_ident())
        return 0

    monkeypatch.setattr(memory, "_madvise", lambda: madvise)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    memory.populate(new_pages(threads * memory.PORTION))
    assert len(set(met)) == threads


@pytest.mark.parametrize("n_bytes", [0, 1, PAGE - 1])
def test_memory_without_a_whole_page_of_its_own_is_left_alone(asked, n_bytes):
    memory.populate(torch.empty(3 * PAGE, dtype=torch.uint8)[:n_bytes])
    assert not asked


def test_not_where_this_thread_is_bound_to_fewer_cpus_or_torch_has_many_threads(with_threads, monkeypatch, asked):
    tensor = torch.empty(1 << 20)
    with_threads(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    memory.populate(tensor)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: memory.MOST_THREADS + 1)
    memory.populate(tensor)
    assert not asked
    monkeypatch.setattr(torch, "get_num_threads", lambda: memory.MOST_THREADS)
    memory.populate(tensor)
    assert asked


def test_other_systems_have_no_such_advice(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory._madvise.__wrapped__() is None
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity")  # nor this
    memory.populate(torch.empty(1 << 20))


def test_an_old_kernel_is_asked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *args: calls.append(args) or -1)
    memory.populate(torch.empty(1 << 20))
    assert len(calls) == 1


def test_where_no_thread_can_be_started_pages_come_when_they_are_written(monkeypatch, asked):
    def no_thread(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", no_thread)
    memory.populate(torch.empty(1 << 20))
    assert len(asked) == 1
