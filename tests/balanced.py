"""Models with a balancing loss, and the gradient that they should have: of an explicit sum, made of plain hooks."""

import torch
from hf_models import tiny

from moesaic.hf.attach import attach
from moesaic.hf.modules import moe_layers
from moesaic.hf.outputs import read_router
from moesaic.layer.balance import expert_load
from moesaic.layer.losses import LOSSES
from moesaic.train.balance_loss import BalanceLoss
from moesaic.types import Routing

ALPHA = 0.3
OPTIONS = {"device": {"n_devices": 4}, "communication": {"n_devices": 4, "max_devices": 2}}


def model_of(family="mixtral", **fields):
    torch.manual_seed(0)
    model = tiny(family, **fields).double().train()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def unbroken(*args, **fields):
    """Such a model on our engine: transformers' eager experts break the graph of a whole model in every layer."""
    return attach(model_of(*args, **fields))


def batch_of(rows=4, length=8, *, padded=True):
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[rows - 1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def checkpointed(model, *, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def attached(kind, model, **options):
    return BalanceLoss(kind, ALPHA, **OPTIONS.get(kind, {}), **options).attach(model)


def gradients(model, run):
    """What `run` leaves in the model's parameters."""
    model.zero_grad()
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def explicit(model, batch, kind):
    """The output and `loss + ALPHA * sum(losses)`, made of what plain hooks see."""
    seen = {}

    def see(layer):
        def hook(router, _args, output):
            found = read_router(router, output)
            seen[layer.name] = layer, Routing(found.logits.flatten(0, -2), found.weights, found.ids.flatten(0, -2))

        return layer.router.register_forward_hook(hook)

    handles = [see(layer) for layer in moe_layers(model)]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    mask, length = batch["attention_mask"].bool().flatten(), batch["input_ids"].shape[1]
    total = 0.0
    for layer, routing in seen.values():
        own = {
            "sequence": {"sequences": torch.arange(len(mask)) // length},
            "global_batch": {"load": expert_load(routing.expert_ids[mask], layer.config.n_routed_experts)},
        }.get(kind, {})
        total = total + LOSSES[kind](routing, layer.config, mask=mask, **own, **OPTIONS.get(kind, {}))
    return output, output.loss + ALPHA * total


def assert_same(one, other, *, factor=1.0):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.equal(gradient * factor, other[name]), name


def hooked(model):
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks or any("_moesaic" in key for key in vars(module))
    ]
