"""Records of other engines, written as those engines write them, from picks that the test knows."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.config import MoEConfig
from moesaic.trace.imports import READERS, Target

E, K, L = 16, 4, 5  # layer 0 is dense
HF = {
    "model_type": "deepseek_v3", "hidden_size": 8, "n_routed_experts": E, "num_experts_per_tok": K, "n_group": 1,
    "topk_group": 1, "num_hidden_layers": L, "first_k_dense_replace": 1, "moe_intermediate_size": 4,
}  # fmt: skip


SIZES = Target(n_experts=E)
KNOWN = Target(n_experts=E, config=MoEConfig.from_hf(HF), layers=tuple(range(1, L)), model="toy")


def picked(n_tokens: int, seed: int = 0, n_experts: int = E, k: int = K, layers: int = L - 1) -> np.ndarray:
    """Distinct experts, int64 [MoE layers, T, K]."""
    rng = np.random.default_rng(seed)
    return rng.random((layers, n_tokens, n_experts)).argsort(-1)[:, :, :k]


def config_file(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**HF, **changes}))
    return path


def sglang_record(
    picks: np.ndarray, start=0, number=0, rank=0, mode=1, lengths="one", ids=None, positions=None
) -> dict:
    """One forward pass as the recorder keeps it: 8 columns, dense layer 0, -1 where nothing is."""
    layers, n_tokens, k = picks.shape
    topk = torch.full((layers + 1, n_tokens, 8), -1, dtype=torch.int32)
    topk[1:, :, :k] = torch.from_numpy(picks).int()
    return {
        "forward_pass_id": number, "rank": rank, "gatherer_key": "primary",
        "input_ids": list(range(100, 100 + n_tokens)) if ids is None else ids,
        "positions": list(range(start, start + n_tokens)) if positions is None else positions,
        "extend_seq_lens": [n_tokens] if lengths == "one" else lengths, "forward_mode": mode,
        "topk_ids_of_layer": topk, "misc_objects": [],
        "global_physical_count": torch.zeros(layers + 1, E, dtype=torch.int32),
    }  # fmt: skip


def sglang_dump(path: Path, records: list[dict], to_logical: torch.Tensor | None = None) -> Path:
    same = torch.arange(E).expand(L, E).contiguous()
    torch.save({"records": records, "last_physical_to_logical_map": same if to_logical is None else to_logical}, path)
    return path


def vllm_array(picks: np.ndarray, dtype=np.uint8) -> np.ndarray:
    """[tokens, all layers, K], zeros in the dense layer."""
    layers, n_tokens, k = picks.shape
    ids = np.zeros((n_tokens, layers + 1, k), dtype=dtype)
    ids[:, 1:] = picks.transpose(1, 0, 2)
    return ids


def encoded(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def megatron_lines(picks: np.ndarray, step=0, rank=0, first_layer=1, **more) -> list[str]:
    """One call of every router, in the order of the forward."""
    return [
        json.dumps({
            "step": step, "stage": "pre_dispatch", "block": "decoder", "layer": first_layer + index, "rank": rank,
            "num_tokens": len(ids), "topk": ids.shape[1], **more, "top_indices": ids.tolist(),
        })
        for index, ids in enumerate(picks)
    ]  # fmt: skip


def megatron(tmp_path, *calls: list[str], name="router_trace_rank0.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(line for lines in calls for line in lines) + "\n")
    return path


class Canary:
    """Whoever unpickles this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def equal(trace, picks: np.ndarray) -> bool:
    return trace.picks.shape == picks.shape and np.array_equal(trace.picks.numpy(), picks)


def imported(name: str, files: list[Path], target: Target):
    """(trace, what is said about it in English). In Chinese the same is said: every number of one is in the other."""
    trace, notes = READERS[name](files, target)
    for note in notes:
        assert sorted(re.findall(r"\d+", note.en)) == sorted(re.findall(r"\d+", note.zh))
    return trace, tuple(note.en for note in notes)


def refused(name, files, target=KNOWN) -> str:
    """The message of the refusal: one line, of ValueError."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        READERS[name](files, target)
    assert type(error.value) is ValueError, "not one of ours"
    assert "\n" not in str(error.value)
    return str(error.value)


def cases(rows: list[tuple]) -> list:
    """Parameters of a test, each row after the name of its case."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]
