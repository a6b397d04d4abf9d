"""What dynamo is told about functions of ours, without loading it, and whether it, or an export, reads one now."""

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def constant_in_graphs(function: F) -> F:
    """Run `function` while a graph is traced and put what it returns into the graph, not what it does.

    `torch.compiler.assume_constant_result` sets the same mark, and imports dynamo first: 1.3 s before the first layer.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def no_graph_of_its_own(function: F) -> F:
    """Have dynamo run `function`, and all that it calls, as it is, unless it reads it as part of what calls it."""
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def is_traced() -> bool:
    """Whether a graph is made of the code that asks.

    `torch.compiler.is_compiling()` is one flag of the process, and true in every thread while any of them compiles
    (torch 2.13). This is a constant to dynamo; an export without dynamo puts its modes on the thread that it traces in.
    """
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_exporting() and torch._C._len_torch_dispatch_stack() > 0
    )
