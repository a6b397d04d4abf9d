"""Which layer of a model a name means, whoever gave it: vLLM's "layers.3" is "model.layers.3.mlp" of transformers."""

import re
from collections.abc import Sequence


def depth_of(name: str) -> int | None:
    """The first number in a layer's name: 3 of "model.layers.3.mlp"."""
    found = re.findall(r"(?<![^.\s_])\d+(?![^.\s_])", name)
    return int(found[0]) if found else None


def same_layers(here: Sequence[str], there: Sequence[str]) -> dict[str, str]:
    """{name of `here`: name of `there`} of the same layers. Names that all stand in `there` are meant as they are;
    others go by depth, where on neither side two layers have one or some layer has none."""
    if set(here) <= set(there):
        return {name: name for name in here}
    ours, theirs = ({depth_of(name): name for name in names} for names in (here, there))
    if None in ours or None in theirs or len(ours) < len(here) or len(theirs) < len(there):
        return {name: name for name in here if name in there}
    return {name: theirs[depth] for depth, name in ours.items() if depth in theirs}
