"""BiasBalance over two processes. A file of its own, so that each process starts with few imports."""

import warnings

import pytest
import torch
from torch import nn

from moesaic.train.bias_balance import BiasBalance

E, K, T = 6, 2, 20


class Experts(nn.Module):
    def forward(self, _hidden_states, top_k_index, _top_k_weights):
        return top_k_index


class Block(nn.Module):
    """A stand-in MoE layer that hands the ids it is given to its experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Module(), Experts()
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, ids):
        return self.experts(torch.zeros(len(ids), 1), ids, torch.ones(ids.shape))


def one_rank(rank: int, rendezvous: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = Block()
    callback = BiasBalance(speed=0.01)
    callback.on_train_begin(None, None, None, model=model)
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(rank))
    model(ids)
    callback.on_optimizer_step(None, None, None)
    found = {
        "bias": model.gate.e_score_correction_bias.tolist(),
        "load": next(iter(callback.load.values())).tolist(),
        "own": torch.bincount(ids.flatten(), minlength=E).tolist(),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for heard in ({0}, {1}, set(), set()):  # by which ranks
            if rank in heard:
                model(ids)
            callback.on_optimizer_step(None, None, None)
    results[rank] = found | {"told": [str(warning.message) for warning in told]}
    torch.distributed.destroy_process_group()


def test_two_ranks_count_what_both_saw_and_move_alike(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (str(tmp_path / "rendezvous"), results), nprocs=2)
        first, second = (dict(results[rank]) for rank in range(2))
    assert first["own"] != second["own"]
    together = [a + b for a, b in zip(first["own"], second["own"], strict=True)]
    assert first["load"] == second["load"] == together
    mean = 2 * T * K / E
    expected = [0.01 * ((mean > load) - (mean < load)) for load in together]
    assert first["bias"] == second["bias"] == pytest.approx(expected)
    (told,) = first["told"]  # of the first step in which no rank counted a token
    assert second["told"] == [told]
    assert told.startswith("BiasBalance counted no token in step 4:")
