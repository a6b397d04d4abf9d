"""Who computes a cell: our engines, and the peers that people use."""

import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.bench.machine import available_bytes
from moesaic.bench.problem import Problem
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.engine.select import ENGINES, best_engine

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # (tokens, expert_ids, weights) -> out, on the problem's experts
BATCHED_UP_TO = 64  # tokens


@dataclass(frozen=True)
class Contender:
    """`build` prepares outside the clock; `refuses` says why a cell is not for it, or nothing.

    kind: "ours" or "peer". A call that keeps weights in a layout of its own has an attribute `prepacked_bytes`; one
    that does not train the problem's Parameters has `leaves` and `expert_grads(expert)`.
    """

    name: str
    kind: str
    build: Callable[[Problem], Call]
    refuses: Callable[[Cell], str | None] = lambda _cell: None


def our_engine(name: str) -> Contender:
    def build(problem: Problem) -> Call:
        engine, experts, spec = ENGINES[name], problem.experts, problem.spec
        return lambda tokens, ids, weights: engine(tokens, ids, weights, experts, spec)

    return Contender(f"ours: {name}", "ours", build)


def our_engines(names: Iterable[str], dtype: str) -> list[Contender]:
    """Contenders of `--engine`; "auto" is what the library takes for this dtype."""
    found: dict[str, Contender] = {}
    for name in names:
        engine = best_engine("cpu", getattr(torch, dtype))[0] if name == "auto" else name
        if engine not in ENGINES:
            raise ValueError(f"--engine {name} is unknown: use auto, {', '.join(ENGINES)}")
        found[engine] = our_engine(engine)
    return list(found.values())


CLASSES = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeExperts"),
    "olmoe": ("OlmoeConfig", "OlmoeExperts"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3Experts"),
    "mixtral": ("MixtralConfig", "MixtralExperts"),
    "gpt_oss": ("GptOssConfig", "GptOssExperts"),
}


def transformers_experts(problem: Problem, implementation: str, family: str) -> torch.nn.Module:
    """The family's own experts module, holding the problem's Parameters themselves."""
    import transformers

    c = problem.config
    config_name, class_name = CLASSES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    numbers = dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), c.n_routed_experts)
    widths = dict.fromkeys(("moe_intermediate_size", "intermediate_size"), c.moe_intermediate_size)
    known = inspect.signature(getattr(transformers, config_name)).parameters
    sizes = {name: size for name, size in {**numbers, **widths}.items() if name in known}
    sizes |= {"hidden_size": c.hidden_size, "num_experts_per_tok": c.num_experts_per_tok}
    config = getattr(transformers, config_name)(**sizes)
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = getattr(module, class_name)(config)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for name, weight in zip(names, problem.experts, strict=True):
        if weight is not None:
            assert getattr(experts, name).shape == weight.shape, f"{class_name}.{name} has another shape"
            setattr(experts, name, weight)
    return experts


def transformers_peer(implementation: str, refuses: Callable[[Cell], str | None] = lambda _cell: None) -> Contender:
    def build(problem: Problem) -> Call:
        return transformers_experts(problem, implementation, SHAPES[problem.cell.shape].family)

    return Contender(f"transformers {implementation}", "peer", build, refuses)


def _copies_too_much(cell: Cell) -> str | None:
    """batched_mm gathers a copy of the weights for every assignment."""
    if cell.tokens > BATCHED_UP_TO:
        return f"copies the weights of every assignment: T <= {BATCHED_UP_TO} only"
    shape, item = SHAPES[cell.shape], 4 if cell.dtype == "float32" else 2
    copied = item * cell.tokens * shape.k * shape.num_parameters // shape.n_experts * (3 if cell.trains else 1)
    available = available_bytes()
    if available is not None and copied > available // 2:
        return f"would copy {copied / 2**30:.0f} GiB of weights"
    return None


class ThreeGroupedMM:
    """Sort by expert, F.grouped_mm for gate, up and down, weights in float32, a sum over slots: as torchtitan does it.

    Gate and up are two parameters there, hence leaves of their own here, in the memory of the fused one: as views of it
    their gradients would be padded with zeros and added up.
    """

    def __init__(self, problem: Problem) -> None:
        gate, up = problem.experts.up.detach().chunk(2, dim=1)
        self.gate, self.up = nn.Parameter(gate), nn.Parameter(up)
        self.leaves = (self.gate, self.up)
        self.down, self.n_experts = problem.experts.down, problem.config.n_routed_experts

    def __call__(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k = ids.shape[-1]
        sorted_ids, order = ids.flatten().sort(stable=True)
        experts = torch.arange(self.n_experts, device=ids.device)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)  # bincount would wait for a GPU
        rows = tokens[order // k]
        gate, up = (F.grouped_mm(rows, weight.mT, offs=ends) for weight in self.leaves)
        out = F.grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)
        out = (out.float() * weights.flatten()[order, None].float()).to(tokens.dtype)
        unsorted = torch.empty_like(out).index_copy_(0, order, out)
        return unsorted.unflatten(0, (-1, k)).sum(1)

    def expert_grads(self, expert: int) -> list[Tensor | None]:
        grads = [leaf.grad for leaf in (*self.leaves, self.down)]
        if any(grad is None for grad in grads):
            return [None, None]
        gate, up, down = (grad[expert] for grad in grads if grad is not None)
        return [torch.cat([gate, up]), down]


def _plain_silu_only(cell: Cell) -> str | None:
    return "no biases, no clamped activation" if SHAPES[cell.shape].config().expert_bias else None


PEERS: dict[str, Contender] = {
    "eager": transformers_peer("eager"),
    "batched_mm": transformers_peer("batched_mm", _copies_too_much),
    "grouped_mm": transformers_peer("grouped_mm"),
    "torchtitan": Contender("torchtitan-style", "peer", ThreeGroupedMM, _plain_silu_only),
}


def peers_named(names: Iterable[str]) -> list[Contender]:
    """Built-in peers by name, and those of files: FILE.py, which has a list `PEERS` of Contenders, or FILE.py:NAME.

    Raises ValueError where a name is unknown, a file is not there or says that it cannot run.
    """
    found: list[Contender] = []
    for name in names:
        path, _, only = name.rpartition(":") if name.rpartition(":")[0].endswith(".py") else (name, "", "")
        if path.endswith(".py"):
            found += _peers_of(Path(path), only)
        elif name in PEERS:
            found.append(PEERS[name])
        elif name != "none":
            raise ValueError(f"--peers {name} is unknown: use {', '.join(PEERS)}, none, or a .py file")
    for name, times in Counter(peer.name for peer in found).items():
        if times > 1:
            raise ValueError(f"--peers has {name!r} {times} times: give each a name of its own")
    return found


def _peers_of(path: Path, only: str) -> list[Contender]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--peers {path}: no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--peers {path}: {error}") from None
    except Exception as error:  # a file of the user's may raise anything
        raise ValueError(f"--peers {path}: {type(error).__name__}: {error}") from None
    peers = getattr(module, "PEERS", None)
    if not isinstance(peers, list) or not all(isinstance(peer, Contender) for peer in peers):
        raise ValueError(f"--peers {path}: it has no list PEERS of moesaic.bench.contenders.Contender")
    chosen = [peer for peer in peers if only in ("", peer.name)]
    if not chosen:
        raise ValueError(f"--peers {path}:{only}: it has {', '.join(peer.name for peer in peers) or 'nobody'}")
    return chosen
