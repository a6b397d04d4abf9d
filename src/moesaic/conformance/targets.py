"""From what a user names to a gate: a preset, a model or its folder, a config, `module:Class`."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.config import MoEConfig
from moesaic.conformance.building import gate_of_class, ours, router_in
from moesaic.conformance.gates import FunctionGate, Gate, ModuleGate, replace
from moesaic.conformance.verdict import GateRaised, NotApplicable, gate_code, in_one_line, plain_torch
from moesaic.families import ALIASES, PRESETS
from moesaic.hf.load import auto_class, load_moe, quietly
from moesaic.hf.modules import MoELayer, added_rule, moe_layers
from moesaic.hf_config import read_config_json
from moesaic.layer.router import Router
from moesaic.trace.file.reader import is_trace

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
BY_FAMILY = ("scoring_func", "topk_method")  # transformers' routers have these in their code, whatever the config says


@plain_torch()
def as_gate(target: Any, config: MoEConfig | None = None) -> Gate:
    """A gate of whatever was given: a Gate, a Router, a layer or model that holds one, a module, a class, a function.

    ValueError where a config is needed and was not given, where there is no gate in it, or where it cannot be built.
    """
    if isinstance(target, FunctionGate | ModuleGate):
        return target
    if isinstance(target, Router):
        return ModuleGate(target, target.config, rebuild=ours(target.config, type(target)))
    if isinstance(target, nn.Module) and config is None:
        return gate_in(target)
    if not callable(target):
        raise ValueError(f"a {type(target).__name__} is no gate: give a module, a class or a function")
    if config is None:
        raise ValueError("config=None: a class or a function does not say its rule, give config=MoEConfig(...)")
    if isinstance(target, nn.Module):
        return ModuleGate(router_in(target), config)
    if isinstance(target, type):
        return built(target, config)
    return FunctionGate(target, config)


def built(gate_class: type, config: MoEConfig) -> ModuleGate:
    """The gate of a class. ValueError where it is no module's, or raises while it is built."""
    name = gate_class.__qualname__
    if not issubclass(gate_class, nn.Module):
        raise ValueError(f"{name} is no torch.nn.Module: give one, or a function (logits, bias, config)")
    try:
        return gate_of_class(gate_class, config)
    except GateRaised as raised:
        raise ValueError(
            f"{name}: cannot be built ({raised}): it is called with a config, or with arguments named as its fields"
        ) from None


def find(target: str, *, layer: int | None = None, config: str | None = None) -> Gate:
    """The gate that a command line names: PRESET, a model folder, a config.json, or module:Class (which is imported).

    `config` is a preset or a config.json for module:Class. Raises ValueError, in one line, where there is none.
    """
    path = Path(target)
    is_code = ":" in target and not path.exists()
    if layer is not None and (is_code or target in PRESETS):
        raise ValueError(f"--layer {layer} is for a model: {target} is one gate, leave --layer out")
    if is_code:
        return gate_of_code(target, read_config(config or "deepseek-v3"))
    if config is not None:
        raise ValueError(f"--config {config!r} is for module:Class: {target} says its own rule")
    if target in PRESETS:
        return gate_of_preset(target)
    if path.suffix == ".py":
        raise ValueError(f"{target} is a file of code: name the gate in it, as {path.stem}:Gate")
    if not path.exists():
        raise ValueError(
            f"{target}: no such folder, file or preset: give a model folder, a config.json, module:Class, or one of "
            f"{', '.join(PRESETS)}"
        )
    if path.is_file() and b"\0" in first_bytes(path):  # the length that a .safetensors begins with holds zeros
        what = "a record of a run, which moesaic stats judges" if is_trace(path) else "a binary file"
        raise ValueError(f"{target} is {what}: give a model folder, a config.json, module:Class or a preset")
    if path.is_dir() and any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        return gate_in(load_moe(path), layer)
    return gate_in(build(path), layer, random=True)


def first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def gate_of_preset(name: str) -> ModuleGate:
    """Our own router by a released model's rule, its hidden size cut to the number of experts."""
    whole = MoEConfig.preset(name)
    return gate_of_class(Router, MoEConfig.preset(name, hidden_size=whole.n_routed_experts), f"moesaic Router, {name}")


def read_config(source: str) -> MoEConfig:
    """A preset by name, or a config.json, or the folder of one; its hidden size no larger than is needed."""
    try:
        config = MoEConfig.preset(source) if source in PRESETS else MoEConfig.from_hf(source)
    except (TypeError, ValueError) as error:  # TypeError: a config.json with a list where a number should be
        raise ValueError(f"--config {error}") from None
    return replace(config, {"hidden_size": config.n_routed_experts, "moe_intermediate_size": 8, "output_size": None})


