"""Runs of `moesaic train` as they lie on disk, and what several seeds of one balance say together."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moesaic.train.data import DOMAINS
from moesaic.train.evaluate import mixed
from moesaic.train.run_folder import RECORD


class Run(NamedTuple):
    """One run, at each of its N evaluations on held-out text.

    loss: nats per token, the domains in their shares. loads: by layer, shares of all assignments. bias: by layer, empty
    where there is none. final: what training.json says of a finished run, None of one that is not.
    """

    name: str
    balance: str
    seed: int
    planned: int  # steps
    steps: list[int]
    loss: Float[np.ndarray, " N"]
    max_vio: dict[str, Float[np.ndarray, " N"]]
    loads: dict[str, Float[np.ndarray, "N E"]]
    bias: dict[str, Float[np.ndarray, "N E"]]
    final: dict[str, Any] | None

    @property
    def worst_vio(self) -> Float[np.ndarray, " N"]:
        """MaxVio of the layer that is worst at each evaluation."""
        return np.max(list(self.max_vio.values()), axis=0)


def read_run(folder: Path) -> Run:
    """The run in a folder, or in the training.json itself. ValueError where there is none, or no evaluation yet."""
    path = folder / RECORD if folder.is_dir() else folder
    try:
        record = json.loads(path.read_text("utf-8"))
        history, recipe = record["history"], record["recipe"]
        if not history:
            raise ValueError(f"{path}: not one evaluation yet: wait for step {recipe['evaluate_every']}")
        layers = list(history[0]["loads"])
        shares = [{layer: mixed(line["loads"][layer]).sum(0) for layer in layers} for line in history]
        return Run(
            name=path.parent.name,
            balance=recipe["balance"],
            seed=record["seed"],
            planned=recipe["steps"],
            steps=[line["step"] for line in history],
            loss=np.array([sum(DOMAINS[d].share * loss for d, loss in line["loss"].items()) for line in history]),
            max_vio={layer: np.array([s[layer].max() / s[layer].mean() - 1 for s in shares]) for layer in layers},
            loads={layer: np.array([s[layer] for s in shares]) for layer in layers},
            bias={layer: np.array([line["bias"][layer] for line in history]) for layer in history[0]["bias"]},
            final=record if record["finished"] else None,
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give folders of `moesaic train` runs") from None
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError):
        raise ValueError(f"{path}: not the record of a `moesaic train` run of this version: train it again") from None


class Spread(NamedTuple):
    """A number over the seeds. sd: sample standard deviation, None for one seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None


class Balance(NamedTuple):
    """The finished runs of one way to balance. Layers count by their worst, but for specialisation: their mean."""

    name: str
    seeds: tuple[int, ...]
    steps: int
    loss: Spread
    max_vio: Spread
    unused: Spread  # experts below a tenth of their share, all layers together
    specialisation: Spread  # bits

    def gain_over(self, other: "Balance") -> Spread | None:
        """The loss less that of `other`, seed by seed; None where they share no seed or differ in steps."""
        shared = [seed for seed in self.seeds if seed in other.seeds]
        if not shared or self.steps != other.steps or self is other:
            return None
        here, there = (dict(zip(b.seeds, b.loss.values, strict=True)) for b in (self, other))
        return Spread(tuple(here[seed] - there[seed] for seed in shared))


def by_balance(runs: Sequence[Run]) -> list[Balance]:
    """Finished runs of one balance and one length together, in the order in which they were given.

    Raises ValueError for two runs with the same balance, steps and seed: they are the same run.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.final is not None:
            groups.setdefault((run.balance, run.planned), []).append(run)
    found = []
    for (name, steps), members in groups.items():
        seeds = tuple(run.seed for run in members)
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise ValueError(f"two runs of balance {name} with seed {twice}: leave one of them out")
        finals = [run.final for run in members if run.final is not None]
        found.append(
            Balance(
                name,
                seeds,
                steps,
                loss=Spread(tuple(final["loss"] for final in finals)),
                max_vio=Spread(tuple(max(final["max_violation"].values()) for final in finals)),
                unused=Spread(tuple(float(sum(final["unused"].values())) for final in finals)),
                specialisation=Spread(tuple(mean(final["specialisation"].values()) for final in finals)),
            )
        )
    return found


def as_dict(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    return {
        "runs": [
            {
                "name": run.name, "balance": run.balance, "seed": run.seed, "steps": run.steps, "planned": run.planned,
                "finished": run.final is not None, "loss": [_finite(x) for x in run.loss],
                "max_vio": {layer: [_finite(x) for x in values] for layer, values in run.max_vio.items()},
            }
            for run in runs
        ],
        "balances": [
            {"name": b.name, "seeds": list(b.seeds), "steps": b.steps}
            | {
                key: {"values": list(spread.values), "mean": spread.mean, "sd": spread.sd}
                for key in ("loss", "max_vio", "unused", "specialisation")
                for spread in (getattr(b, key),)
            }
            for b in by_balance(runs)
        ],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
