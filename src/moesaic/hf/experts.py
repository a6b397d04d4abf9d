"""The experts of Hugging Face models on our engines: the implementation "moesaic".

transformers hands every experts implementation (experts module, hidden_states, top_k_index, top_k_weights), and the
module says how its weights lie and what it puts between the two projections. What it says is read once and checked by
numbers; a module that computes anything else is refused.
"""

import ctypes
import math
from collections.abc import Iterator
from itertools import chain, product
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from moesaic.engine.checks import DTYPES, autocasts
from moesaic.engine.select import select_engine
from moesaic.engine.spec import ACTIVATIONS, ExpertSpec
from moesaic.engine.tracing import constant_in_graphs
from moesaic.types import ExpertWeights

M = TypeVar("M", bound=nn.Module)
NAME = "moesaic"  # experts_implementation="moesaic"
SEAM = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "config")  # what a module on transformers' seam has
# where activations differ: near 0, in the tails, and far out; the limits and softcaps of a module are added
PROBE = (0.0, 1e-3, 0.03, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.5, 10.5, 15.0, 25.0, 60.0, 250.0)


class Served(NamedTuple):
    """How one experts module is computed; kept on the module, so that it is copied and pickled with it."""

    spec: ExpertSpec
    has_bias: bool
    engine: str = "auto"
    batch_invariant: bool = False
    recompute: bool = False


def experts_forward(
    self: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """The experts implementation "moesaic". `self` is the model's experts module.

    Raises ValueError for a module that cannot be served.
    """
    if torch.compiler.is_compiling():
        # Not asked for `_moesaic`: a graph must not be guarded by the absence of what tracing it adds. And an id guards
        # a graph by the very module, so that layers compiled one by one would have one each.
        if not getattr(self, "_moesaic_is_known", False):
            _prepare(id(self))
    elif "_moesaic" not in self.__dict__:
        keep(self, serve(self))
    served = self._moesaic
    up = self.gate_up_proj if served.spec.gated else self.up_proj
    up_bias = down_bias = None
    if served.has_bias:
        up_bias = self.gate_up_proj_bias if served.spec.gated else self.up_proj_bias
        down_bias = self.down_proj_bias
    weights = ExpertWeights(up, self.down_proj, up_bias, down_bias)
    # as transformers' own implementations do where norms or residuals are kept in float32
    tokens = hidden_states if autocasts(hidden_states) else hidden_states.to(up.dtype)
    engine = select_engine(
        served.engine, tokens.device, tokens.dtype, batch_invariant=served.batch_invariant, recompute=served.recompute
    )
    return engine(tokens, top_k_index, top_k_weights, weights, served.spec).to(hidden_states.dtype)


@constant_in_graphs  # dynamo runs it while tracing
def _prepare(address: int) -> bool:
    # torch 2.11 cannot pass the module itself; at its address (CPython's id) it is, as whoever traces it holds it
    module = ctypes.cast(address, ctypes.py_object).value
    assert isinstance(module, nn.Module)
    if "_moesaic" not in module.__dict__:
        module.__dict__["_moesaic"] = serve(module)
    return True


def keep(module: Any, served: Served) -> None:
    """Compute `module` so from now on; one mark more than `_prepare` leaves says that no graph is guarded by it."""
    module._moesaic, module._moesaic_is_known = served, True


def forget(module: nn.Module) -> None:
    """What was read of `module` is no longer so."""
    for name in ("_moesaic", "_moesaic_is_known"):
        module.__dict__.pop(name, None)


def is_on_seam(module: nn.Module) -> bool:
    """True for an experts module that takes its implementation from its config by name.

    PEFT's wrapper of one that is trained and saved whole lends its copy's attributes, and is none.
    """
    return "modules_to_save" not in module._modules and all(hasattr(module, name) for name in SEAM)


def serve(module: Any) -> Served:
    """How our engines compute this experts module of transformers. ValueError, with the reason, where they cannot."""
    if getattr(module, "has_post_expert_norm", False):
        raise _refusal(module, "normalises the output of every expert before it is weighted")
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up_name, "down_proj"]
    if module.has_bias:
        names += [up_name + "_bias", "down_proj_bias"]
    for name in names:
        if not isinstance(weight := getattr(module, name, None), Tensor):
            raise _refusal(module, f"has no {name}")
        if weight.dtype not in DTYPES:
            raise _refusal(module, f"holds {name} in {weight.dtype}")
        if _is_packed(weight):
            raise _refusal(module, f"holds {name} as {type(weight).__name__}")
    held = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    if unknown := [name for name in held if name.removeprefix("parametrizations.").split(".")[0] not in names]:
        raise _refusal(module, f"holds {', '.join(unknown)} beside the usual weights")
    return Served(understand(module), module.has_bias)