def gate_of_code(target: str, config: MoEConfig) -> Gate:
    """`module:Class` or `module:function`, imported from the current folder or the installed packages. Runs that code.

    ValueError where it cannot be imported, or is no gate.
    """
    module_name, _, name = target.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise ValueError(f"{target}: cannot be imported ({in_one_line(error)})") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    return as_gate(found, config)


def gate_in(model: nn.Module, layer: int | None = None, *, random: bool = False) -> ModuleGate:
    """The gate of the MoE layer number `layer` of a model, in forward order; None is the first that can be judged.

    `random` where the model's weights mean nothing. ValueError where there is no MoE layer, or not that many.
    """
    layers = moe_layers(model)
    if layer is not None:
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer={layer} is not there: use 0 to {len(layers) - 1}")
        return gate_of_layer(model, layers[layer], random=random)
    reasons = []
    for one in layers:
        try:
            return gate_of_layer(model, one, random=random)
        except ValueError as error:  # as hash routing in the first layers of DeepSeek-V4
            reasons.append(error)
    raise reasons[0]


def gate_of_layer(model: nn.Module, layer: MoELayer, *, random: bool) -> ModuleGate:
    """The gate of one MoE layer. ValueError where it has none, or one that cannot be asked."""
    name, router, config = layer.name, layer.router, layer.config
    if router is None:
        raise ValueError(f"{name}: nothing beside its experts looks like a router: give the gate and a MoEConfig")
    if isinstance(router, Router):
        return ModuleGate(router, config, name or "gate", ours(config, type(router)))
    if added_rule(router) is not None:  # no settings of the family give a router with an added bias
        return ModuleGate(router, config, f"{type(router).__name__} {name}")
    rebuild = hf_rebuild(type(router), nearest_config(model, name), config)
    if random:
        try:
            router, config = rebuild({}, True)
        except GateRaised as raised:  # too large for this machine
            raise ValueError(f"{name}: a gate of these sizes cannot be built ({raised})") from None
    return ModuleGate(router, config, f"{type(router).__name__} {name}", rebuild)


def nearest_config(model: Any, block: str) -> Any:
    """The Hugging Face config of a block, or of what holds it."""
    parts = block.split(".")
    owners = [model.get_submodule(block), getattr(model.get_submodule(block), "experts", None)]
    owners += [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) - 1, -1, -1)]
    for owner in owners:
        config = getattr(owner, "config", None)
        if config is not None and any(hasattr(config, name) for name in ALIASES["n_routed_experts"]):
            return config
    raise ValueError(f"{type(model).__name__} has no config that names its experts: give the gate and a MoEConfig")


def hf_rebuild(
    router_class: Callable[..., nn.Module], hf_config: Any, config: MoEConfig
) -> Callable[[dict[str, Any], bool], tuple[nn.Module, MoEConfig]]:
    """The router of transformers with other settings, as far as its config has them and its rule reads them."""

    def rebuild(fields: dict[str, Any], checked: bool) -> tuple[nn.Module, MoEConfig]:
        settings = copy.deepcopy(hf_config)
        for field, value in fields.items():
            alias = next((a for a in ALIASES.get(field, (field,)) if hasattr(settings, a)), None)
            if alias is None or field in BY_FAMILY:
                raise NotApplicable(f"it has no setting {field}", f"它没有 {field} 这项设置")
            setattr(settings, alias, value)
        changed = replace(config, fields, checked=checked)
        if checked and fields:
            changed = MoEConfig.from_hf(settings)  # a family may not read a field, or derive others from it
            unread = [field for field, value in fields.items() if getattr(changed, field) != value]
            if unread:
                raise NotApplicable(f"it does not read {unread[0]}", f"它不读取 {unread[0]}")
        with gate_code():
            router = router_class(settings)
        for parameter in router.parameters():  # they come as zeros, or as whatever memory held
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
        return router, changed

    return rebuild


def build(path: Path) -> nn.Module:
    """The model of a config.json on the meta device: no weights, no memory. ValueError where there is no such model."""
    file = path / "config.json" if path.is_dir() else path
    given = read_config_json(path)
    if not given.get("model_type"):
        raise ValueError(f"{file}: names no model_type: give the config.json of a Hugging Face model")
    from transformers import AutoConfig

    with quietly(), torch.device("meta"):
        try:
            kind = given.pop("model_type")
            config = AutoConfig.for_model(kind, **given)
            return auto_class(config).from_config(config)
        except Exception as error:  # transformers raises many kinds
            raise ValueError(f"{file}: no model can be built ({in_one_line(error)})") from None
