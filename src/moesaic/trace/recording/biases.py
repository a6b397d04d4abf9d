"""The correction biases under which scores were recorded."""

import torch
from torch import Tensor


class Biases:
    """The correction biases under which scores were recorded: one a layer, since a trace holds one."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def see(self, name: str, bias: Tensor | None) -> None:
        """Keep a copy of the first; ValueError for another one. No look at values where nothing was written to it."""
        if bias is None:
            return
        version = (bias.data_ptr(), -1 if bias.is_inference() else bias._version)
        if self._versions.get(name) == version and version[1] >= 0:
            return
        now = bias.detach().to("cpu", torch.float32, copy=True)
        if not torch.equal(self.values.setdefault(name, now), now):
            raise ValueError(
                f"the correction bias of layer {name!r} changed while its scores were recorded: "
                "record one step at a time, or detail='picks'"
            )
        self._versions[name] = version
