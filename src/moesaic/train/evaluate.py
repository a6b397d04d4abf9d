"""Has it learnt, and is it balanced: a model judged on the held-out documents of every domain."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moesaic.trace.chance.bands import balance_numbers
from moesaic.trace.statistics.verdict import STARVED
from moesaic.train.counting import counting_loads
from moesaic.train.data import DOMAINS, corpus
from moesaic.train.kneser_ney import KneserNeyBigram
from moesaic.train.packing import token_stream, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
BATCH = 16  # windows in one forward


class DomainResult(NamedTuple):
    """Losses in nats per token on the same held-out tokens; `margin` is what the model gains over Kneser-Ney."""

    tokens: int
    loss: float
    kneser_ney: float

    @property
    def margin(self) -> float:
        return self.kneser_ney - self.loss


class Report(NamedTuple):
    """Loss by domain, and `loads`: by layer and domain, how often each expert was chosen on the held-out text."""

    domains: dict[str, DomainResult]
    loads: dict[str, dict[str, list[int]]]

    @property
    def worst_margin(self) -> float:
        """NaN where one of them is: nothing is worse."""
        return float(np.min([result.margin for result in self.domains.values()]))

    @property
    def loss(self) -> float:
        """Nats per token, the domains in their shares of the training text."""
        return mixed_loss({domain: result.loss for domain, result in self.domains.items()})

    @property
    def max_violation(self) -> dict[str, float]:
        """By layer: the busiest expert's load over the mean, less 1, with the domains in their shares."""
        return {
            layer: float(balance_numbers(mixed(by_domain).sum(0))["max_vio"]) for layer, by_domain in self.loads.items()
        }

    @property
    def unused(self) -> dict[str, int]:
        """By layer: experts that get less than a tenth of their fair share (`STARVED`)."""
        shares = {layer: mixed(by_domain).sum(0) for layer, by_domain in self.loads.items()}
        return {layer: int((share < STARVED * share.mean()).sum()) for layer, share in shares.items()}

    @property
    def specialisation(self) -> dict[str, float]:
        """By layer: what an expert says of its token's domain, the mutual information of the two, in bits."""
        return {layer: mutual_information(mixed(by_domain)) for layer, by_domain in self.loads.items()}


def mixed_loss(by_domain: Mapping[str, float]) -> float:
    """The mean of the domains' losses, each with its share of the training text."""
    return sum(DOMAINS[domain].share * loss for domain, loss in by_domain.items())


def mixed(loads: Mapping[str, Sequence[int]]) -> Float[np.ndarray, "domains E"]:
    """Loads by domain as shares of all assignments, each domain with its share of the training text."""
    counts = np.array([loads[domain] for domain in loads], dtype=float)
    shares = np.array([DOMAINS[domain].share for domain in loads])
    return shares[:, None] * counts / counts.sum(1, keepdims=True)


def mutual_information(joint: Float[np.ndarray, "domains E"]) -> float:
    """Bits that one of two says of the other, from their joint probabilities."""
    apart = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True) / joint.sum()
    some = joint > 0
    return float((joint[some] * np.log2(joint[some] / apart[some])).sum() / joint.sum())


class HeldOut:
    """The held-out windows and what Kneser-Ney makes of them; built once, asked as often as wanted.

    `max_windows` takes that many windows a domain, spread evenly over it; None takes all.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, max_windows: int | None = None) -> None:
        self.windows: dict[str, Int[np.ndarray, "W L"]] = {}
        self.kneser_ney: dict[str, float] = {}
        for domain in DOMAINS:
            rows = windows(token_stream(tokenizer, corpus(domain, "held_out")), WINDOW)
            if max_windows is not None and len(rows) > max_windows:
                rows = rows[np.linspace(0, len(rows) - 1, max_windows).astype(int)]
            bigram = KneserNeyBigram(token_stream(tokenizer, corpus(domain, "train")), len(tokenizer))
            self.windows[domain] = rows
            self.kneser_ney[domain] = float(np.mean([bigram.loss(row) for row in rows]))

    def judge(self, model: nn.Module) -> Report:
        """Loss of every domain and balance of every layer; the model's mode is put back afterwards."""
        was_training = model.training
        model.eval()
        results: dict[str, DomainResult] = {}
        loads: dict[str, dict[str, list[int]]] = {}
        with torch.inference_mode(), counting_loads(model, training=False) as counter:
            for domain, rows in self.windows.items():
                loss = _loss(model, torch.from_numpy(rows))
                results[domain] = DomainResult(rows.shape[0] * (rows.shape[1] - 1), loss, self.kneser_ney[domain])
                for layer, load in counter.take().items():
                    loads.setdefault(layer, {})[domain] = load.long().tolist()
        model.train(was_training)
        return Report(results, loads)


def _loss(model: nn.Module, rows: Int[Tensor, "W L"]) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(BATCH)]
    return sum(losses) / len(rows)
