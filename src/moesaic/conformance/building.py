"""Gates from classes: built with the settings that a probe wants."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moesaic.config import MoEConfig
from moesaic.conformance.gates import ModuleGate, replace
from moesaic.conformance.verdict import gate_code
from moesaic.families import ALIASES
from moesaic.hf.modules import blocks
from moesaic.layer.router import Router


class SpelledConfig(MoEConfig):
    """A MoEConfig that also answers to the other spellings of its fields, so that any gate class can read it."""

    def __getattr__(self, name: str) -> Any:
        for field, aliases in ALIASES.items():
            if name in aliases:
                return getattr(self, field)
        raise AttributeError(name)


def ours(fields_of: MoEConfig, module_class: Callable[[MoEConfig], Router]) -> Callable[..., Any]:
    """`rebuild` for our own modules, which take the MoEConfig and so always the checked one."""

    def rebuild(fields: dict[str, Any], checked: bool) -> tuple[nn.Module, MoEConfig]:
        del checked
        module = module_class(replace(fields_of, fields))
        return module, module.config  # MoEGate follows the article where it differs

    return rebuild


def gate_of_class(module_class: type[nn.Module], config: MoEConfig, name: str = "") -> ModuleGate:
    """A gate from its class: built from a config object, or from keyword arguments with the names of its fields."""
    if issubclass(module_class, Router):
        with gate_code():
            router = module_class(config)
        return ModuleGate(router, router.config, name, ours(config, module_class))
    spelled = SpelledConfig(**config.to_dict())

    def rebuild(fields: dict[str, Any], checked: bool) -> tuple[nn.Module, MoEConfig]:
        settings = replace(spelled, fields, checked=checked)
        with torch.random.fork_rng(devices=[]):  # the same gate every time, and the caller's numbers left alone
            torch.manual_seed(0)
            return router_in(construct(module_class, settings)), settings

    module, settings = rebuild({}, True)
    return ModuleGate(module, settings, name or module_class.__name__, rebuild)


def router_in(module: nn.Module) -> nn.Module:
    """The router of a layer that holds experts beside it, or the module itself."""
    return next((router for _, _, router, _ in blocks(module) if router is not None), module)


def construct(module_class: Callable[..., nn.Module], settings: MoEConfig) -> nn.Module:
    """`Class(config)`, or `Class(hidden_size=..., n_group=..., ...)` where every needed argument is a field."""
    with gate_code():  # "no signature found", as of builtins
        parameters = inspect.signature(module_class).parameters.values()
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    known = {**settings.to_dict(), **{a: getattr(settings, f) for f, names in ALIASES.items() for a in names}}
    with gate_code():
        if set(needed) <= known.keys() and needed:
            return module_class(**{p.name: known[p.name] for p in parameters if p.name in known})
        return module_class(settings)
