"""What recording costs: forwards with and without it in turn, in one process, and the memory of a long record."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.bench.timing import Clock, Entrant, Spread, interleave, spread
from moesaic.trace.recording.record import record

PLAIN = "not recorded"
MID_SIZE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 256, "norm_topk_prob": True,
}  # fmt: skip


class Cost(NamedTuple):
    """Seconds of a forward under one detail, and by how much more it is than one that is not recorded (0.01 = 1 %)."""

    detail: str
    seconds: Spread
    overhead: float


def recording_cost(
    model: nn.Module,
    input_ids: torch.Tensor,
    details: Sequence[str] = ("ids", "picks", "scores"),
    *,
    rounds: int = 41,
    forwards: int = 1,
    to: Path | None = None,
) -> list[Cost]:
    """Forwards of `model`, not recorded and under each detail, in turn; the overhead is that of the medians.

    forwards: how many each record holds; the seconds are those of one. to: a file that records go to. What a record
    does when it is closed (put the trace, or its file, together) is not in them.

    The clock counts what this process computes: another one on the machine does not disturb it.
    """
    stack = ExitStack()

    def entrant(detail: str) -> Entrant:
        def prepare() -> None:
            stack.close()
            if detail != PLAIN:
                stack.enter_context(record(model, detail, to=to))

        def run() -> None:
            for _ in range(forwards):
                model(input_ids)

        return Entrant(detail, prepare, run)

    names = (PLAIN, *details)
    with torch.inference_mode(), stack:
        entrants = [entrant(name) for name in names]
        interleave(entrants, dict.fromkeys(names, 3))  # warm
        seconds = interleave(entrants, dict.fromkeys(names, rounds), Clock(time.process_time))
    found = {name: spread([second / forwards for second in seconds[name]]) for name in names}
    return [Cost(name, found[name], found[name].median / found[PLAIN].median - 1.0) for name in names]


def mid_size_model() -> Any:
    """A random Qwen3-MoE of 8 layers, 64 experts, 8 a token, D=512: 26 million parameters a layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MID_SIZE)).eval()


class Routes(nn.Module):
    """Layers that route at random and compute nothing: what a long record needs is then the record's alone."""

    def __init__(self, n_layers: int, n_experts: int, k: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(n_experts, k) for _ in range(n_layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(input_ids.numel(), 1)
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    """A gate and experts in shape only."""

    def __init__(self, n_experts: int, k: int) -> None:
        super().__init__()
        from moesaic.config import MoEConfig

        self.config = MoEConfig(hidden_size=1, n_routed_experts=n_experts, num_experts_per_tok=k)
        self.gate, self.experts = nn.Linear(1, n_experts), Nothing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n_experts, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        return self.experts(x, torch.randint(n_experts, (len(x), k)), torch.rand(len(x), k))


class Nothing(nn.Module):
    """Takes what experts take."""

    def forward(self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        del expert_ids, weights
        return tokens


def batches(n_tokens: int, size: int = 2048) -> Iterator[torch.Tensor]:
    """Token ids in batches of one row."""
    for start in range(0, n_tokens, size):
        yield torch.zeros(1, min(size, n_tokens - start), dtype=torch.int64)


def recording_memory(n_tokens: int, n_layers: int = 26, n_experts: int = 256, k: int = 8, detail: str = "picks") -> int:
    """Bytes that this process grew by at its peak while it recorded and made the trace. Run it in a fresh process.

    The high-water mark of resident memory, after a first forward that is not counted.
    """
    import resource

    model = Routes(n_layers, n_experts, k)
    with record(model, detail) as warm:
        model(torch.zeros(1, 2048, dtype=torch.int64))
    del warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with record(model, detail) as recorder, torch.no_grad():
        for batch in batches(n_tokens):
            model(batch)
    trace = recorder.trace
    assert len(trace) == n_tokens
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
