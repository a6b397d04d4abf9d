"""Whether there are ranks, and what one of them does for all."""

from typing import Any

import torch


def has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_rank() -> bool:
    return not has_ranks() or torch.distributed.get_rank() == 0


def shared(found: Any) -> Any:
    """What the first rank found, on all of them: else the others would wait for it for ever."""
    if not has_ranks():
        return found
    told = [found]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
