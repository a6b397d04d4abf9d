"""What an engine is given, looked at once at its border: a wrong shape is a sentence, never a crash in a kernel."""

import torch
from torch import Tensor

from moesaic.engine.spec import ExpertSpec
from moesaic.engine.tracing import constant_in_graphs
from moesaic.types import ExpertWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of tokens, weights and experts


def check_inputs(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: ExpertWeights, spec: ExpertSpec) -> None:
    """Raise ValueError for shapes, dtypes or devices that do not fit together. Reads no values, hence no waiting."""
    if tokens.dim() != 2 or expert_ids.dim() != 2 or weights.dim() != 2:
        raise ValueError(
            f"tokens {_shape(tokens)}, expert_ids {_shape(expert_ids)}, weights {_shape(weights)}: "
            "give [T, D], [T, K] and [T, K] (flatten leading axes first)"
        )
    if expert_ids.shape != weights.shape or tokens.shape[0] != expert_ids.shape[0]:
        raise ValueError(
            f"expert_ids {_shape(expert_ids)} and weights {_shape(weights)} do not fit tokens {_shape(tokens)}: "
            f"give [{tokens.shape[0]}, K] of both"
        )
    if expert_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(
            f"expert_ids are {expert_ids.dtype}: give int64 (or int32, int16, uint8), the ids that the router chose"
        )
    for name, tensor in (("tokens", tokens), ("weights", weights), *experts._asdict().items()):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} are {tensor.dtype}: give one of {', '.join(map(str, DTYPES))}")
    _check_matrices(tokens, experts, spec)
    for name, tensor in (("expert_ids", expert_ids), ("weights", weights), *experts._asdict().items()):
        if tensor is not None and tensor.device != tokens.device:
            raise ValueError(f"tokens are on {tokens.device}, {name} on {tensor.device}: move one of them")


def autocasts(tokens: Tensor) -> bool:
    """Whether autocast is on that casts the operands of a matmul of `tokens`."""
    kind = tokens.device.type
    return tokens.dtype != torch.float64 and _can_autocast(kind) and torch.is_autocast_enabled(kind)


@constant_in_graphs  # which torch 2.11 cannot trace
def _can_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def check_dtypes(tokens: Tensor, experts: ExpertWeights) -> None:
    """Raise ValueError where tokens and experts differ in dtype, which only autocast allows."""
    if autocasts(tokens):
        return
    for name, tensor in experts._asdict().items():
        if tensor is not None and tensor.dtype != tokens.dtype:
            raise ValueError(f"tokens are {tokens.dtype}, {name} is {tensor.dtype}: cast one, or use torch.autocast")


def check_ids(expert_ids: Tensor, n_experts: int) -> None:
    """Raise ValueError for ids that name no expert; E itself means "no expert" and is lawful. Reads them, so on a GPU
    it waits."""
    if expert_ids.numel():
        lowest, highest = torch.stack(torch.aminmax(expert_ids)).tolist()
        check_id_range(lowest, highest, n_experts)


def check_id_range(lowest: int, highest: int, n_experts: int) -> None:
    """`check_ids`, of the lowest and the highest."""
    if lowest < 0 or highest > n_experts:
        raise ValueError(
            f"expert_ids reach from {lowest} to {highest}: there are {n_experts} experts, 0 to {n_experts - 1}, "
            f"and {n_experts} means no expert"
        )


def _check_matrices(tokens: Tensor, experts: ExpertWeights, spec: ExpertSpec) -> None:
    up, down, up_bias, down_bias = experts
    if up.dim() != 3 or down.dim() != 3 or len(up) != len(down):
        raise ValueError(f"up {_shape(up)} and down {_shape(down)}: give one matrix an expert, [E, ., .] of both")
    up_out, up_in = spec.up_size(experts), up.shape[-2 if spec.transposed else -1]
    width = down.shape[-2 if spec.transposed else -1]
    layout = "[E, in, out] (transposed)" if spec.transposed else "[E, out, in]"
    if up_in != tokens.shape[1]:
        raise ValueError(f"tokens have width {tokens.shape[1]}, up {_shape(up)} takes {up_in}: the layout is {layout}")
    if up_out != (2 * width if spec.gated else width):
        raise ValueError(
            f"up {_shape(up)} gives {up_out}, down {_shape(down)} takes {width}: "
            f"{'gated experts give twice that' if spec.gated else 'give as many'}; the layout is {layout}"
        )
    for name, bias, size in (("up_bias", up_bias, up_out), ("down_bias", down_bias, spec.output_size(experts))):
        if bias is not None and bias.shape != (len(up), size):
            raise ValueError(f"{name} is {_shape(bias)}: give [{len(up)}, {size}]")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
