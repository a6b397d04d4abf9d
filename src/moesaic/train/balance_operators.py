"""How the gradient of a loss that nobody adds reaches the routers: operators, and the hooks that call them.

A router's weights pass through `moesaic::balance_inject`, whose backward gives them their gradient unchanged and the
router's own loss a gradient of alpha times the scale of this backward. That scale, a GradScaler's or that of
accumulation, is the gradient which the model's loss gets: it passes through `moesaic::balance_note`, whose backward
runs before that of the routers. Operators, so that a compiled graph holds them and what they ask for at run time. The
hooks may be traced into it: they look at shapes and settings, and leave the rest to operators.

A copy of a balanced model has copies of its hooks and keys, and nobody hears of it: eager hooks find that out first. A
graph may be that of the original, so there the operators do; its calls and losses have the number UNHEARD.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.engine.tracing import is_traced
from moesaic.hf.modules import added_rule, parameters_of
from moesaic.hf.outputs import read_router
from moesaic.layer.losses import LOSSES
from moesaic.train.injection import is_heard, ledger_of
from moesaic.types import Routing

UNHEARD = -1
REPLICA = (
    "it runs in a replica of nn.DataParallel, where padding, sequences and the scale of the backward are not known: "
    "start one process a device (torchrun), so that DistributedDataParallel is used"
)

# The operators. What each copies is what goes on, so that no graph drops them; gradients pass through the copies.
for schema in (
    "balance_count(Tensor key, Tensor ids, Tensor weights, int n_experts) -> Tensor",
    "balance_tokens(Tensor key, Tensor ids, int n_experts) -> (Tensor, Tensor, Tensor)",
    "balance_inject(Tensor key, Tensor weights, Tensor loss) -> (Tensor, Tensor)",
    "balance_scale(Tensor key, Tensor call, Tensor after, ScalarType dtype) -> Tensor",
    "balance_note(Tensor key, Tensor loss, Tensor? share, bool by_hand) -> (Tensor, Tensor)",
    "balance_noted(Tensor key, Tensor note, Tensor grad) -> Tensor",
):
    name, arguments = schema.split("(", 1)
    torch.library.define(f"moesaic::{name}", f"({arguments}", tags=(torch.Tag.cudagraph_unsafe,))


def _count(key: Tensor, ids: Tensor, weights: Tensor, n_experts: int) -> Tensor:
    if is_heard(key):
        ledger, name = ledger_of(key)
        ledger.count(name, ids, n_experts)
    return weights.clone()


def _tokens(key: Tensor, ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if not is_heard(key):
        mask, sequences, load = _tokens_fake(key, ids, n_experts)
        return mask.zero_(), sequences.zero_(), load.zero_()
    ledger, name = ledger_of(key)
    return ledger.describe(name, ids, n_experts)


def _tokens_fake(_key: Tensor, ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens = ids.shape[0]
    load = ids.new_empty(n_experts, dtype=torch.float64)
    return ids.new_empty(n_tokens, dtype=torch.bool), ids.new_empty(n_tokens, dtype=torch.int64), load


def _inject(key: Tensor, weights: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    number = UNHEARD
    if is_heard(key):
        ledger, name = ledger_of(key)
        number = ledger.value(name, loss)
    return weights.clone(), torch.tensor(number, device="cpu")


def _scale(key: Tensor, call: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    if int(call) == UNHEARD:
        return after.new_zeros((), dtype=dtype)
    return ledger_of(key)[0].scale(int(call)).to(after.device, dtype)


def _note(key: Tensor, loss: Tensor, share: Tensor | None, by_hand: bool) -> tuple[Tensor, Tensor]:
    number = ledger_of(key)[0].note(share, by_hand) if is_heard(key) else UNHEARD
    return loss.clone(), torch.tensor(number, device="cpu")


def _noted(key: Tensor, note: Tensor, grad: Tensor) -> Tensor:
    if int(note) != UNHEARD:
        ledger_of(key)[0].noted(int(note), grad)
    return grad.clone()


def _copy_and_number(_key: Tensor, used: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(used), torch.empty((), dtype=torch.int64, device="cpu")


IMPLEMENTATIONS = {
    "balance_count": (_count, lambda _key, _ids, weights, _n_experts: torch.empty_like(weights)),
    "balance_tokens": (_tokens, _tokens_fake),
    "balance_inject": (_inject, _copy_and_number),
    "balance_scale": (_scale, lambda _key, _call, after, dtype: after.new_empty((), dtype=dtype)),
    "balance_note": (_note, _copy_and_number),
    "balance_noted": (_noted, lambda _key, _note, grad: torch.empty_like(grad)),
}
for name, (implementation, fake) in IMPLEMENTATIONS.items():
    # what a ledger does is for no graph: frames of an eager call between two graphs would be traced too
    torch.library.impl(f"moesaic::{name}", "CompositeExplicitAutograd")(torch.compiler.disable(implementation))
    torch.library.register_fake(f"moesaic::{name}")(fake)


def _keep_number(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.key, ctx.dtype = inputs[0], inputs[2].dtype if isinstance(inputs[2], Tensor) else None
    ctx.save_for_backward(output[1])


def _inject_backward(ctx: Any, grad: Tensor, _number: None) -> tuple[None, Tensor, Tensor]:
    (call,) = ctx.saved_tensors
    return None, grad, torch.ops.moesaic.balance_scale(ctx.key, call, grad, ctx.dtype)


def _note_backward(ctx: Any, grad: Tensor, _number: None) -> tuple[None, Tensor, None, None]:
    (note,) = ctx.saved_tensors
    return None, torch.ops.moesaic.balance_noted(ctx.key, note, grad), None, None


torch.library.register_autograd("moesaic::balance_inject", _inject_backward, setup_context=_keep_number)
torch.library.register_autograd("moesaic::balance_note", _note_backward, setup_context=_keep_number)


def _key_of(module: nn.Module, attribute: str) -> Tensor | None:
    """The key of a balanced module; None where it is balanced no longer, or, in eager mode, a copy of one that is."""
    key = getattr(module, attribute, None)
    return key if key is None or is_traced() or is_heard(key) else None


def after_router(
    router: nn.Module,
    _args: tuple,
    output: Any,
    *,
    attribute: str,
    kind: str,
    config: MoEConfig,
    options: dict[str, int],
    biased: bool,
) -> Any:
    """The router's output with weights through which the gradient of its loss comes."""
    key = _key_of(router, attribute)
    if key is None or not router.training:
        return None
    if getattr(router, "_is_replica", False):
        raise ValueError(f"{ledger_of(key)[1]}: {REPLICA}")
    if (added_rule(router) is not None) != biased:
        name = ledger_of(key)[1]
        raise ValueError(f"{name}: a bias was added after BalanceLoss was attached: attach it after the bias")
    found, n_experts = read_router(router, output), config.n_routed_experts
    if found.logits is None or found.place is None or found.logits.shape[-1] != n_experts:
        name = ledger_of(key)[1]
        raise ValueError(
            f"{name}: {type(router).__name__} does not return its logits, ids and weights: use its own loss"
        )
    ids = found.ids.flatten(0, -2)
    if not torch.is_grad_enabled():
        return found.put(output, weights=torch.ops.moesaic.balance_count(key, ids, found.weights, n_experts))
    if not found.logits.requires_grad:
        return None
    routing = Routing(found.logits.flatten(0, -2), found.weights.flatten(0, -2), ids)
    mask, sequences, load = torch.ops.moesaic.balance_tokens(key, ids, n_experts)
    asked = {"sequence": {"sequences": sequences}, "global_batch": {"load": load}}.get(kind, {})
    loss = LOSSES[kind](routing, config, mask=mask, **asked, **options)
    weights, _ = torch.ops.moesaic.balance_inject(key, found.weights, loss)
    return found.put(output, weights=weights)


