"""What autograd is going to do with the gradients of a backward: whether it collects them at all, and where they may be
added to ones that exist, instead of handing it new ones to add."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collected(ctx: Any, given: Sequence[Tensor | None]) -> list[bool]:
    """For each tensor that an operator was given whether this very backward collects its gradient.

    Forward knows what may be asked for, `ctx.needs_input_grad`; `backward(inputs=...)` and `torch.autograd.grad` then
    ask for less, as for the tokens alone, and the gradients of weights are most of a backward's time and memory.
    """
    edges = iter(ctx.next_functions)  # one for each that is a tensor
    return [tensor is not None and _will_run(next(edges)[0]) for tensor in given]


def _will_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` asks for, or nobody to say so
        return True


def accumulation_targets(ctx: Any, grad_out: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """For each weight its `.grad`, where adding to it now is what autograd would do later; else None.

    That is so for a leaf, not frozen since, with a dense gradient of its dtype, not made in inference mode, which is
    not the other weight's too and lies in no storage of `grad_out`, still to be read; without hooks, and whose
    AccumulateGrad node this very backward is going to run: node and weight are checked by identity. Adding saves a
    gradient-sized tensor of zeros and three passes over it. Prehooks put on that node itself cannot be seen from here:
    they get None. On a GPU it is so on the default stream only: autograd orders its own additions between streams, not
    ours.
    """
    nobody = (None,) * len(weights)
    if type(grad_out) is not Tensor or torch.is_anomaly_enabled():
        return nobody
    device = grad_out.device
    if grad_out.is_cuda and torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return nobody
    leaves = {id(node.variable): node for node, _ in ctx.next_functions if _is_accumulate_grad(node)}
    try:
        targets = tuple(_target(weight, leaves.get(id(weight))) for weight in weights)
    except RuntimeError:  # inside torch.autograd.grad, which collects gradients instead of storing them
        return nobody
    added_to = [target for target in targets if target is not None]
    twice = len({id(target) for target in added_to}) < len(added_to)
    read = grad_out.untyped_storage()._cdata in [target.untyped_storage()._cdata for target in added_to]
    return nobody if twice or read else targets


def _is_accumulate_grad(node: Any) -> bool:
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _target(weight: Tensor, node: Any) -> Tensor | None:
    if node is None or not weight.requires_grad or not torch._C._will_engine_execute_node(node):
        return None
    grad = weight.grad
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None) or grad is None:
        return None
    plain = type(grad) is Tensor and grad.layout is torch.strided and not (grad.requires_grad or grad.is_inference())
    same = grad.dtype == weight.dtype and grad.device == weight.device and grad.stride() == weight.stride()
    return grad if plain and same else None
