"""What is measured: the routed experts of real models, and cells of the grid. Data only; nothing here needs torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from moesaic.config import MoEConfig


@dataclass(frozen=True)
class Shape:
    """The routed experts of one model. `preset` gives the rules, `family` names transformers' experts module."""

    preset: str
    family: str
    hidden_size: int
    width: int  # of one expert
    n_experts: int
    k: int

    def config(self) -> MoEConfig:
        sizes = {"hidden_size": self.hidden_size, "moe_intermediate_size": self.width}
        numbers = {"n_routed_experts": self.n_experts, "num_experts_per_tok": self.k, "n_shared_experts": 0}
        return MoEConfig.preset(self.preset, **sizes, **numbers)

    @property
    def num_parameters(self) -> int:
        """Of the routed experts; biases, where there are any, are left out."""
        return self.n_experts * 3 * self.hidden_size * self.width


# "half" and "quarter" shrink D and I alike, so that K, E, D/I and the rows per expert stay those of the model
SHAPES = {
    "qwen3-30b": Shape("qwen3-moe", "qwen3_moe", 2048, 768, 128, 8),
    "olmoe": Shape("olmoe", "olmoe", 2048, 1024, 64, 8),
    "dsv3-quarter": Shape("deepseek-v3", "deepseek_v3", 1792, 512, 256, 8),
    "dsv3-64-half": Shape("deepseek-v3", "deepseek_v3", 3584, 1024, 64, 8),
    "dsv3-ep4": Shape("deepseek-v3", "deepseek_v3", 7168, 2048, 64, 8),
    "mixtral-half": Shape("mixtral", "mixtral", 2048, 7168, 8, 2),
    "mixtral": Shape("mixtral", "mixtral", 4096, 14336, 8, 2),
    "gpt-oss-20b": Shape("gpt-oss", "gpt_oss", 2880, 2880, 32, 4),
    # the sizes that SonicMoE is measured with (arXiv 2512.14080, figure 14)
    "sonic-1.4b-n256": Shape("qwen3-moe", "qwen3_moe", 768, 256, 128, 8),
    "sonic-1.4b-n512": Shape("qwen3-moe", "qwen3_moe", 768, 512, 64, 4),
    "sonic-1.4b-n1024": Shape("qwen3-moe", "qwen3_moe", 768, 1024, 32, 2),
    "sonic-7b-n256": Shape("qwen3-moe", "qwen3_moe", 1536, 256, 128, 8),
    "sonic-7b-n512": Shape("qwen3-moe", "qwen3_moe", 1536, 512, 64, 4),
    "sonic-7b-n1024": Shape("qwen3-moe", "qwen3_moe", 1536, 1024, 32, 2),
    "sonic-30b-n256": Shape("qwen3-moe", "qwen3_moe", 4096, 256, 256, 16),
    "sonic-30b-n512": Shape("qwen3-moe", "qwen3_moe", 4096, 512, 128, 8),
    "sonic-30b-n1024": Shape("qwen3-moe", "qwen3_moe", 4096, 1024, 64, 4),
    "sonic-120b-n512": Shape("qwen3-moe", "qwen3_moe", 4096, 512, 256, 16),
    "sonic-120b-n1024": Shape("qwen3-moe", "qwen3_moe", 4096, 1024, 128, 8),
    "sonic-120b-n2048": Shape("qwen3-moe", "qwen3_moe", 4096, 2048, 64, 4),
    "nano": Shape("qwen3-moe", "qwen3_moe", 32, 16, 4, 2),
    "nano-gpt-oss": Shape("gpt-oss", "gpt_oss", 32, 16, 4, 2),
    "tiny": Shape("qwen3-moe", "qwen3_moe", 64, 32, 16, 4),
    "tiny-dsv3": Shape("deepseek-v3", "deepseek_v3", 64, 32, 16, 4),
    "tiny-gpt-oss": Shape("gpt-oss", "gpt_oss", 64, 64, 8, 2),
}

