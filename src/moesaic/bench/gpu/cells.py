"""What benchmarks/gpu.py measures, the most important first, so that a run cut short is worth as much as it can be."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.bench.shapes import Cell

LADDER, LADDER_TOKENS = "qwen3-30b", 32768  # the shape that most published numbers are for (performance notes, 2.1)
OURS, INVARIANT, GROUPED = "ours: triton", "ours: batch-invariant", "ours: grouped"
EAGER, BATCHED_MM, GROUPED_MM = "transformers eager", "transformers batched_mm", "transformers grouped_mm"
TITAN, LIGER = "torchtitan-style", "liger"
TORCH = (TITAN, GROUPED_MM)  # what torch's own grouped_mm gives, the measure of errors and of speed
FAST = (OURS, *TORCH)  # cells that only ask whether we are below
EVERYBODY = (OURS, GROUPED, EAGER, GROUPED_MM, BATCHED_MM, TITAN)
# in cells of its own: it searches for tiles at its first call of every size, and a run that ends there loses the cell
BESIDE_LIGER = (OURS, TITAN, LIGER)
COMPILED_RULES = "rules.route compiled"

# experts: T tokens at a time.  decode: graph replay on weights that are in no cache.  router: the routing kernel and
# the rules in torch, compiled where `who` asks.  memory: bytes held and at the peak.  kernels: the time of each.
Kind = Literal["experts", "decode", "router", "memory", "kernels"]


@dataclass(frozen=True)
class GpuCell:
    """One measurement. `who`: names of contenders. `mode` as in `shapes.Cell`."""

    kind: Kind
    shape: str
    tokens: int
    dtype: str = "bfloat16"
    mode: str = "forward"
    routing: str = "balanced"
    who: tuple[str, ...] = FAST

    @property
    def key(self) -> str:
        words = [self.kind, self.shape, f"T={self.tokens}", self.dtype, self.mode, self.routing]
        return " ".join([*words, "beside Liger"] if LIGER in self.who else words)

    @property
    def problem_cell(self) -> Cell:
        return Cell(self.shape, self.tokens, self.dtype, self.mode, self.routing)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "GpuCell":
        return dataclasses.replace(cls(**fields), who=tuple(fields["who"]))


FORWARD, TRAIN_FORWARD, STEP, ADDING = "forward", "train-forward", "fwd+bwd-fresh", "fwd+bwd-accumulate"
SONIC = (
    "sonic-30b-n512", "sonic-120b-n1024", "sonic-7b-n256", "sonic-1.4b-n256", "sonic-30b-n1024", "sonic-120b-n2048",
    "sonic-7b-n1024", "sonic-30b-n256", "sonic-120b-n512", "sonic-7b-n512", "sonic-1.4b-n512", "sonic-1.4b-n1024",
)  # fmt: skip
SONIC_TOKENS = {"1.4b": 40960, "7b": 24576, "30b": 32768, "120b": 32768}


def cells(*, liger: bool) -> Iterator[GpuCell]:
    """All of a real run, those beside Liger where it is installed."""
    first = GpuCell("experts", LADDER, 128, mode=STEP)  # seconds, for nearly every kernel: what fails shows here
    yield first
    yield GpuCell("experts", LADDER, LADDER_TOKENS, mode=FORWARD, who=(*EVERYBODY, INVARIANT))
    for mode in (STEP, TRAIN_FORWARD):
        yield GpuCell("experts", LADDER, LADDER_TOKENS, mode=mode, who=EVERYBODY)
    yield GpuCell("kernels", LADDER, LADDER_TOKENS, mode=STEP, who=(OURS,))
    for tokens in (1, 16):
        yield GpuCell("decode", LADDER, tokens, who=(OURS, GROUPED_MM, BATCHED_MM, TITAN))
    for tokens in (1, 16, 128):
        yield GpuCell("router", "deepseek-v3", tokens, "float32", who=())
    for mode in (FORWARD, STEP, TRAIN_FORWARD):
        for tokens in (128, 512, 2048, 4096, 8192, 16384):
            cell = GpuCell("experts", LADDER, tokens, mode=mode, who=(*FAST, INVARIANT) if mode == FORWARD else FAST)
            if cell != first:
                yield cell
    for tokens in (128, 2048):
        yield GpuCell("kernels", LADDER, tokens, mode=STEP, who=(OURS,))
    yield GpuCell("memory", LADDER, LADDER_TOKENS, mode=STEP, who=(OURS, GROUPED_MM, TITAN))
    if liger:
        yield from _beside_liger()
    yield GpuCell("router", "deepseek-v3", 4096, "float32", who=(COMPILED_RULES,))
    yield GpuCell("experts", LADDER, LADDER_TOKENS, mode=ADDING)
    yield from _other_shapes()
    yield from _other_numbers()
    yield GpuCell("memory", "sonic-30b-n512", 32768, mode=STEP, who=(OURS, GROUPED_MM, TITAN))


def _beside_liger() -> Iterator[GpuCell]:
    for mode in (FORWARD, STEP, TRAIN_FORWARD):
        yield GpuCell("experts", LADDER, LADDER_TOKENS, mode=mode, who=BESIDE_LIGER)
    yield GpuCell("memory", LADDER, LADDER_TOKENS, mode=STEP, who=BESIDE_LIGER)
    for tokens in (1, 16):
        yield GpuCell("decode", LADDER, tokens, who=BESIDE_LIGER)
    for mode in (FORWARD, STEP):
        yield GpuCell("experts", LADDER, 4096, mode=mode, who=BESIDE_LIGER)


def _other_shapes() -> Iterator[GpuCell]:
    for shape in SONIC[:2]:
        for mode in (FORWARD, STEP):
            yield GpuCell("experts", shape, SONIC_TOKENS[shape.split("-")[1]], mode=mode)
    for shape, tokens in (("gpt-oss-20b", 4096), ("mixtral", 4096), ("dsv3-ep4", 4096), ("olmoe", 4096)):
        for mode in (FORWARD, STEP):
            yield GpuCell("experts", shape, tokens, mode=mode)
    for shape in ("gpt-oss-20b", "mixtral", "dsv3-ep4"):
        yield GpuCell("decode", shape, 1, who=(OURS, GROUPED_MM, BATCHED_MM))
    for shape in SONIC[2:]:
        for mode in (FORWARD, STEP):
            yield GpuCell("experts", shape, SONIC_TOKENS[shape.split("-")[1]], mode=mode)


def _other_numbers() -> Iterator[GpuCell]:
    for routing in ("zipf", "all-to-k"):
        for mode in (FORWARD, STEP):
            yield GpuCell("experts", LADDER, 8192, mode=mode, routing=routing)
    for dtype, tokens in (("float16", 8192), ("float32", 2048)):
        for mode in (FORWARD, STEP):
            yield GpuCell("experts", LADDER, tokens, dtype, mode, who=(*FAST, EAGER))


def smoke_cells() -> Iterator[GpuCell]:
    """Every kind once, small enough for the interpreter."""
    yield GpuCell("experts", "nano", 5, "float32", FORWARD, who=EVERYBODY)
    yield GpuCell("experts", "nano", 5, "float32", STEP, "zipf", who=(*FAST, INVARIANT))
    yield GpuCell("experts", "nano", 3, "float32", ADDING, who=BESIDE_LIGER)
    # not bfloat16: the interpreter cuts its bits off where a GPU rounds
    yield GpuCell("experts", "nano-gpt-oss", 3, "float16", TRAIN_FORWARD, "all-to-k", who=(OURS, EAGER, TITAN))
    yield GpuCell("decode", "nano", 1, "float32", who=(OURS, BATCHED_MM, TITAN))
    yield GpuCell("router", "deepseek-v3", 2, "float32", who=())
    yield GpuCell("memory", "nano", 4, "float32", STEP, who=(OURS, TITAN))
    yield GpuCell("kernels", "nano", 4, "float32", STEP, who=(OURS,))
