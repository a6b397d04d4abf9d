"""The task of one cell: weights that every contender shares, tokens, routing, and a gradient to send back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.bench.routing import DRAWS
from moesaic.bench.shapes import SHAPES, Cell
from moesaic.config import MoEConfig
from moesaic.engine.spec import ExpertSpec
from moesaic.types import ExpertWeights


@dataclass(frozen=True)
class Problem:
    """One cell in tensors. `experts` are Parameters, the same objects for all cells of a shape and dtype."""

    cell: Cell
    config: MoEConfig
    spec: ExpertSpec
    experts: ExpertWeights
    tokens: Tensor  # [T, D]
    expert_ids: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    out_grad: Tensor  # [T, O]

    @property
    def counts(self) -> list[int]:
        """Assignments per expert."""
        return self.expert_ids.flatten().bincount(minlength=self.config.n_routed_experts).tolist()

    def parameters(self) -> list[Tensor]:
        return [weight for weight in self.experts if weight is not None]

    def expert_grads(self, expert: int) -> list[Tensor | None]:
        """Gradients of one expert's weights, in the order of `parameters`."""
        return [None if parameter.grad is None else parameter.grad[expert] for parameter in self.parameters()]

    def forget_gradients(self, *, weights_too: bool) -> None:
        self.tokens.grad = self.weights.grad = None
        if weights_too:
            for parameter in self.parameters():
                parameter.grad = None


def make_experts(shape: str, dtype: str, device: str = "cpu") -> ExpertWeights:
    """Random weights of one layer's routed experts, uniform in ±1/sqrt(fan in), biases in ±0.1."""
    c = SHAPES[shape].config()
    assert c.moe_intermediate_size is not None
    n, d, i = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, bound: float) -> nn.Parameter:
        values = torch.empty(size, dtype=getattr(torch, dtype), device=device)
        return nn.Parameter(values.uniform_(-bound, bound, generator=generator))

    rows, columns = ((d, 2 * i), (i, d)) if c.transposed else ((2 * i, d), (d, i))
    up, down = draw(n, *rows, bound=d**-0.5), draw(n, *columns, bound=i**-0.5)
    if not c.expert_bias:
        return ExpertWeights(up, down)
    return ExpertWeights(up, down, draw(n, 2 * i, bound=0.1), draw(n, d, bound=0.1))


def make_problem(cell: Cell, experts: ExpertWeights) -> Problem:
    """Tokens and routing of a cell, on the device of its experts, drawn from a seed that only the cell's shape, tokens
    and routing decide."""
    config, device = SHAPES[cell.shape].config(), experts.up.device
    dtype = getattr(torch, cell.dtype)
    generator = torch.Generator().manual_seed(1 + cell.tokens)
    large = generator if device.type == "cpu" else torch.Generator(device).manual_seed(1 + cell.tokens)
    size = (cell.tokens, config.hidden_size)
    tokens, out_grad = (torch.randn(size, generator=large, device=device).to(dtype) for _ in range(2))
    ids = DRAWS[cell.routing](cell.tokens, config.n_routed_experts, config.num_experts_per_tok, generator)
    weights = torch.rand(ids.shape, generator=generator) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.to(dtype if config.weights_dtype == "model" else torch.promote_types(dtype, torch.float32))
    ids, weights = ids.to(device), weights.to(device)
    if cell.mode != "forward":
        tokens.requires_grad_()
        weights.requires_grad_()
    return Problem(cell, config, ExpertSpec.of(config), experts, tokens, ids, weights, out_grad)
