"""Whether every token has its experts once: with one of them twice, neither loads nor sets of experts mean anything."""

import numpy as np

from moesaic.trace.shown import short_layer
from moesaic.trace.store import Trace


def check_distinct(trace: Trace) -> None:
    """ValueError, in one line, where a token has the same expert in two slots; the id E may stand in several."""
    for layer in range(trace.n_layers):
        slots = np.ascontiguousarray(trace.picks[layer].numpy().T)  # [K, T]: whole rows are compared
        for second in range(1, len(slots)):
            for first in range(second):
                twice = slots[first] == slots[second]
                if twice.any() and len(tokens := np.flatnonzero(twice & (slots[first] < trace.n_experts))):
                    token, expert = int(tokens[0]), int(slots[first][tokens[0]])
                    raise ValueError(
                        f"token {token} of {short_layer(trace.layers[layer])} has expert e{expert} twice, which no "
                        "top-k gives: correct the picks, with the id E where a slot has no expert"
                    )
