"""What autograd is going to do with the gradients of a backward: whether it collects them at all, and where they may be
added to ones that exist, instead of handing it new ones to add."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.engine.surroundings import is_plain


def collected(ctx: Any, given: Sequence[Tensor | None]) -> list[bool]:
    """For each tensor that an operator was given whether this very backward collects its gradient.

    Forward knows what may be asked for, `ctx.needs_input_grad`; `backward(inputs=...)` and `torch.autograd.grad` then
    ask for less, as for the tokens alone, and the gradients of weights are most of a backward's time and memory.
    """
    return [tensor is not None and _will_run(node) for tensor, node in zip(given, _nodes(ctx, given), strict=True)]


def _nodes(ctx: Any, given: Sequence[Tensor | None]) -> list[Any]:
    """Where the gradient of each tensor that an operator was given goes to."""
    edges = iter(ctx.next_functions)  # one for each that is a tensor
    return [None if tensor is None else next(edges)[0] for tensor in given]


def _will_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` asks for, or nobody to say so
        return True


def accumulation_targets(
    ctx: Any, given: Sequence[Tensor | None], grad_out: Tensor, weights: slice
) -> tuple[Tensor | None, ...]:
    """For each weight, given[weights], the `.grad` of the leaf it is, where adding to that now is what autograd would
    do later; else None.

    That is so for a leaf, not frozen since, with a dense gradient of its dtype, not made in inference mode, which is
    not the other weight's too and lies in no storage of `grad_out` or another input, still to be read; without hooks,
    and whose AccumulateGrad node this very backward is going to run. The leaf is known by the edge of the graph: under
    checkpointing and other hooks on saved tensors `given` holds another tensor of its values. Adding saves a
    gradient-sized tensor of zeros and three passes over it. Prehooks put on that node itself cannot be seen from here:
    they get None. On a GPU it is so on the default stream only: autograd orders its own additions between streams, not
    ours. A dispatch mode is to see an operator, and what is negated when read is for the operator to resolve.
    """
    nodes, given_weights = _nodes(ctx, given)[weights], given[weights]
    nobody = (None,) * len(nodes)
    read = [tensor for tensor in (grad_out, *given) if tensor is not None]
    if torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack() > 0 or not all(map(is_plain, read)):
        return nobody
    device = grad_out.device
    if grad_out.is_cuda and torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return nobody
    try:
        targets = tuple(_target(weight, node) for weight, node in zip(given_weights, nodes, strict=True))
    except RuntimeError:  # inside torch.autograd.grad, which collects gradients instead of storing them
        return nobody
    added_to = [target for target in targets if target is not None]
    twice = len({id(target) for target in added_to}) < len(added_to)
    return nobody if twice or _storages(added_to) & _storages(read) else targets


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _target(weight: Tensor | None, node: Any) -> Tensor | None:
    if weight is None or node is None or node.name() != "torch::autograd::AccumulateGrad":
        return None
    leaf = node.variable
    if not leaf.requires_grad or not torch._C._will_engine_execute_node(node):
        return None
    grad = leaf.grad
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None) or grad is None:
        return None
    plain = type(grad) is Tensor and grad.layout is torch.strided and not (grad.requires_grad or grad.is_inference())
    same = grad.dtype == weight.dtype and grad.device == weight.device
    same = same and grad.shape == weight.shape and grad.stride() == weight.stride()
    return grad if plain and same else None
