"""Where the MoE layers of a model are: Hugging Face 5.x models, our own layers, and bare gates, found by one rule."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.config import MoEConfig
from moesaic.families import ALIASES
from moesaic.hf.bias_home import BiasHome, bias_home
from moesaic.hf.experts import is_on_seam
from moesaic.hf.spread import check_told
from moesaic.hf_config import text_part
from moesaic.layer.experts import Experts
from moesaic.layer.router import Router

ROUTER_NAMES = ("gate", "router")  # what families call the router beside their `experts`
ROUTER_CLASSES = ("Router", "Gate", "Gating")  # how its class name ends where it is called something else
# attributes in which wrappers keep what they wrap: torch.compile, PEFT, DDP, checkpoint_wrapper
WRAPPED = ("_orig_mod", "base_layer", "module", "_checkpoint_wrapped_module")
ADAPTED = "base_model.model."  # with which PEFT begins the names of a model
RULE = "_moesaic_biased_rule"  # on a router that was given a selection bias: how it selects now


class MoELayer(NamedTuple):
    """One MoE layer inside a model.

    name: path of the block in the model ("" where the model itself is the block).
    router: returns (logits, weights, expert_ids); None where nothing in the block looks like one.
    experts: takes (tokens, expert_ids, weights); None for a bare gate.  block: what holds both, None for a bare gate.
    origin: where its picks can be taken, "experts" or, where the experts are not told their ids, "router".
    """

    name: str
    router: nn.Module | None
    experts: nn.Module | None
    config: MoEConfig
    block: nn.Module | None = None
    origin: str = "experts"

    @property
    def home(self) -> BiasHome | None:
        """Where its selection bias is kept, if it has one."""
        return None if self.router is None else bias_home(self.router, self.block)

    @property
    def has_bias(self) -> bool:
        return self.home is not None

    @property
    def bias(self) -> torch.Tensor | None:
        """The selection bias as `BiasHome.whole` gives it, where there is one."""
        return None if (home := self.home) is None else home.whole


def moe_layers(model: nn.Module, config: MoEConfig | None = None) -> list[MoELayer]:
    """The MoE layers of `model` in forward order.

    A bare Router is a layer without experts. `config` stands in for what the model's own says; without it a layer
    whose rule is not known gets a config of its sizes alone, topk_method="unknown". Raises ValueError, with the
    reason, where `model` is no module, has no layer whose picks can be seen, two routers that share their experts, or
    experts that are spread over ranks by a transformers that tells each rank only of its own.
    """
    check_model(model)
    bare = unwrapped(model)
    if isinstance(bare, Router):
        return [MoELayer("gate", bare, None, bare.config, origin="router")]
    layers, refused = [], []
    for name, block, router, experts in blocks(model):
        origin = _origin(router, experts)
        if origin is None:
            refused.append(f"{type(experts).__name__} are not told which experts were chosen")
            continue
        check_told(name, experts)
        own = config or config_of(block, router, experts, model)
        layers.append(MoELayer(name, router, experts, own, block, origin))
    if refused and not layers:
        raise ValueError(f"{type(bare).__name__} cannot be recorded: {refused[0]}, and its router returns no ids")
    if not layers:
        raise ValueError(
            f"not an MoE model: {type(bare).__name__} has no module with a gate and fused experts: "
            "give a transformers>=5 MoE model or a moesaic layer"
        )
    return layers


def check_model(model: object) -> None:
    """ValueError for what is no module, such as the name of a model that is not loaded."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is no module: give a model of torch")


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, nn.Module]]:
    """(name, block, router, experts) of every block that holds `experts` that are one module, in forward order.

    Names are those of the model without wrappers: a compiled or adapted layer keeps the name it had. ValueError where
    two routers share their experts, which are told ids and not whose.
    """
    seen: dict[int, tuple[str, nn.Module | None]] = {}
    for path, holder in model.named_modules():
        if "original_module" in path.split("."):  # PEFT keeps it beside the copy that it trains
            continue
        block = unwrapped(holder)
        for experts in _experts_in(block):
            router = _router_in(block, experts)
            name = ".".join(part for part in path.split(".") if part not in WRAPPED).removeprefix(ADAPTED)
            first, its_router = seen.get(id(experts), (name, router))
            if router is not its_router and None not in (router, its_router):
                raise ValueError(
                    f"{first} and {name} share their experts and not their router: which of them chose an expert "
                    "cannot be told"
                )
            if id(experts) in seen or (router is None and not is_on_seam(experts)):
                continue
            seen[id(experts)] = name, router
            yield name, block, router, experts


def unwrapped(module: nn.Module) -> nn.Module:
    """What a compiled, adapted or distributed wrapper wraps; the module itself where it is none."""
    while True:
        inner = next((part for name in WRAPPED if isinstance(part := module._modules.get(name), nn.Module)), None)
        inner = inner or _trained_copy(module)
        if inner is None or is_on_seam(module) or isinstance(module, Experts | Router):
            return module
        module = inner