def after_model(model: nn.Module, args: tuple, kwargs: dict, output: Any, *, attribute: str, summed: bool) -> Any:
    """The model's output with a loss that notes its gradient.

    summed: the loss is not the output's but a sum of its `log_probs`, over which that gradient is then spread.
    """
    key = _key_of(model, attribute)
    if key is None or not (model.training and torch.is_grad_enabled()):
        return None
    if summed and isinstance(log_probs := getattr(output, "log_probs", None), Tensor):
        noted, _ = torch.ops.moesaic.balance_note(key, log_probs, torch.tensor(-1.0, device="cpu"), False)
        output.log_probs = noted.masked_fill(~output.label_mask, 0.0)  # zeros as before, whose gradients do not count
        return output
    if isinstance(output, tuple):
        loss = output[0] if output else None
    else:
        loss = output.get("loss") if type(output) is dict else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        return None
    noted, _ = torch.ops.moesaic.balance_note(key, loss, _share(model, args, kwargs), False)
    if isinstance(output, tuple):
        return (noted, *output[1:])
    if type(output) is dict:
        return {**output, "loss": noted}
    output.loss = noted
    return output


def _share(model: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """Which part of the whole batch a loss is that was divided by `num_items_in_batch`, as under transformers' Trainer.

    None where it is the mean of a micro-batch, which the loop then divides by their number.
    """
    n_items = kwargs.get("num_items_in_batch")
    if n_items is None:
        return None
    given = {**dict(zip(parameters_of(model), args, strict=False)), **kwargs}
    labels = given.get("shift_labels")
    if labels is None:
        labels = given.get("labels")
        if labels is not None and _shifts_labels(model):
            labels = labels[..., 1:]
    if labels is None:
        raise ValueError(
            "the model was called with num_items_in_batch and without labels, so its part of the batch is not known: "
            "write `loss = balance_loss(loss, share=...)`"
        )
    return (labels != -100).sum().double() / n_items


def _shifts_labels(model: nn.Module) -> bool:
    """Whether a model's loss leaves out the first label of each row, as that of causal language models does.

    As the Trainer's own `_loss_shifts_labels`: a decoder beside an encoder gets tokens that are shifted already.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
