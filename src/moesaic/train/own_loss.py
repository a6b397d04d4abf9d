"""The balancing loss that a model adds by itself, beside which ours would balance twice."""

import warnings
from typing import Any

from torch import nn

from moesaic.hf.modules import unwrapped

COEFFICIENT = "router_aux_loss_coef"


def warn_of_own_loss(model: nn.Module, args: Any) -> None:
    """Where the training that begins adds one: say what turns it off. args: the Trainer's.

    Trainers of TRL have the coefficient in their arguments and turn the loss on by it; None, the default of newer ones,
    stands for that of the text config. Elsewhere output_router_logits of the text config turns it on, and the model
    took its coefficient from there when it was made.
    """
    inner: Any = unwrapped(model)
    config = getattr(inner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not (hasattr(inner, COEFFICIENT) or hasattr(type(config), COEFFICIENT)):  # its family has no such loss
        return
    coefficient = getattr(config, COEFFICIENT, None)
    if hasattr(args, COEFFICIENT):
        given, off = getattr(args, COEFFICIENT), f"{COEFFICIENT}=0.0 in {type(args).__name__}"
        coefficient = coefficient if given is None else given
    else:
        off = f"output_router_logits=False in its {type(config).__name__}"
        on = getattr(config, "output_router_logits", False)
        coefficient = getattr(inner, COEFFICIENT, coefficient) if on else None
    if coefficient:
        warnings.warn(
            f"{type(inner).__name__} adds a balancing loss of its own, {COEFFICIENT} is {coefficient}: set {off}, "
            "unless both are meant",
            stacklevel=3,
        )
