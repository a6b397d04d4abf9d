"""Runs of `moesaic train` as they lie on disk, and what several seeds of one balance say together."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moesaic.config import MoEConfig
from moesaic.trace.chance.bands import RUNS, balance_numbers, random_loads
from moesaic.trace.shown import finite
from moesaic.train.data import DOMAINS
from moesaic.train.evaluate import mixed, mixed_loss
from moesaic.train.monitor.run_log import LOG
from moesaic.train.run_folder import RECORD
from moesaic.train.sizes import SIZES
from moesaic.train.training import BALANCES

BALANCING = ("balance", "bias_speed", "loss_alpha")  # fields of a recipe in which compared runs may differ
NUMBERS = ("loss", "max_vio", "dead", "unused", "specialisation")


class Final(NamedTuple):
    """What a finished run came to, with the weights that it kept: numbers on all held-out text, but for `dead`.

    Layers count by their worst in max_vio, by their sum in dead and unused, by their mean in specialisation (bits).
    dead: experts never chosen at the evaluation of those weights. unused: below a tenth of their share. tokens: held
    out, as many of an even mixture as say so much. versions, command: how it was made.
    """

    loss: float
    max_vio: float
    dead: float
    unused: float
    specialisation: float
    tokens: float
    versions: dict[str, str]
    command: str


class Run(NamedTuple):
    """One run, at each of its N evaluations on held-out text.

    setting: its size and recipe. loss: nats per token, the domains in their shares. loads: by layer, shares of all
    assignments. bias: by layer, empty where there is none. assignments: of a layer at one evaluation, as many of an
    even mixture as say so much. final: None where it is not finished.
    """

    name: str
    seed: int
    setting: dict[str, Any]
    steps: list[int]
    loss: Float[np.ndarray, " N"]
    max_vio: dict[str, Float[np.ndarray, " N"]]
    loads: dict[str, Float[np.ndarray, "N E"]]
    bias: dict[str, Float[np.ndarray, "N E"]]
    assignments: float
    final: Final | None

    @property
    def balance(self) -> str:
        return self.setting["balance"]

    @property
    def worst_vio(self) -> Float[np.ndarray, " N"]:
        """MaxVio of the layer that is worst at each evaluation."""
        return np.max(list(self.max_vio.values()), axis=0)

    @property
    def chance(self) -> tuple[float, float]:
        """`worst_vio` at one evaluation, were the routing random: 5th and 95th percentile."""
        tokens = self.assignments / _config(self.setting["size"]).num_experts_per_tok
        return chance_of(self.setting["size"], len(self.loads), tokens)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """`read_run` of each, or of all that lie in it, in the order of `BALANCES` (none first), then of seeds."""
    order = list(BALANCES)
    each = [run for folder in folders for run in sorted(path.parent for path in folder.glob(f"*/{RECORD}")) or [folder]]
    return sorted(map(read_run, each), key=lambda run: (order.index(run.balance), run.seed))


def read_run(folder: Path) -> Run:
    """The run in a folder, or in the training.json itself. ValueError where there is none, or no evaluation yet."""
    path = folder / RECORD if folder.is_dir() else folder
    if folder.name == LOG or (not path.exists() and [*folder.glob(LOG), *folder.glob(f"*/{LOG}")]):
        raise ValueError(
            f"{folder}: logs of ms.LoadMonitor are for `moesaic watch`: give folders that `moesaic train` wrote"
        )
    try:
        record = json.loads(path.read_text("utf-8"))
        history, recipe = record["history"], record["recipe"]
        if not history:
            raise ValueError(f"{path}: not one evaluation yet: wait for step {recipe['evaluate_every']}")
        layers = list(history[0]["loads"])
        loads = {layer: np.array([mixed(line["loads"][layer]).sum(0) for line in history]) for layer in layers}
        first = history[0]["loads"][layers[0]]
        run = Run(
            name=path.parent.name,
            seed=record["seed"],
            setting={"size": record["size"], **recipe},
            steps=[line["step"] for line in history],
            loss=np.array([_loss(line) for line in history]),
            max_vio={layer: balance_numbers(load)["max_vio"] for layer, load in loads.items()},
            loads=loads,
            bias={layer: np.array([line["bias"][layer] for line in history]) for layer in history[0]["bias"]},
            assignments=_evenly({domain: sum(load) for domain, load in first.items()}),
            final=_final(record) if record["finished"] else None,
        )
        if record["size"] in SIZES and recipe["balance"] in BALANCES and recipe["held_out_windows"]:
            return run
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give folders of `moesaic train` runs") from None
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, json.JSONDecodeError, UnicodeDecodeError):
        pass
    raise ValueError(
        f"{path}: not the record of a `moesaic train` run of this version: give the folder of one, or train it again"
    )


def _loss(line: Mapping[str, Any]) -> float:
    """NaN where that of a domain is none, which JSON says by null."""
    return mixed_loss({domain: math.nan if loss is None else loss for domain, loss in line["loss"].items()})


def _final(record: dict[str, Any]) -> Final:
    kept = next(line for line in record["history"] if line["step"] == record["best_step"])
    return Final(
        loss=record["loss"],
        max_vio=max(record["max_violation"].values()),
        dead=float(sum(balance_numbers(mixed(loads).sum(0))["dead"] for loads in kept["loads"].values())),
        unused=float(sum(record["unused"].values())),
        specialisation=mean(record["specialisation"].values()),
        tokens=_evenly({domain: result["tokens"] for domain, result in record["held_out"].items()}),
        versions=record["versions"],
        command=record["command"],
    )


def _evenly(counts: Mapping[str, float]) -> float:
    """Of so many of each domain, weighted by its share, the number that would be as certain if all weighed the same."""
    return 1 / sum(DOMAINS[domain].share ** 2 / count for domain, count in counts.items())


@cache
def _config(size: str) -> MoEConfig:
    return MoEConfig.from_hf(SIZES[size]())


@cache
def chance_of(size: str, layers: int, tokens: float) -> tuple[float, float]:
    """5th and 95th percentile of the MaxVio of the worst of so many layers, were so many tokens routed at random.

    Below x lie all layers where each of them does, and random layers know nothing of each other.
    """
    loads = random_loads(_config(size), max(round(tokens), 1), RUNS, np.random.default_rng(0))
    low, high = np.quantile(balance_numbers(loads)["max_vio"], (0.05 ** (1 / layers), 0.95 ** (1 / layers)))
    return float(low), float(high)


def names_of(runs: Sequence[Run]) -> list[str]:
    """The balance of each, with whatever sets it apart from others of the same one: "aux loss_alpha=0.1"."""
    names = []
    for run in runs:
        alike = [other.setting for other in runs if other.balance == run.balance]
        apart = [field for field in run.setting if any(run.setting[field] != setting.get(field) for setting in alike)]
        names.append(" ".join([run.balance, *(f"{field}={run.setting[field]}" for field in apart)]))
    return names


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
    """The finished runs of one way to balance: each number of `Final` over its seeds. chance: see `chance_of`."""

    name: str
    seeds: tuple[int, ...]
    setting: dict[str, Any]
    chance: tuple[float, float]
    loss: Spread
    max_vio: Spread
    dead: Spread
    unused: Spread
    specialisation: Spread

    def gain_over(self, other: "Balance") -> Spread | None:
        """The loss less that of `other`, seed by seed; None where no seed is shared or more than balance differs."""
        shared = [seed for seed in self.seeds if seed in other.seeds]
        same = all(value == other.setting.get(field) for field, value in self.setting.items() if field not in BALANCING)
        if not shared or not same or self is other:
            return None
        here, there = (dict(zip(b.seeds, b.loss.values, strict=True)) for b in (self, other))
        return Spread(tuple(here[seed] - there[seed] for seed in shared))


def by_balance(runs: Sequence[Run]) -> list[Balance]:
    """Finished runs of one size and recipe together, in the order in which they were given.

    Raises ValueError for two of them with the same seed: they are the same run.
    """
    groups: dict[str, list[tuple[Run, Final]]] = {}
    for name, run in zip(names_of(runs), runs, strict=True):
        if run.final is not None:
            groups.setdefault(name, []).append((run, run.final))
    found = []
    for name, members in groups.items():
        seeds = tuple(run.seed for run, _ in members)
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise ValueError(f"two runs of balance {name} with seed {twice}: leave one of them out")
        spreads = {number: Spread(tuple(getattr(final, number) for _, final in members)) for number in NUMBERS}
        run, final = members[0]
        chance = chance_of(run.setting["size"], len(run.loads), final.tokens)
        found.append(Balance(name, seeds, run.setting, chance, **spreads))
    return found


def made_with(runs: Sequence[Run]) -> tuple[dict[str, str], str]:
    """Versions behind the finished runs and config hashes of all; several of each where they differ."""
    made: dict[str, list[str]] = {}
    for final in (run.final for run in runs if run.final is not None):
        for name, version in final.versions.items():
            made.setdefault(name, []).append(version)
    hashes = [_config(run.setting["size"]).digest() for run in runs]
    return {name: _all(found) for name, found in made.items()}, _all(hashes)


def _all(values: Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def as_dict(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    return {
        "runs": [
            {
                "name": run.name, "seed": run.seed, **run.setting, "evaluated": run.steps,
                "finished": run.final is not None, "loss": [finite(x) for x in run.loss],
                "max_vio": {layer: [finite(x) for x in values] for layer, values in run.max_vio.items()},
                "made": None if run.final is None else {"command": run.final.command, **run.final.versions},
            }
            for run in runs
        ],
        "balances": [
            {"name": b.name, "seeds": list(b.seeds), "chance_max_vio": list(b.chance)}
            | {
                number: {"values": list(spread.values), "mean": spread.mean, "sd": spread.sd}
                for number in NUMBERS
                for spread in (getattr(b, number),)
            }
            for b in by_balance(runs)
        ],
    }  # fmt: skip
