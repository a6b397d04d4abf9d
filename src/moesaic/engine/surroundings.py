"""What lies around the call of an operator: graphs being made, modes, transforms, batches, subclasses of Tensor."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moesaic.engine.tracing import constant_in_graphs


def is_watched(tokens: Tensor, *others: Tensor | None) -> bool:
    """Whether anything lies between the call and the kernel: a graph being made, a mode, a transform, autocast, a
    profiler, a subclass of Tensor, a view that is negated when read.

    Where nothing does, in plain inference, the operator itself is left out: 100 to 150 µs a layer, 4 % of a decoded
    token (dsv3-quarter float32 3.36 | 3.24 ms, qwen3-30b bfloat16 4.33 | 4.15).
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled(tokens.device.type)
        or torch.autograd._profiler_enabled()
        or any(tensor is not None and not is_plain(tensor) for tensor in (tokens, *others))
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the memory of `tensor` as it lies: no subclass, no view that is negated when read."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg()


def is_batched(tensor: Tensor) -> bool:
    """Whether it is many, under vmap or torch.autograd.grad(..., is_grads_batched=True)."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


# Both are constants of a graph: torch.func's transforms in it are traced with it, those around it are guarded by. A
# forward-mode level that is entered after compilation is not: the graph then gives no tangent.
@constant_in_graphs
def is_transformed() -> bool:
    """True inside torch.func.grad, vmap and their kin and under forward-mode AD."""
    return torch.autograd.forward_ad._current_level >= 0 or bool(torch._C._functorch.get_interpreter_stack())


@constant_in_graphs
def is_differentiated() -> bool:
    """True inside torch.func.grad and its kin and under forward-mode AD, which library operators do not support.

    Raises ValueError where vmap lies around such a transform; by itself it has a rule, which does the same.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    if vmap in levels[:-1]:
        refuse_vmap()
    return bool(levels) and levels[-1] != vmap


def refuse_vmap(*_: Any) -> NoReturn:
    raise ValueError(
        "vmap over experts is not supported: flatten the mapped axis into the tokens, as the layer does with any "
        "leading axes"
    )


def refuse_subclasses(error: Exception, **given: Tensor | None) -> None:
    """Raise ValueError for the first tensor of a kind that runs operators in its own way, and fails to run ours."""
    for name, tensor in given.items():
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{name}: the operator of the experts cannot run on a {type(tensor).__name__} ({error}). "
                "Give a plain tensor, as FSDP does while a layer runs"
            ) from error
