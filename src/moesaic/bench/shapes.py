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
    "tiny": Shape("qwen3-moe", "qwen3_moe", 64, 32, 16, 4),
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
            small = tokens <= COLD_UP_TO and mode not in ("memory", "router")
            for cache in ("cold", "warm") if small else ("any",):
                yield Cell(shape, tokens, dtype, mode, routing, cache, threads)


SMOKE = Grid(
    shapes=("tiny", "tiny-gpt-oss"),
    tokens=(1, 32),
    modes=("forward", "fwd+bwd-fresh", "fwd+bwd-accumulate"),
    routings=("balanced",),
)


CHOICES = {
    "shapes": ("--shape", tuple(SHAPES)),
    "dtypes": ("--dtype", DTYPES),
    "modes": ("--mode", MODES),
    "routings": ("--routing", ROUTINGS),
}


def choose(grid: Grid, **given: str | None) -> Grid:
    """`grid` with the axes that a user gave, as text with commas. Raises ValueError for what there is not."""
    axes: dict[str, tuple] = {}
    for axis, text in given.items():
        if text is None:
            continue
        values = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        if axis in CHOICES:
            option, known = CHOICES[axis]
            for value in values:
                if value not in known:
                    raise ValueError(f"{option} {value!r} is unknown: use {', '.join(known)}")
            axes[axis] = values
        else:
            axes[axis] = tuple(_positive(axis, value) for value in values)
    return dataclasses.replace(grid, **axes)


def _positive(axis: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--{axis} {text!r} is not a number from 1: use for example --{axis} 1,2")
    return int(text)
