"""Golden values of balancing losses, as other libraries give them: losses/NAME.json and the logits in NAME.npz.

Run: `python tests/golden/make_losses.py NAME` with NAME transformers, or, after
`pip install --no-deps megatron-core==0.16.1`, megatron, or, after `pip install --no-deps` with the names in INSTALL,
deepspeed.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "losses"
INSTALL = "deepspeed==0.19.8 psutil py-cpuinfo hjson msgpack ninja einops nvidia-ml-py"
LENGTH, SEQUENCES, LAYERS = 6, 4, 3


class Case(NamedTuple):
    """One set of tokens. scale: how uneven their routing is."""

    scoring: str
    n_experts: int
    k: int
    scale: int
    padded: bool = False

    def logits(self, layer: int = 0) -> Tensor:
        """[SEQUENCES * LENGTH, E], batch-major: integers over 2048, of which no two in a row tie."""
        generator = torch.Generator().manual_seed(100 * self.n_experts + 10 * self.k + self.scale + 1000 * layer)
        offset = self.scale * torch.randn(self.n_experts, generator=generator)
        noise = torch.randn(SEQUENCES * LENGTH, self.n_experts, generator=generator)
        return (((offset + noise) * 32).round().clamp(-500, 500) * 64 + torch.arange(self.n_experts)) / 2048

    def mask(self) -> Tensor:
        """[SEQUENCES * LENGTH], True is a token: sequences of unequal length, or all of them whole."""
        mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
        if self.padded:
            mask[0, 4:], mask[2, 1:] = False, False
        return mask.flatten()


Answer = Callable[[Case], dict[str, Any]]


def grid(*, scorings: tuple[str, ...], padding: bool) -> Iterator[Case]:
    for scoring in scorings:
        for n_experts, k, scale in ((8, 1, 1), (8, 2, 0), (16, 4, 1), (32, 6, 2)):
            yield Case(scoring, n_experts, k, scale)
        if padding:
            yield Case(scoring, 16, 4, 1, padded=True)


def megatron() -> tuple[Answer, Iterator[Case], dict[str, str]]:
    from megatron.core.transformer.moe import moe_utils

    def answer(case: Case) -> dict[str, float]:
        def of(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            mask = case.mask()[rows]
            padding = ~mask if case.padded else None
            chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(
                case.logits()[rows], case.k, case.scoring, padding_mask=padding
            )
            return chosen, scores, mask

        def switch(scores: Tensor, counts: Tensor, n_tokens: Any) -> Tensor:
            return moe_utils.switch_load_balancing_loss_func(scores, counts, n_tokens, case.k, case.n_experts, 1.0)

        chosen, scores, mask = of(slice(None))
        values = {"switch": switch(scores, chosen.sum(0), mask.sum())}
        padding = ~mask if case.padded else None
        values["z"] = moe_utils.z_loss_func(case.logits(), 1.0, padding_mask=padding)
        if not case.padded:  # its router folds sequences into the expert axis; padding there is not told by sequence
            folded = [
                x.view(SEQUENCES, LENGTH, -1).transpose(0, 1).reshape(LENGTH, -1) for x in (scores, chosen)
            ]  # [S, B * E]
            values["sequence"] = switch(folded[0], folded[1].sum(0), LENGTH) / SEQUENCES
            # two micro-batches: counts are averaged over those seen so far, as its router does
            halves = [of(slice(0, len(mask) // 2)), of(slice(len(mask) // 2, None))]
            mean = sum(chosen.sum(0) for chosen, _, _ in halves) / 2
            values["global_batch_second_half"] = switch(halves[1][1], mean, len(mask) // 2)
        return {name: float(value) for name, value in values.items()}

    source = {
        "package": "megatron-core",
        "code": "megatron/core/transformer/moe/moe_utils.py: switch_load_balancing_loss_func, z_loss_func, "
        "compute_routing_scores_for_aux_loss; folded and averaged as router.py does, which needs CUDA",
        "install": "pip install --no-deps megatron-core==0.16.1",
    }
    return answer, grid(scorings=("softmax", "sigmoid"), padding=True), source


def deepspeed() -> tuple[Answer, Iterator[Case], dict[str, str]]:
    from deepspeed.moe.sharded_moe import topkgating

    def answer(case: Case) -> dict[str, float]:
        return {"switch": float(topkgating(case.logits(), case.k, capacity_factor=100.0, min_capacity=4)[0])}

    source = {
        "package": "deepspeed",
        "code": "deepspeed/moe/sharded_moe.py: topkgating",
        "install": f"pip install --no-deps {INSTALL}",
    }
    return answer, grid(scorings=("softmax",), padding=False), source


def transformers() -> tuple[Answer, Iterator[Case], dict[str, str]]:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    def answer(case: Case) -> dict[str, float]:
        mask = case.mask().view(SEQUENCES, LENGTH) if case.padded else None

        def of(layers: int) -> float:
            logits = tuple(case.logits(layer) for layer in range(layers))
            return float(load_balancing_loss_func(logits, case.n_experts, case.k, mask))

        return {"switch": of(1), "pooled": of(LAYERS)}

    source = {
        "package": "transformers",
        "code": "transformers/models/mixtral/modeling_mixtral.py: load_balancing_loss_func",
        "install": "pip install transformers==5.23.0",
    }
    return answer, grid(scorings=("softmax",), padding=True), source


MAKERS = {"megatron": megatron, "deepspeed": deepspeed, "transformers": transformers}


def read(name: str) -> list[tuple[Case, list[Tensor], dict[str, float]]]:
    """The cases of a library, the logits of their layers as they were, and what it answered."""
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return [
            (Case(**entry["case"]), list(torch.from_numpy(arrays[f"case_{i}"]).float() / 2048), entry["values"])
            for i, entry in enumerate(record["cases"])
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MAKERS)
    name = parser.parse_args().name
    answer, cases, source = MAKERS[name]()
    source["version"] = version(source["package"])
    source["command"] = f"python tests/golden/make_losses.py {name}"
    made = {"made": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    kept = list(cases)
    entries = [{"case": case._asdict(), "values": answer(case)} for case in kept]
    layers = {f"case_{i}": torch.stack([case.logits(layer) for layer in range(LAYERS)]) for i, case in enumerate(kept)}
    np.savez_compressed(FOLDER / f"{name}.npz", **{key: (x * 2048).short().numpy() for key, x in layers.items()})
    text = json.dumps({"name": name, **source, **made, "cases": entries}, indent=1)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
