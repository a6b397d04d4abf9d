"""LoadMonitor over two processes. A file of its own, so that each process starts with few imports."""

from pathlib import Path

import torch
from test_train_ranks import Block, E, K, T

import moesaic as ms
from moesaic.train.monitor.run_log import read_log


def one_rank(rank: int, folder: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, found = Block(), {}
    monitor = ms.LoadMonitor(Path(folder) / f"run-of-{rank}", loads=True).attach(model)
    ids = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        model(ids)
        monitor.step()
    monitor.detach()
    try:
        ms.LoadMonitor(Path(folder) / f"run-of-{rank}").attach(model)
    except ValueError as error:
        found["told"] = str(error)
    monitor = ms.LoadMonitor(Path(folder) / f"run-of-{rank}", resume=True).attach(model)
    found["goes on after"] = monitor.steps
    monitor.detach()
    results[rank] = found | {"own": torch.bincount(ids.flatten(), minlength=E).tolist()}
    torch.distributed.destroy_process_group()


def test_the_first_rank_writes_what_all_counted_and_all_hear_of_what_it_cannot_write(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (str(tmp_path), results), nprocs=2)
        first, second = (dict(results[rank]) for rank in range(2))
    together = [a + b for a, b in zip(first["own"], second["own"], strict=True)]
    steps = read_log(tmp_path / "run-of-0").steps
    assert [line["load"] for line in steps] == [[together]] * 2
    assert [line["tokens"] for line in steps] == [[2 * T]] * 2
    assert not (tmp_path / "run-of-1").exists()
    assert "run-of-0/load.jsonl holds 2 steps of an earlier run" in first["told"]
    assert first["told"] == second["told"]
    assert (first["goes on after"], second["goes on after"]) == (2, 2)
