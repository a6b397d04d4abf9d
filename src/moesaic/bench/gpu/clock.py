"""How seconds are taken on a GPU: by CUDA events. And what replays a graph."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moesaic.bench.timing import Clock, Seconds, without_collections

FLUSH = 256 << 20  # bytes read before a run, several times any L2 cache
BUSY = 2_000_000  # cycles of the device, a millisecond, in which Python launches a forward and a backward


class CudaClock(Clock):
    """CUDA events. What comes before a run keeps the device busy while Python launches: a call is not charged for
    Python as long as that is shorter than reading FLUSH bytes (some 60 us) and waiting for BUSY cycles."""

    device = "cuda"
    is_cuda = True

    def __init__(self) -> None:
        super().__init__()
        self._flush = torch.zeros(FLUSH // 8, dtype=torch.int64, device="cuda")

    def time(self, run: Callable[[], object]) -> Seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return 1e-3 * start.elapsed_time(end)

        return seconds

    def flush(self) -> None:
        self._flush.sum()  # reads: written lines would go to memory while the run is timed, up to 14 us of it
        torch.cuda._sleep(BUSY)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def replay(self, calls: Sequence[Callable[[], object]]) -> Callable[[], list[object]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what a first call does (compile, load) cannot be captured
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = []  # or an output's memory would be given to the next call
        with torch.cuda.graph(graph):
            kept.extend(call() for call in calls)

        def replay() -> list[object]:
            graph.replay()
            return kept

        return replay

    def why_no_graph(self, run: Callable[[], object]) -> str:
        run()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a failed capture can leave the context unusable, this cannot
        try:
            run()
        except RuntimeError as error:
            return f"no graph: {str(error).partition(chr(10))[0]}"
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return ""

    def host_seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
        """What Python and launching take of a call, while the device keeps up: the median of some rounds."""
        found = []
        with without_collections():
            for _ in range(rounds):
                self.wait()
                start = time.perf_counter()
                for call in calls:
                    call()
                found.append((time.perf_counter() - start) / len(calls))
        self.wait()
        return statistics.median(found)

    def peak_of(self, run: Callable[[], Any]) -> tuple[Any, int, int]:
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        self.wait()
        return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
