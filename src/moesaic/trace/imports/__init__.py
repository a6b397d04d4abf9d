"""Records of other engines as traces: what each token was routed to, and no more than the record says."""

from collections.abc import Callable, Iterable
from pathlib import Path

from moesaic.trace.imports import megatron, sglang, vllm
from moesaic.trace.imports.assemble import Imported
from moesaic.trace.imports.target import Target, read_target

__all__ = ["READERS", "Imported", "Target", "read_target"]

# name -> reader of that engine's records
READERS: dict[str, Callable[[Iterable[Path], Target], Imported]] = {
    "sglang": sglang.read,
    "vllm": vllm.read,
    "megatron": megatron.read,
}
