"""A trace as a table: columns for pandas, polars or whatever else takes a dict of numpy arrays."""

from collections.abc import Sequence

import numpy as np

from moesaic.trace.store import PHASES, Trace


def rows(trace: Trace, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """See `Trace.rows`."""
    n_tokens, k = len(trace), trace.top_k

    def of_tokens(values: np.ndarray) -> np.ndarray:
        return np.tile(np.repeat(values, k), len(layers))

    sequences = trace.sequences.numpy()
    columns = {
        "layer": np.repeat(_texts(trace.layers)[list(layers)], n_tokens * k),
        "token": of_tokens(np.arange(n_tokens)),
        "sequence": of_tokens(sequences),
    }
    if trace.labels is not None:
        columns["label"] = of_tokens(_texts(trace.labels)[sequences])
    if trace.phases is not None:
        columns["phase"] = of_tokens(_texts(PHASES)[trace.phases.numpy()])
    if trace.input_ids is not None:
        columns["input_id"] = of_tokens(trace.input_ids.numpy())
        if trace.pieces is not None:
            ids, place = np.unique(trace.input_ids.numpy(), return_inverse=True)
            columns["piece"] = of_tokens(_texts([trace.pieces.get(number, "") for number in ids.tolist()])[place])
    columns["slot"] = np.tile(np.arange(k), len(layers) * n_tokens)
    columns["expert"] = trace.picks[layers].numpy().ravel()
    if trace.weights is not None:
        columns["weight"] = trace.weights[layers].numpy().ravel()
    return columns


def _texts(values: Sequence[str]) -> np.ndarray:
    """References to texts: as numpy's own texts each would be as long as the longest."""
    return np.array(values, object)
