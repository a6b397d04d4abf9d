"""From documents to windows of tokens: packed, so that no token is padding."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moesaic.train.data import DOMAINS, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_stream(
    tokenizer: "PreTrainedTokenizerBase", documents: list[Document], *, seed: int | None = None
) -> Int[np.ndarray, " N"]:
    """All documents in one row, an end-of-text token before, between and after them. `seed` shuffles the documents."""
    texts = [document.text for document in documents]
    if seed is not None:
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([end, *(token for row in rows for token in (*row, end))], dtype=np.int64)


def windows(stream: Int[np.ndarray, " N"], length: int, *, offset: int = 0) -> Int[np.ndarray, "W L"]:
    """Windows that overlap by one token: every token but the first is predicted once. A short rest is left out."""
    count = (len(stream) - 1 - offset) // (length - 1)
    starts = offset + np.arange(count) * (length - 1)
    return stream[starts[:, None] + np.arange(length)]


class Mixture(torch.utils.data.Dataset):
    """Training windows, in order: every batch holds each domain in its share (`Domain.share`).

    A domain is walked through in random order without repetition; then again, cut at another offset. The whole order
    follows from `seed`, so a resumed run sees what it would have seen.
    """

    def __init__(
        self, streams: dict[str, Int[np.ndarray, " N"]], *, num_batches: int, batch_size: int, length: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        columns = []
        for domain, stream in streams.items():
            per_batch = round(DOMAINS[domain].share * batch_size)
            assert len(stream) >= 2 * length, "not one window is left at some offsets"
            drawn: list[np.ndarray] = []
            while sum(map(len, drawn)) < num_batches * per_batch:
                drawn.append(rng.permutation(windows(stream, length, offset=int(rng.integers(length)))))
            columns.append(np.concatenate(drawn)[: num_batches * per_batch].reshape(num_batches, per_batch, length))
        self.windows = torch.from_numpy(np.concatenate(columns, axis=1).reshape(-1, length))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}
