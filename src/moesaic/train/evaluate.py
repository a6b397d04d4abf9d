"""Has it learnt, and is it balanced: a model judged on the held-out documents of every domain."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from moesaic.trace.chance.bands import balance_numbers
from moesaic.train.counting import counting_loads
from moesaic.train.data import DOMAINS, corpus
from moesaic.train.kneser_ney import KneserNeyBigram
from moesaic.train.packing import token_stream, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256


class DomainResult(NamedTuple):
    """Losses in nats per token on the same held-out tokens; `margin` is what the model gains over Kneser-Ney."""

    tokens: int
    loss: float
    kneser_ney: float

    @property
    def margin(self) -> float:
        return self.kneser_ney - self.loss


class Report(NamedTuple):
    """`max_violation`: by layer, the busiest expert's load over the mean, less 1; held-out text in the training mix."""

    domains: dict[str, DomainResult]
    max_violation: dict[str, float]

    @property
    def worst_margin(self) -> float:
        return min(result.margin for result in self.domains.values())


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

    def judge(self, model: nn.Module, *, batch_size: int = 16) -> Report:
        """Loss of every domain and balance of every layer; the model's mode is put back afterwards."""
        was_training = model.training
        model.eval()
        results, mixed = {}, {}
        with torch.inference_mode(), counting_loads(model, training=False) as counter:
            for domain, rows in self.windows.items():
                loss = _loss(model, torch.from_numpy(rows), batch_size)
                results[domain] = DomainResult(rows.shape[0] * (rows.shape[1] - 1), loss, self.kneser_ney[domain])
                for layer, load in counter.take().items():
                    mixed[layer] = mixed.get(layer, 0) + DOMAINS[domain].share * load / load.sum()
        model.train(was_training)
        violations = {layer: float(balance_numbers(load.cpu().numpy())["max_vio"]) for layer, load in mixed.items()}
        return Report(results, violations)


def _loss(model: nn.Module, rows: Int[Tensor, "W L"], batch_size: int) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(batch_size)]
    return sum(losses) / len(rows)