def _is_packed(weight: Tensor) -> bool:
    """A subclass that holds other tensors and calls itself bfloat16, as torchao's quantised ones do."""
    if not is_traceable_wrapper_subclass(weight):
        return False
    from torch.distributed.tensor import DTensor  # 1 s of imports

    return not isinstance(weight, DTensor)  # FSDP2's, which is plain while a layer runs


def understand(module: Any) -> ExpertSpec:
    """The ExpertSpec whose `activate` is this module's own activation, compared on a grid in float64.

    ValueError where none is.
    """
    limits = _numbers(module, "limit", "swiglu_limit")
    near = [factor * limit for limit in (*limits, *chain(*_softcaps(module))) for factor in (0.9, 1.1, 3.0)]
    interleaved = not getattr(module, "is_concatenated", True)
    with _disable_current_modes(), torch.no_grad():  # real numbers also while a graph is traced
        points = torch.tensor([*PROBE, *near], dtype=torch.float64, device="cpu")
        projected = torch.cat([-points, points])
        if module.has_gate:
            gate, up = torch.meshgrid(projected, projected, indexing="ij")
            projected = torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)
        try:
            wanted = (module._apply_gate if module.has_gate else module.act_fn)(projected)
        except Exception as error:  # whatever a family's own code raises
            raise _refusal(module, f"has an activation that fails on plain numbers ({error})") from None
        for spec in _candidates(module, limits, interleaved):
            activated = spec.activate(projected)
            if activated.shape == wanted.shape and torch.allclose(activated, wanted.double(), rtol=1e-5, atol=1e-6):
                return spec
    parts = [module._apply_gate.__qualname__] if module.has_gate else []
    if hasattr(module, "act_fn"):
        parts.append(getattr(module.act_fn, "__name__", type(module.act_fn).__name__))
    raise _refusal(module, f"has an activation that is none of ours ({', '.join(parts)})")


def _candidates(module: Any, limits: tuple[float, ...], interleaved: bool) -> Iterator[ExpertSpec]:
    """The likely ones first."""
    alphas, gated = _numbers(module, "alpha", "swiglu_alpha"), module.has_gate
    softcaps = [(None, *caps) for caps in _softcaps(module)]
    found = product((None, *limits), (1.0, *alphas), (0.0, 1.0), product(*softcaps))
    for activation, (limit, alpha, offset, caps) in product(ACTIVATIONS, found):
        plain = alpha == 1.0 and caps[0] is None
        if not (plain or activation == "silu") or not (gated or (limit, offset, *caps) == (None, 0.0, None, None)):
            continue
        yield ExpertSpec(
            activation=activation,
            gated=gated,
            limit=limit,
            alpha=alpha,
            up_offset=offset,
            gate_softcap=caps[0],
            up_softcap=caps[1],
            interleaved=gated and interleaved,
            transposed=module.is_transposed,
        )


def _softcaps(module: Any) -> list[tuple[float, ...]]:
    """Of the gate and of up, as the module's activation says."""
    act_fn = getattr(module, "act_fn", None)
    return [_numbers(getattr(act_fn, name, None), "softcap") for name in ("gate_softcap", "up_softcap")]


def _numbers(module: Any, *names: str) -> tuple[float, ...]:
    """Those of its attributes that are positive finite numbers, without repetitions."""
    found = (getattr(module, name, None) for name in names)
    return tuple(dict.fromkeys(float(x) for x in found if isinstance(x, int | float) and 0 < x < math.inf))


def _refusal(module: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(module).__name__} {reason}: moesaic cannot serve it, use experts_implementation='grouped_mm' or 'eager'"
    )
