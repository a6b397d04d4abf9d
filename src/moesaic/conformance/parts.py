"""How a module that nobody described is asked: where its weight and bias are, what its tuples mean."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.conformance.verdict import Fault


class Answer(NamedTuple):
    """What a gate said, as it said it.

    ids: chosen experts, [T, K].  weights: in the same order, [T, K].
    """

    ids: Tensor
    weights: Tensor


class NoTuple(TypeError):
    """What was called is no gate: it returned neither ids nor weights."""


class Parts(NamedTuple):
    """Where a module keeps what: names of its tensors."""

    weight: str
    transposed: bool
    linear_bias: str | None
    bias: str | None
    bias_argument: str | None


def find_parts(module: nn.Module, config: MoEConfig) -> Parts:
    """The tensors of a gate, by shape and name. ValueError where it has no [E, D] weight, or lacks its bias."""
    n_experts, hidden = config.n_routed_experts, config.hidden_size
    kind, parameters = type(module).__name__, dict(module.named_parameters())
    weights = [name for name, p in parameters.items() if tuple(p.shape) in ((n_experts, hidden), (hidden, n_experts))]
    if len(weights) != 1:
        raise ValueError(
            f"{kind} holds {len(weights)} weights of [{n_experts}, {hidden}] (experts, hidden size) and one is needed: "
            "give the router itself, its config, or a function (logits, bias, config) -> (ids, weights)"
        )
    tensors = {**parameters, **dict(module.named_buffers())}
    biases = [name for name, t in tensors.items() if "bias" in name and t.numel() == n_experts]
    corrections = sorted(biases, key=lambda name: "correction" not in name)  # a stable sort: those so named come first
    arguments = list(inspect.signature(module.forward).parameters.values())
    argument = next((p.name for p in arguments if "bias" in p.name), None)
    needed = [p.name for p in arguments[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := [name for name in needed if name != argument]:
        raise ValueError(f"{kind} needs {unknown[0]} beside the hidden states: such a gate cannot be judged here")
    linear_bias = correction = None
    if config.router_bias or not config.has_correction_bias:
        linear_bias = next((name for name in reversed(corrections) if "correction" not in name), None)
    if config.has_correction_bias and argument is None:
        correction = next((name for name in corrections if name != linear_bias), None)
        if correction is None:
            raise ValueError(
                f"{kind} has no correction bias, a tensor of [{n_experts}] with 'bias' in its name, and "
                "topk_method='noaux_tc' needs one: use topk_method='greedy' or give it one"
            )
    transposed = tuple(parameters[weights[0]].shape) != (n_experts, hidden)
    return Parts(weights[0], transposed, linear_bias, correction, argument)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name, detached. Fault where the module's own code has taken it away."""
    return slot_of(module, name).detach()


def slot_of(module: nn.Module, name: str) -> Tensor:
    """As `tensor_of`, with its gradient."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if name not in tensors:
        raise Fault(f"it has lost its {name}", f"它丢掉了自己的 {name}", missing=name)
    return tensors[name]


def through_linear(logits: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] and a weight [E, D] whose product is `logits`, exactly in any dtype that holds them."""
    n_tokens, n_experts = logits.shape
    weight = torch.zeros(n_experts, hidden_size)
    hidden = torch.zeros(n_tokens, hidden_size)
    if hidden_size < n_experts:
        raise ValueError(
            f"hidden_size={hidden_size} is below n_routed_experts={n_experts}: such a gate cannot be given all "
            f"logits, use a hidden_size of {n_experts} or more"
        )
    weight[:, :n_experts] = torch.eye(n_experts)
    hidden[:, :n_experts] = logits
    return hidden, weight


def call(module: nn.Module, hidden: Tensor, extra: dict[str, Tensor]) -> Any:
    """`forward` on [T, D]; gates that insist on [B, S, D] are given one sequence."""
    try:
        return module(hidden, **extra)
    except ValueError as error:  # "not enough values to unpack": the article's gate, DeepSeek's remote code
        if hidden.dim() != 2 or "unpack" not in str(error):
            raise
        return module(hidden[None], **extra)


def read_logits(output: Any, config: MoEConfig) -> Tensor | None:
    """The logits [T, E] out of (logits, weights, ids), where they can be told from weights."""
    if not isinstance(output, tuple | list) or len(output) < 3 or config.num_experts_per_tok == config.n_routed_experts:
        return None
    wide = [t for t in output if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]
    return next((t.flatten(0, -2) for t in wide if t.shape[-1] == config.n_routed_experts), None)


def read_answer(output: Any, config: MoEConfig) -> Answer:
    """Ids and weights out of (logits, weights, ids), (ids, weights), (ids, weights, loss), or (dense weights, ids).

    Flat, [T, K], on the CPU. TypeError where it is none of these.
    """
    if not isinstance(output, tuple | list):
        raise NoTuple(f"a {type(output).__name__} came back, not a tuple with ids and weights")
    tensors = [t.cpu().flatten(0, -2) for t in output if isinstance(t, Tensor) and t.dim() >= 2]
    whole = [t for t in tensors if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)]
    real = [t for t in tensors if t.is_floating_point()]
    if len(whole) != 1 or not real:
        raise TypeError(
            f"{len(whole)} tensors of integers and {len(real)} of floats came back: ids and weights unclear"
        )
    ids = whole[0]
    weights = next((t for t in reversed(real) if t.shape[-1] == config.num_experts_per_tok), real[-1])
    if weights.shape != ids.shape and weights.shape[-1] == config.n_routed_experts:
        weights = weights.gather(-1, ids)  # a dense map, as routers of transformers 4 returned
    return Answer(ids, weights)


def check_shape(answer: Answer, n_tokens: int, config: MoEConfig) -> Answer:
    """Fault where ids or weights are not [T, K]: nothing else can be asked of such an answer."""
    wanted = (n_tokens, config.num_experts_per_tok)
    for what, tensor in (("ids", answer.ids), ("weights", answer.weights)):
        if tuple(tensor.shape) != wanted:
            shape = tuple(tensor.shape)
            raise Fault(
                f"{what} have shape {shape}, not [T, K] = {wanted}",
                f"{what} 的形状是 {shape}，应为 [T, K] = {wanted}",
                what=what,
                got=list(shape),
                expected=list(wanted),
            )
    return answer
