"""What one rank does for all."""

from typing import Any

import torch


def is_first_rank() -> bool:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there or torch.distributed.get_rank() == 0


def shared(found: Any) -> Any:
    """What the first rank found, on all of them: else the others would wait for it for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    told = [found]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
