"""Which node holds which expert, and how many places (groups, nodes) a token's experts lie in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesaic.strict_json import parsed

WORD = 63  # places that one integer can mark


def place_experts(
    n_experts: int, *, nodes: int | None = None, placement: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The node of every expert, int64 [E]: `placement` itself, checked, or the experts in equal runs over `nodes`.

    ValueError where a placement has another length, is no list of node numbers from 0, or `nodes` do not divide E.
    """
    if placement is None:
        if nodes is None or nodes < 1 or n_experts % nodes:
            raise ValueError(
                f"nodes={nodes} does not divide n_routed_experts={n_experts}: "
                "use a divisor, or give placement, the node of every expert"
            )
        return np.arange(n_experts) // (n_experts // nodes)
    array = np.asarray(placement)
    if nodes is not None:
        raise ValueError("nodes and placement are both given: use one of them")
    if array.shape != (n_experts,):
        shape = list(array.shape)
        raise ValueError(f"placement has shape {shape}, not [{n_experts}]: give the node of every expert")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"placement holds {array.dtype}, not whole numbers: give the node of every expert, from 0")
    if array.min() < 0 or array.max() >= n_experts:
        raise ValueError(
            f"placement has nodes {array.min()} to {array.max()}: number them from 0, at most one node an expert"
        )
    return array.astype(np.int64)


def read_placement(given: str, n_experts: int) -> np.ndarray:
    """The placement in a JSON list with the node of every expert: the list itself, or a file that holds it."""
    name = "--placement" if (listed := given.lstrip().startswith("[")) else given
    try:
        content = parsed(given.encode() if listed else Path(given).read_bytes(), name)
    except OSError as error:
        raise ValueError(
            f"{name}: cannot be read ({error.strerror}): give the node of every expert, [0,0,1,1], or a file of that"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}: give the node of every expert, [0, 0, 1, 1]") from None
    if not isinstance(content, list) or any(isinstance(node, bool) or not isinstance(node, int) for node in content):
        raise ValueError(f"{name}: not a list of whole numbers: give the node of every expert, [0, 0, 1, 1]")
    if any(abs(node) >= 2**31 for node in content):
        raise ValueError(f"{name}: a node number is beyond 2^31: number nodes from 0")
    return place_experts(n_experts, placement=content)


def distinct_places(picks: np.ndarray, place: np.ndarray) -> np.ndarray:
    """In how many places the experts of each token lie, float64 [T], for picks [T, K] and the place of each expert,
    [E]; the id E lies in none. One bit a place, so that nothing is sorted."""
    found = np.zeros(len(picks), np.float64)
    if not picks.size:
        return found
    for first in range(0, int(place.max()) + 1, WORD):
        here = (place >= first) & (place < first + WORD)
        few = place.max() < 8
        bits = np.zeros(len(place) + 1, np.uint8 if few else np.uint64)
        bits[:-1][here] = (np.uint64(1) << (place[here] - first).astype(np.uint64)).astype(bits.dtype)
        seen = bits[picks[:, 0]]
        for slot in range(1, picks.shape[1]):
            seen |= bits[picks[:, slot]]
        found += ONES[seen] if few else ONES[seen.view(np.uint8)].reshape(len(seen), 8).sum(-1)
    return found


ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
