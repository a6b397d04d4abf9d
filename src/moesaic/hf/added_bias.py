"""A selection bias for routers that have none: their picks are made again with it, their weights stay unbiased.

It is a buffer `e_score_correction_bias`, [E], float32, of the router, so a checkpoint has it. transformers does not
know it and leaves it out when it loads such a checkpoint; `moesaic_added_bias` in config.json says that it is there.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.config import MoEConfig
from moesaic.hf.modules import RULE, MoELayer, added_rule, moe_layers
from moesaic.hf.outputs import RouterOutput, read_router
from moesaic.layer.router import Router
from moesaic.rules import route
from moesaic.types import Routing

BIAS = "e_score_correction_bias"
FLAG = "moesaic_added_bias"  # in config.json
TRIED = 64  # tokens on which the rule is proven
SAME = 1e-2  # of the largest weight: routers in bfloat16 round theirs


class AddedBias(NamedTuple):
    """A bias [E] for the router of a layer, and the rule by which it then selects, proven on it."""

    layer: str
    router: nn.Module
    rule: MoEConfig
    bias: Tensor


def add_bias(model: nn.Module) -> list[str]:
    """Give every router that has no selection bias one of zeros; returns the names of those layers.

    The picks are then those of the biased scores, by the family's own rule, and the weights those of the unbiased ones.
    Before anything is changed each router is asked about random tokens, and its answer has to be what its rule gives.

    Raises ValueError, and changes nothing, for a layer whose rule is not known (sparsemixer, Switch's capacity), whose
    router returns what its rule does not give, or that has no router of its own. A bias that was saved with the model
    and not loaded is refused too: `ms.attach(model)` brings it back.
    """
    check_not_lost(model)
    return add_saved(model, [_added(layer) for layer in _without_bias(model)])


def restore_bias(model: nn.Module) -> list[str]:
    """Add the biases that were saved with a model, as `saved_biases` finds them; returns the names of their layers."""
    return add_saved(model, saved_biases(model))


def saved_biases(model: nn.Module) -> list[AddedBias]:
    """The biases that were saved with a model and not loaded, one for each router without; none where config.json says
    of none or they are there already.

    The checkpoint is the folder that the model was loaded from, or what the hub's cache has under its name. Raises
    ValueError where that cannot be read or lacks one of the biases, or where `add_bias` would refuse.
    """
    if not lost(model):
        return []
    folder = _folder_of(model)
    saved = _saved(folder)
    return [_added(layer, _saved_bias(layer, model, saved, folder)) for layer in _without_bias(model)]


def add_saved(model: nn.Module, biases: list[AddedBias]) -> list[str]:
    """Add what `saved_biases` found; returns the names of the layers."""
    if biases:
        torch.compiler.reset()  # guards of graphs that were compiled before do not notice hooks that come after
    for added in biases:
        _give(added)
    config = getattr(model, "config", None)
    if biases and hasattr(config, "model_type"):  # transformers'; our own layers load strictly and need no flag
        setattr(config, FLAG, True)
    return [added.layer for added in biases]


def lost(model: nn.Module) -> bool:
    """Whether the config says that biases were added and some router has none."""
    flagged = bool(getattr(getattr(model, "config", None), FLAG, False))
    return flagged and bool(_without_bias(model))


def check_not_lost(model: nn.Module) -> None:
    if lost(model):
        raise ValueError(
            f"{type(model).__name__} was saved with biases that moesaic had added, and was loaded without them: call "
            "ms.attach(model), which reads them from its checkpoint, or for a new model of that config set "
            f"model.config.{FLAG} = False"
        )


def _without_bias(model: nn.Module) -> list[MoELayer]:
    return [layer for layer in moe_layers(model) if not layer.has_bias]


def _added(layer: MoELayer, bias: Tensor | None = None) -> AddedBias:
    """What `add_saved` is to do to a layer; the bias is one of zeros unless given. ValueError as of `add_bias`."""
    if layer.router is None:
        raise ValueError(
            f"{layer.name}: no router of its own returns the picks, so no bias can be added: use a balancing loss"
        )
    rule = _biased_rule(layer.name, layer.router, layer.config)
    zeros = torch.zeros(rule.n_routed_experts, device=next(layer.router.parameters()).device, dtype=torch.float32)
    if bias is not None and bias.shape != zeros.shape:
        raise ValueError(
            f"{layer.name}: its saved bias has shape {tuple(bias.shape)} and it has {len(zeros)} experts: give the "
            "checkpoint of this model"
        )
    return AddedBias(layer.name, layer.router, rule, zeros if bias is None else zeros.copy_(bias))


def _biased_rule(name: str, router: nn.Module, config: MoEConfig) -> MoEConfig:
    """The rule of a layer with a selection bias in it, proven on its router."""
    if not config.rule_is_known:
        raise ValueError(
            f"{name}: how {type(router).__name__} selects is not known here, so no bias can be added: use a balancing "
            "loss"
        )
    rule = replace(config, topk_method="noaux_tc", group_score=config.group_score_rule)
    if not config.limits_groups:  # a greedy rule with groups in its config that it does not use
        rule = replace(rule, n_group=1, topk_group=1)
    if isinstance(router, Router):
        return rule
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in router.parameters()):  # FSDP2, DeepSpeed's ZeRO-3
        raise ValueError(
            f"{name}: {type(router).__name__} is sharded, so its rule cannot be proven: add the bias before "
            "fully_shard or ZeRO-3"
        )
    weight = next((p for p in router.parameters() if p.dim() == 2), None)
    if weight is None or weight.is_meta:
        raise ValueError(f"{name}: {type(router).__name__} has no weights yet to prove its rule with: load them first")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(TRIED, weight.shape[-1], generator=generator, device="cpu", dtype=torch.float32).to(weight)
    training = router.training
    router.eval()
    try:
        with torch.no_grad():
            found = read_router(router, router(tokens))
            wanted = _routed(found, None, rule)
    except Exception as error:  # what a router of another make raises is not known
        raise ValueError(
            f"{name}: {type(router).__name__} cannot be asked by itself ({error}): use a balancing loss"
        ) from None
    finally:
        router.train(training)
    same = wanted is not None and _agrees(found, wanted, config.n_routed_experts)
    if not same:
        raise ValueError(
            f"{name}: {type(router).__name__} does not select as the rule of its family says, so no bias can be added: "
            "use a balancing loss"
        )
    return rule


def _give(added: AddedBias) -> None:
    router = added.router
    router.register_buffer(BIAS, added.bias)
    if isinstance(router, Router):
        router.config = added.rule
        return
    router.__dict__[RULE] = added.rule
    router.register_forward_hook(_select_again)


def _select_again(router: nn.Module, _args: tuple, output: Any) -> Any:
    """The router's output with picks by biased scores and their unbiased weights in the places of its own."""
    found = read_router(router, output)
    rule = added_rule(router)
    assert rule is not None  # this hook came with it
    routing = _routed(found, router.get_buffer(BIAS), rule)
    assert routing is not None  # proven when the bias was added
    ids = routing.expert_ids.to(found.ids.dtype).view(found.ids.shape)
    weights = routing.weights.to(found.weights.dtype).view(found.weights.shape)
    return found.put(output, ids=ids, weights=weights)


def _routed(found: RouterOutput, bias: Tensor | None, rule: MoEConfig) -> Routing | None:
    if found.logits is None or found.place is None or found.logits.shape[-1] != rule.n_routed_experts:
        return None
    return route(found.logits.flatten(0, -2), bias, rule)


def _agrees(found: RouterOutput, wanted: Routing, n_experts: int) -> bool:
    """Whether the weights, laid out by expert, are the same; a token whose picks tie may differ, one in a hundred."""
    shape = (len(wanted.expert_ids), n_experts)
    theirs, ours = (
        weights.new_zeros(shape, dtype=torch.float32).scatter(1, ids.long(), weights.float())
        for ids, weights in (
            (found.ids.flatten(0, -2), found.weights.flatten(0, -2)),
            (wanted.expert_ids, wanted.weights),
        )
    )
    differs = (theirs - ours).abs().amax(1) > SAME * theirs.amax(1)
    return float(differs.float().mean()) <= 0.02


def _folder_of(model: nn.Module) -> Path:
    """Where a model was loaded from: its folder, or the one of the hub's cache."""
    name = getattr(model, "name_or_path", "")
    if name and not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        with suppress(OSError, ValueError):  # not in the cache, or no name at all
            commit = getattr(getattr(model, "config", None), "_commit_hash", None)
            return Path(snapshot_download(name, revision=commit, local_files_only=True))
    return Path(name or ".")


def _saved(folder: Path) -> dict[str, Tensor]:
    """The biases in the safetensors files of a folder, by name."""
    from safetensors import safe_open

    files: Iterable[Path] = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(BIAS)}  # noqa: SIM118
    if not found:
        raise ValueError(
            f"{folder}: no checkpoint with {BIAS}, which config.json says was added to this model: load it from the "
            "folder it was saved in"
        )
    return found


def _saved_bias(layer: MoELayer, model: nn.Module, saved: Mapping[str, Tensor], folder: Path) -> Tensor:
    """The bias of a layer by its name, which may be shorter or longer in the checkpoint than in this model."""
    path = next(name for name, module in model.named_modules() if module is layer.router)
    name = f".{path}.{BIAS}"
    bias = next((bias for key, bias in saved.items() if f".{key}".endswith(name) or name.endswith(f".{key}")), None)
    if bias is None:
        raise ValueError(f"{folder}: no {name[1:]} in the checkpoint, though config.json says that one was added")
    return bias.float()
