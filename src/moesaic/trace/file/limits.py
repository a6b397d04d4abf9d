"""What a trace file may hold, for who writes one and for who reads one (docs: trace-format)."""

from collections.abc import Sequence

from torch import Tensor

from moesaic.trace.store import PHASES

MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
MOST_SEQUENCES = 1 << 24  # a number of a sequence beyond would make every count over sequences a memory bomb
MOST_EXPERTS = 1 << 16  # and
MOST_PER_TOKEN = 1 << 10  # of them: a file of some kB must not ask for tables of thousands of random tokens beyond
MOST_TEXT = 4096  # characters of one name, label or piece


def check_range(name: str, low: int, high: int, n_experts: int) -> None:
    """ValueError where the smallest and largest number of the tensor `name` are not allowed."""
    most = {"picks": n_experts, "sequences": MOST_SEQUENCES - 1, "phases": len(PHASES) - 1}.get(name, 2**63 - 1)
    if low < 0 or high > most:
        raise ValueError(f"{name} reach from {low} to {high}: 0 to {most} is allowed")


def check_offsets(offsets: Tensor) -> None:
    """ValueError where a token [T, 2] ends before it begins."""
    if bool((offsets[:, 0] > offsets[:, 1]).any()):
        raise ValueError("offsets end before they begin")


def check_labels(labels: Sequence[str] | None, n_sequences: int) -> None:
    """ValueError where a sequence has no label and others may have one."""
    if labels is not None and len(labels) < n_sequences:
        raise ValueError(f"{len(labels)} labels for {n_sequences} sequences: give one label a sequence")


def check_names(labels: Sequence[str] | None) -> None:
    """ValueError for labels that are not a list of texts."""
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r} is one name: give a list, one name a sequence")
    if labels is None:
        return
    if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels={labels!r} are not names: give a list of texts, one a sequence")


def check_seed(seed: object) -> None:
    """ValueError for a seed that is neither None nor a whole number of 64 bits."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**64):
        raise ValueError(f"seed={repr(seed)[:40]} is not a whole number of 64 bits: give one, or none")