def _trained_copy(module: Any) -> nn.Module | None:
    """What runs in the place of a module that PEFT was told to train and save whole (modules_to_save)."""
    copies = module._modules.get("modules_to_save")
    active = module.active_adapters if isinstance(copies, nn.ModuleDict) else []
    return copies[active[0]] if active and active[0] in copies else None


def _experts_in(block: nn.Module) -> list[nn.Module]:
    found = []
    for name, child in block.named_children():
        inner = unwrapped(child)
        if (
            is_on_seam(inner)
            or isinstance(inner, Experts)
            or (name == "experts" and not isinstance(inner, nn.ModuleList))
        ):
            found.append(inner)
    return found


def _router_in(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    children = {name: unwrapped(child) for name, child in block.named_children()}
    named = next((children[name] for name in ROUTER_NAMES if name in children), None)
    if named is not None:
        return named
    alike = [c for c in children.values() if c is not experts and type(c).__name__.endswith(ROUTER_CLASSES)]
    return alike[0] if len(alike) == 1 else None


def is_recompute() -> bool:
    """True inside the second forward of activation checkpointing, which runs within a backward.

    The forward ran before and was seen then: whoever counts must not count it twice.
    """
    return torch._C._current_graph_task_id() >= 0


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, without those it only passes on (*args, **kwargs)."""
    return _names_in(type(unwrapped(module)).forward)


@lru_cache(maxsize=4096)
def _names_in(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind not in kinds)[1:]
    except (TypeError, ValueError):  # written in C
        return ()


def _origin(router: nn.Module | None, experts: nn.Module) -> str | None:
    """Where picks can be taken: from what the experts are given, or from what the router returns."""
    if is_on_seam(experts) or isinstance(experts, Experts) or len(parameters_of(experts)) >= 3:
        return "experts"
    return "router" if router is not None and len(parameters_of(router)) >= 1 else None


def added_rule(router: nn.Module | None) -> MoEConfig | None:
    """How a router selects that was given a selection bias; None for every other."""
    return getattr(router, RULE, None)


def config_of(block: nn.Module, router: nn.Module | None, experts: nn.Module, model: Any) -> MoEConfig:
    """What the router says itself, ours or one with an added bias; else ours where the block is ours; else the nearest
    Hugging Face config; sizes alone where that leaves the rule open or contradicts what the layer holds."""
    own = router.config if isinstance(router, Router) else added_rule(router)
    if own is not None:
        return own
    n_experts = experts_held(experts)
    home = None if router is None else bias_home(router, block)
    owners = (block, experts, unwrapped(model), *model.modules())
    source = next((c for owner in owners if (c := getattr(owner, "config", None)) is not None), None)
    if isinstance(source, MoEConfig):
        return source
    if source is not None:
        with suppress(ValueError):
            config = MoEConfig.from_hf(source)
            if n_experts in (None, config.n_routed_experts) and (home is not None) == config.has_correction_bias:
                return config
        return unknown_config(source, experts, n_experts)
    if home is not None:  # a model of the user's own: the bias says how many experts there are
        return unknown_config(SimpleNamespace(), experts, n_experts or home.bias.numel())
    raise ValueError(f"{type(block).__name__} has no config: give moe_layers(model, config=MoEConfig(...))")


def experts_held(experts: nn.Module) -> int | None:
    """How many experts a module holds: by its weights, or by what it says; None where it does neither."""
    stacks = [p for p in experts.parameters(recurse=False) if p.dim() == 3]
    said = getattr(experts, "num_experts", None)
    return len(stacks[0]) if stacks else said if isinstance(said, int) else None


def unknown_config(source: Any, experts: nn.Module, n_experts: int | None = None) -> MoEConfig:
    """Sizes only, topk_method="unknown": nothing may be derived from it. K is what the config says, or 1 for now."""
    given = text_part(source)

    def first(name: str) -> int | None:
        values = (given.get(alias) for alias in ALIASES.get(name, (name,)))
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    n_experts = n_experts or experts_held(experts) or first("n_routed_experts")
    if n_experts is None:
        raise ValueError(f"{type(experts).__name__} does not say how many experts it holds: give config=MoEConfig(...)")
    hidden = first("hidden_size") or next((p.shape[-1] for p in experts.parameters()), 1)
    return MoEConfig.of_sizes(hidden, n_experts, min(first("num_experts_per_tok") or 1, n_experts))


def with_sizes(config: MoEConfig, n_chosen: int) -> MoEConfig:
    """`config` where it says that many experts per token; else its sizes alone, with what was recorded."""
    if config.num_experts_per_tok == n_chosen:
        return config
    return MoEConfig.of_sizes(config.hidden_size, max(config.n_routed_experts, n_chosen), n_chosen)
