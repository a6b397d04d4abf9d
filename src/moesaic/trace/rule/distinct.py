"""Whether every token has its experts once: with one of them twice, neither loads nor sets of experts mean anything."""

import numpy as np

from moesaic.trace.shown import short_layer
from moesaic.trace.slots import twice
from moesaic.trace.store import Trace


def check_distinct(trace: Trace) -> None:
    """ValueError, in one line, where a token has the same expert in two slots; the id E may stand in several."""
    for layer in range(trace.n_layers):
        if len(tokens := np.flatnonzero(twice(trace.picks[layer].numpy(), trace.n_experts))):
            ids = trace.picks[layer, int(tokens[0])].tolist()
            expert = next(e for e in ids if ids.count(e) > 1 and e < trace.n_experts)
            raise ValueError(
                f"token {tokens[0]} of {short_layer(trace.layers[layer])} has expert e{expert} twice, which no "
                "top-k gives: correct the picks, with the id E where a slot has no expert"
            )