DTYPES = ("float32", "bfloat16", "float16")
ROUTINGS = ("balanced", "zipf", "all-to-k")
MODES = ("forward", "train-forward", "fwd+bwd-fresh", "fwd+bwd-accumulate", "memory", "router")
TRAINING = ("fwd+bwd-fresh", "fwd+bwd-accumulate", "memory")
COLD_UP_TO = 16  # tokens: from here on a layer reads more weights than a cache holds, cold or warm


@dataclass(frozen=True)
class Cell:
    """One measurement. `cache` is cold, warm, or "any" where the number of tokens leaves no choice."""

    shape: str
    tokens: int
    dtype: str
    mode: str
    routing: str = "balanced"
    cache: str = "any"
    threads: int = 1

    @property
    def key(self) -> str:
        cache = "" if self.cache == "any" else f", {self.cache}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.shape} T={self.tokens} {self.dtype} {self.mode} {self.routing}{cache}, {threads}"

    @property
    def trains(self) -> bool:
        return self.mode in TRAINING

    @property
    def accumulates(self) -> bool:
        """Whether gradients are added to those of the run before."""
        return self.mode == "fwd+bwd-accumulate"

    @classmethod
    def of(cls, fields: dict) -> "Cell":
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Grid:
    """Every combination of these, in an order that loads each set of weights once."""

    shapes: tuple[str, ...] = ("qwen3-30b", "olmoe", "dsv3-quarter")
    tokens: tuple[int, ...] = (1, 16, 128, 512, 2048)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = ("forward",)
    routings: tuple[str, ...] = ("balanced", "zipf")
    threads: tuple[int, ...] = (1,)

    def cells(self) -> Iterator[Cell]:
        axes = (self.shapes, self.dtypes, self.threads, self.modes, self.routings, self.tokens)
        for shape, dtype, threads, mode, routing, tokens in product(*axes):
            if mode == "router" and routing != self.routings[0]:
                continue  # a router decides by itself
            small = tokens <= COLD_UP_TO and mode not in ("memory", "router")
            for cache in ("cold", "warm") if small else ("any",):
                yield Cell(shape, tokens, dtype, mode, routing, cache, threads)


TINY = (
    "nano",
    "nano-gpt-oss",
    "tiny",
    "tiny-dsv3",
    "tiny-gpt-oss",
)  # to see that everything works: their times say nothing
SMOKE = Grid(("tiny",), (1, 32), modes=("forward", "fwd+bwd-fresh"), routings=("balanced",))
ROUNDS, SMOKE_ROUNDS = 10, 3


def smoke_cells(threads: int) -> list[Cell]:
    """What a smoke run has beside its grid: the other modes, and the other kinds of experts."""
    return [
        Cell("tiny", 32, "bfloat16", "fwd+bwd-accumulate", "zipf", threads=threads),
        Cell("tiny", 32, "float32", "memory", threads=threads),
        Cell("tiny-gpt-oss", 32, "float32", "train-forward", "all-to-k", threads=threads),
        Cell("tiny-dsv3", 32, "float32", "router", threads=threads),
    ]


AXES = {
    "shapes": "shape", "tokens": "tokens", "dtypes": "dtype", "modes": "mode", "routings": "routing",
    "threads": "threads",
}  # fmt: skip
KNOWN = {"shapes": tuple(SHAPES), "dtypes": DTYPES, "modes": MODES, "routings": ROUTINGS}


def choose(**given: str | None) -> dict[str, tuple]:
    """The axes of a Grid that a user gave, as text with commas. Raises ValueError for what there is not."""
    return {axis: tuple(_values(axis, text)) for axis, text in given.items() if text is not None}


def _values(axis: str, text: str) -> Iterator[str | int]:
    option = f"--{AXES[axis]}"
    for value in dict.fromkeys(part.strip() for part in text.split(",")):
        if axis in KNOWN:
            if value not in KNOWN[axis]:
                raise ValueError(f"{option} {value!r} is unknown: use {', '.join(KNOWN[axis])}")
            yield value
        elif value.isdecimal() and int(value) > 0:
            yield int(value)
        else:
            raise ValueError(f"{option} {value!r} is not a number from 1: use for example {option} 1,2")
