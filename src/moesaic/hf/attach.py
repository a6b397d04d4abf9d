"""`attach`: our engines for the experts of a model, and what moesaic had added to it."""

from typing import Any, TypeVar

from torch import nn

from moesaic.engine.checks import DTYPES
from moesaic.engine.select import check_engine
from moesaic.hf.added_bias import add_saved, saved_biases
from moesaic.hf.experts import NAME, forget, is_on_seam, keep, serve
from moesaic.hf.modules import check_model
from moesaic.layer.experts import Experts

M = TypeVar("M", bound=nn.Module)


def attach(model: M, *, engine: str = "auto", batch_invariant: bool = False, recompute: bool = False) -> M:
    """Let our engines compute the experts of `model`, in place; returns it.

    Takes transformers models whose experts go through its experts interface, and models that hold our layers. Weights
    stay where they are, and `model.set_experts_implementation("grouped_mm")` is the way back. batch_invariant:
    what the experts give for a token does not depend on the tokens beside it (forward; the rest of the model is
    torch's). recompute: keep less for the backward, compute it again there.

    A selection bias that moesaic added to a family without one and that was saved with the model is read from its
    checkpoint, which plain transformers leaves out.

    Raises ValueError, and changes nothing, where `model` is no module or has no such experts, one of them cannot be
    served, such a bias cannot be read or added, or transformers does not let the model switch.
    """
    check_engine(engine, batch_invariant=batch_invariant, recompute=recompute)
    check_model(model)
    ours = [module for module in model.modules() if isinstance(module, Experts)]
    theirs: list[Any] = [module for module in model.modules() if is_on_seam(module)]
    if not ours and not theirs:
        raise ValueError(_nothing_to_attach(model))
    options = {"engine": engine, "batch_invariant": batch_invariant, "recompute": recompute}
    served = []
    for module in theirs:
        try:
            served.append(serve(module)._replace(**options))
        except ValueError:
            forget(module)
            raise
    biases = saved_biases(model)
    if theirs and (switch := getattr(model, "set_experts_implementation", None)):
        try:
            switch(NAME)
        except RuntimeError as error:
            raise ValueError(f"transformers does not let this model change its experts: {error}") from None
    add_saved(model, biases)
    for module, how in zip(theirs, served, strict=True):
        keep(module, how)
        if module.config._experts_implementation != NAME:  # a bare block, or a model inside a wrapper
            module.config._experts_implementation = NAME
    for module in ours:
        for name, value in options.items():
            setattr(module, name, value)
    return model


def _nothing_to_attach(model: nn.Module) -> str:
    found = [e for m in model.modules() if isinstance(e := getattr(m, "experts", None), nn.Module)]
    experts = {type(e).__name__ for e in found}
    experts |= {str(weight.dtype) for e in found for weight in e.parameters() if weight.dtype not in DTYPES}
    if not experts:
        return f"nothing to attach to: {type(model).__name__} has no experts"
    return (
        f"nothing to attach to: {type(model).__name__} computes its experts ({', '.join(sorted(experts))}) itself, "
        "not through transformers' experts interface"
    )
