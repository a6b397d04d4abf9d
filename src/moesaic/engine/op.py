"""The experts as one opaque operator, `moesaic::experts`: what torch.compile, export, autograd and checkpointing see.

Every output has a shape that follows from the inputs' shapes, so a graph holds it whole in every dtype. A device's
kernels are put in with `register_kernels`; this file knows none of them.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.engine.accumulation import accumulation_targets, collected
from moesaic.engine.checks import autocasts, check_dtypes, check_inputs
from moesaic.engine.grouped import grouped
from moesaic.engine.reference import reference
from moesaic.engine.spec import ExpertSpec
from moesaic.engine.surroundings import is_batched, is_differentiated, is_watched, refuse_subclasses, refuse_vmap
from moesaic.engine.tracing import is_traced
from moesaic.types import ExpertWeights

Keep = Literal["nothing", "order", "hidden"]  # what forward leaves for a backward; order = assignments and counts


class Gradients(NamedTuple):
    """One entry for each differentiable input: as `backward` argument what is wanted of it, as its result the gradient,
    None where it was not wanted or went straight into a gradient that existed."""

    tokens: Any
    weights: Any
    up: Any
    down: Any
    up_bias: Any
    down_bias: Any


# torch keeps compiled graphs on disk and knows these operators by name alone: once released, a schema that changes
# takes a new name
_EXPERTS = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
_SPEC = (
    "str activation, bool gated, float? limit, float alpha, float up_offset, float? gate_softcap, float? up_softcap,"
    " bool interleaved, bool transposed"
)
torch.library.define(
    "moesaic::experts",
    f"(Tensor tokens, Tensor expert_ids, Tensor weights, {_EXPERTS}, {_SPEC}, str keep, bool batch_invariant)"
    " -> (Tensor out, Tensor hidden, Tensor assignments, Tensor counts)",
)
torch.library.define(
    "moesaic::experts_backward",
    f"(Tensor grad_out, Tensor tokens, Tensor weights, {_EXPERTS}, Tensor hidden, Tensor assignments, Tensor counts,"
    f" {_SPEC}, bool batch_invariant, bool[] wanted) -> Tensor[]",
)


def run_experts(
    tokens: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    spec: ExpertSpec,
    *,
    batch_invariant: bool = False,
    recompute: bool = False,
) -> Tensor:
    """Check the inputs and call the operator, or the kernel itself where nobody sees a difference: [T, O] in the
    tokens' dtype.

    `recompute` keeps the tokens alone for the backward, which then computes the up projection again (22 matmul
    units a step instead of 18). Under autocast the matmuls take its dtype; the weights are never copied whole.
    """
    check_inputs(tokens, expert_ids, weights, experts, spec)
    check_dtypes(tokens, experts)
    dtype, device_type = tokens.dtype, tokens.device.type
    if autocasts(tokens):
        tokens = tokens.to(torch.get_autocast_dtype(device_type))
    # rows are gathered, so a column-major x would be copied row by row; and inductor lays its gradient out as x
    tokens, weights = tokens.contiguous(), weights.contiguous()
    if is_differentiated():
        plain = reference if batch_invariant else grouped
        return plain(tokens, expert_ids, weights, experts, spec).to(dtype)
    needs_hidden = _trains(tokens, weights, experts.up, experts.down, experts.up_bias)
    needs_grad = needs_hidden or _trains(experts.down_bias)
    if not needs_grad and device_type in FORWARD and not is_watched(tokens, expert_ids, weights, *experts):
        given = (tokens, expert_ids, weights, experts, spec)
        return FORWARD[device_type](*given, keep="nothing", batch_invariant=batch_invariant)[0]
    # a program is for inference; trained, it runs twice
    if not needs_grad or (torch.compiler.is_exporting() and is_traced()):
        keep = "nothing"
    else:
        keep = "hidden" if needs_hidden and not recompute else "order"
    try:
        out, *_ = torch.ops.moesaic.experts(tokens, expert_ids, weights, *experts, *spec.fields, keep, batch_invariant)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        refuse_subclasses(error, tokens=tokens, expert_ids=expert_ids, weights=weights, **experts._asdict())
        raise
    return out.to(dtype)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _fake_experts(tokens: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> Any:
    del weights
    up, down, _up_bias, _down_bias, *fields, keep, _batch_invariant = rest
    spec, experts = ExpertSpec(*fields), ExpertWeights(up, down)
    n_assignments = expert_ids.numel()
    return (
        tokens.new_empty(tokens.shape[0], spec.output_size(experts)),
        tokens.new_empty((n_assignments, spec.up_size(experts)) if keep == "hidden" else 0),
        expert_ids.new_empty(n_assignments, dtype=torch.int64),
        expert_ids.new_empty(up.shape[0], dtype=torch.int64),
    )


def _fake_backward(grad_out: Tensor, tokens: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    del grad_out
    up, down, up_bias, down_bias, *_, wanted = rest
    inputs = (tokens, weights, up, down, up_bias, down_bias)
    keeps_layout = (False, False, True, True, False, False)
    return [
        tokens.new_empty(0) if not want else torch.empty_like(t) if keeps else t.new_empty(t.shape)
        for t, want, keeps in zip(inputs, wanted, keeps_layout, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tokens, expert_ids, weights, up, down, up_bias, down_bias, *fields, keep, batch_invariant = inputs
    _out, hidden, assignments, counts = output
    ctx.spec, ctx.keep, ctx.batch_invariant = ExpertSpec(*fields), keep, batch_invariant
    ctx.save_for_backward(tokens, expert_ids, weights, up, down, up_bias, down_bias, hidden, assignments, counts)
    ctx.mark_non_differentiable(hidden, assignments, counts)
    ctx.set_materialize_grads(False)  # or zeros as large as `hidden` would come along


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple:
    *given, hidden, assignments, counts = ctx.saved_tensors
    tokens, expert_ids, weights, up, down, up_bias, down_bias = given
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    inputs = (tokens, weights, up, down, up_bias, down_bias)
    of_tokens, _of_ids, *others = collected(ctx, given)
    wanted = [of_tokens, *others]
    create_graph = torch.is_grad_enabled()
    if create_graph or is_batched(grad_out):
        grads = _plain_backward(grad_out, expert_ids, inputs, wanted, ctx.spec, create_graph=create_graph)
    else:
        if ctx.keep == "nothing":  # in a graph that was made for inference: what forward left means nothing
            rules = (*ctx.spec.fields, "hidden", ctx.batch_invariant)
            _, hidden, assignments, counts = torch.ops.moesaic.experts(*given, *rules)
        args = (grad_out, *inputs, hidden, assignments, counts)
        rules = (*ctx.spec.fields, ctx.batch_invariant)
        can_add = grad_out.device.type in ACCUMULATING
        into = accumulation_targets(ctx, given, grad_out, slice(3, 5)) if can_add else (None, None)
        if into == (None, None):
            returned = torch.ops.moesaic.experts_backward(*args, *rules, wanted)
        else:
            torch.autograd.graph.increment_version([target for target in into if target is not None])
            with _ADDING:
                returned = ACCUMULATING[grad_out.device.type](*args, *rules, wanted, into)
            wanted = [w and target is None for w, target in zip(wanted, (None, None, *into, None, None), strict=True)]
        grads = [g if want else None for g, want in zip(returned, wanted, strict=True)]
    return (grads[0], None, *grads[1:], *[None] * (len(ctx.needs_input_grad) - 7))


@torch.enable_grad()
def _plain_backward(
    grad_out: Tensor, expert_ids: Tensor, inputs: tuple, wanted: list[bool], spec: ExpertSpec, *, create_graph: bool
) -> list[Tensor | None]:
    """By plain torch operations: gradients that can have gradients themselves, or come in batches."""
    # as views, or what one input owes to another (routing weights come from the tokens) would be counted here already
    views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    tokens, weights = views[:2]
    matrices: list[Any] = [None if w is None else w.to(tokens.dtype) for w in views[2:]]  # they differ under autocast
    experts = ExpertWeights(*matrices)
    with torch.autocast(tokens.device.type, enabled=False):
        out = grouped(tokens, expert_ids, weights, experts, spec)
    wanted = [want and t.requires_grad for t, want in zip(views, wanted, strict=True)]  # less what was frozen since
    if not any(wanted):
        return [None] * len(wanted)
    chosen = [t for t, want in zip(views, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(out, chosen, grad_out, create_graph=create_graph, allow_unused=True))
    return [next(grads) if want else None for want in wanted]


class Kernels(NamedTuple):
    """A device's functions: the forward of plain inference, and as the operator takes them its forward, its backward,
    and the backward that can add."""

    forward: Callable[..., Any]
    experts: Callable[..., Any]
    experts_backward: Callable[..., list[Tensor]]
    accumulating: Callable[..., Gradients]


def kernels(forward: Callable[..., Any], backward: Callable[..., Gradients]) -> Kernels:
    """Wrap

    forward(tokens, expert_ids, weights, experts, spec, *, keep, batch_invariant) -> (out, hidden, assignments, counts),
    backward(grad_out, tokens, weights, experts, hidden, assignments, counts, spec, wanted, up_into=None,
    down_into=None, *, batch_invariant) -> Gradients; with `..._into` a matrix's gradient is added to that tensor.
    """
    forward, backward = below_autograd(forward), below_autograd(backward)

    def experts(tokens: Tensor, expert_ids: Tensor, weights: Tensor, *rest: Any) -> Any:
        up, down, up_bias, down_bias, *fields, keep, batch_invariant = rest
        matrices, spec = ExpertWeights(up, down, up_bias, down_bias), ExpertSpec(*fields)
        return forward(tokens, expert_ids, weights, matrices, spec, keep=keep, batch_invariant=batch_invariant)

    def accumulating(grad_out: Tensor, tokens: Tensor, weights: Tensor, *rest: Any) -> Gradients:
        up, down, up_bias, down_bias, hidden, assignments, counts, *fields, batch_invariant, wanted, into = rest
        matrices, spec = ExpertWeights(up, down, up_bias, down_bias), ExpertSpec(*fields)
        args = (grad_out, tokens, weights, matrices, hidden, assignments, counts, spec, Gradients(*wanted), *into)
        return backward(*args, batch_invariant=batch_invariant)

    def experts_backward(grad_out: Tensor, tokens: Tensor, *rest: Any) -> list[Tensor]:
        returned = accumulating(grad_out, tokens, *rest, (None, None))
        return [tokens.new_empty(0) if grad is None else grad for grad in returned]

    return Kernels(forward, experts, experts_backward, accumulating)


def register_kernels(device_type: str, forward: Callable[..., Any], backward: Callable[..., Gradients]) -> None:
    """Compute the operator on this device by `forward` and `backward`; see `kernels`."""
    made = kernels(forward, backward)
    torch.library.impl("moesaic::experts", device_type)(made.experts)
    torch.library.impl("moesaic::experts_backward", device_type)(made.experts_backward)
    FORWARD[device_type], ACCUMULATING[device_type] = made.forward, made.accumulating


def below_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` as torch runs its own: nobody keeps book of views and versions inside it.

    On the CPU that is 3 to 6 % of a decoded token, 1 to 4 % of up to 128, 4 to 6 % of a training step (qwen3-30b and
    dsv3-quarter, both dtypes). What a kernel writes in place and did not make needs `increment_version`, and what it
    returns must not share memory with what it was given.
    """

    @wraps(kernel)
    def run(*args: Any, **options: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return kernel(*args, **options)

    return run


# Two backwards in two threads may share weights. Beside an addition of autograd's own, which has another lock, this is
# as unsafe as torch says that sharing them is.
_ADDING = threading.Lock()
FORWARD: dict[str, Callable[..., Any]] = {}  # device type -> the forward of its `Kernels`
ACCUMULATING: dict[str, Any] = {}  # device type -> backward kernel that can add into gradients that exist


torch.library.register_fake("moesaic::experts", _fake_experts)
torch.library.register_fake("moesaic::experts_backward", _fake_backward)
torch.library.register_autograd("moesaic::experts", _backward, setup_context=_setup_context)
for _name in ("moesaic::experts", "moesaic::experts_backward"):
    torch.library.register_vmap(_name, refuse_vmap)
