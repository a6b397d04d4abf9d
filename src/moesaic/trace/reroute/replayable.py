"""What can be replayed: whether a trace belongs to a model, and where in the model its tokens and experts are."""

from typing import Any

from torch import Tensor, nn

from moesaic.engine.tracing import is_traced
from moesaic.hf.modules import MoELayer
from moesaic.layer.router import Router
from moesaic.trace.depth import same_layers
from moesaic.trace.store import Trace

WEIGHTS = ("live", "recorded")
IN_GRAPH = "replay does not run in a compiled graph: leave torch.compile out"


def check(model: nn.Module, trace: Trace, weights: str, layers: list[MoELayer]) -> None:
    """Refuse, in one line, what cannot be replayed."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is unknown: use 'live' or 'recorded'")
    if any(_is_compiled(module) for module in model.modules()):
        raise ValueError("a compiled model cannot be replayed: give the model as it was before torch.compile")
    if weights == "recorded" and trace.weights is None:
        raise ValueError("weights='recorded' has none to take: the trace holds ids only")
    for layer in layers:
        for what, here, there in (
            ("experts", trace.n_experts, layer.config.n_routed_experts),
            ("experts per token", trace.top_k, layer.config.num_experts_per_tok),
        ):
            if here != there:
                raise ValueError(f"the trace is of another model: {here} {what}, and layer {layer.name!r} has {there}")
        if weights == "live" and not layer.config.rule_is_known:
            raise ValueError(
                f"the rule of layer {layer.name!r} is not known, so its weights cannot be made again: "
                "use weights='recorded'"
            )
        if not isinstance(layer.router, Router) and (layer.router is None or layer.experts is None):
            raise ValueError(f"layer {layer.name!r} has no router and experts that can be reached: not replayable")
        if layer.origin != "experts" and not isinstance(layer.router, Router):
            raise ValueError(f"the experts of layer {layer.name!r} are not told which were chosen: not replayable")


def rows_of(trace: Trace, layers: list[MoELayer]) -> dict[str, int]:
    """{layer of the model: its row of the trace}, by name or, where an engine named them, by depth."""
    names = [layer.name for layer in layers]
    known = same_layers(trace.layers, names)
    if strangers := [name for name in trace.layers if name not in known]:
        raise ValueError(
            f"the trace is of another model: it has a layer {strangers[0]!r}, and {names[0]!r} is the first of this one"
        )
    return {known[name]: row for row, name in enumerate(trace.layers)}


def check_recorded(trace: Trace, row: int, tokens: Tensor, picks: Tensor) -> None:
    """Where an engine left a token out, no expert is not what it chose. `picks` are those of `tokens`, [n, K]."""
    if trace.origins[row] == "imported" and (empty := (picks >= trace.n_experts).all(-1) & (tokens >= 0)).any():
        token = int(tokens[empty][0])
        raise ValueError(
            f"the record has no experts of token {token} (sequence {int(trace.sequences[token])}) in layer "
            f"{trace.layers[row]!r}: leave that sequence out (sequences=), or record it again"
        )


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def refuse_balance(router: nn.Module, name: str) -> None:
    """A BalanceLoss on a router that keeps its own picks, while its experts run those of the record."""
    if router.training and (kinds := [kind for kind in vars(router) if kind.startswith("_moesaic_loss_")]):
        raise ValueError(
            f"BalanceLoss({kinds[0].removeprefix('_moesaic_loss_')!r}) would balance what the router of layer {name!r} "
            "chooses, and its experts run what was recorded: detach() it, or use our own Router, which is balanced "
            "in replay (of a copy: make it before the BalanceLoss is attached)"
        )


def refuse_graph() -> None:
    if is_traced():
        raise ValueError(IN_GRAPH)


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def logits_in(output: Any, n_experts: int) -> Tensor | None:
    """The first of a router's results that has a number for every expert."""
    items = (output,) if isinstance(output, Tensor) else output
    for item in items:
        if isinstance(item, Tensor) and item.is_floating_point() and item.shape[-1] == n_experts:
            return item.flatten(0, -2)
    return None
