"""What LoadMonitor, BiasBalance and BalanceLoss cost here: optimizer steps with and without them in turn, one thread.

python benchmarks/monitor.py                       # the shipped model, and a random Qwen3-MoE, 8 layers of 64 experts
python benchmarks/monitor.py --model shipped --rows 10

A share is the median over rounds of a step's CPU time over that of the unwatched step of the same round, less 1. The
steps hold counting and a line of the log; loads are judged every 20 steps only, which is timed by itself.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import moesaic as ms
from moesaic.bench.recording import mid_size_model
from moesaic.bench.timing import Clock, Entrant, interleave, spread
from moesaic.hf.load import load_model
from moesaic.hf.modules import moe_layers
from moesaic.layer.losses import LOSSES
from moesaic.train.monitor.alerts import SUSTAINED, Judge
from moesaic.train.monitor.run_log import read_log

PLAIN = "not watched"
MODELS = {"shipped": lambda: load_model()[0], "qwen3-moe": mid_size_model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--rows", type=int, default=4, help="sequences a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--model", choices=MODELS, action="append", help="both unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.model or MODELS:
        model = MODELS[name]().train()
        size = (options.rows, options.length)
        ids = torch.randint(3, model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            with ExitStack() as stack:
                entrants = entrants_of(model, ids, Path(folder), stack)
                names = [entrant.name for entrant in entrants]
                interleave(entrants, dict.fromkeys(names, 2))  # warm
                seconds = interleave(entrants, dict.fromkeys(names, options.rounds), Clock(time.process_time))
            base = spread(seconds[PLAIN]).median
            print(f"{name}, {ids.numel()} tokens a step, {options.rounds} rounds")
            for entrant in names:
                middle, p10, p90 = (value * 1e3 for value in spread(seconds[entrant])[:3])
                share = median(one / plain for one, plain in zip(seconds[entrant], seconds[PLAIN], strict=True)) - 1
                print(f"{entrant:>24}: median {middle:8.2f} ms (p10 {p10:.2f}, p90 {p90:.2f}), {share:+.2%}")
            judging = judging_seconds(model, ids, Path(folder) / "judged")
            print(f"{'judging':>24}: {judging * 1e3:.2f} ms every {SUSTAINED} steps, {judging / SUSTAINED / base:+.2%}")


def entrants_of(model: Any, ids: torch.Tensor, folder: Path, stack: ExitStack) -> list[Entrant]:
    """The same step: watched by nobody, by a LoadMonitor with and without loads, balanced, and both."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    watchers: list[Any] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for watcher in watchers:
            watcher.step(*([loss] if isinstance(watcher, ms.LoadMonitor) else []))

    def entrant(name: str, *kinds: str) -> Entrant:
        def prepare() -> None:
            stack.close()
            stack.enter_context(attached(model, kinds, folder / name, watchers))

        return Entrant(name, prepare, step)

    several = [entrant(PLAIN), entrant("LoadMonitor", "monitor"), entrant("LoadMonitor, loads=True", "loads")]
    several += [entrant(f"BalanceLoss, {kind}", kind) for kind in ("switch", "sequence", "global_batch")]
    if any("correction_bias" in name for name, _ in model.named_buffers()):
        several += [entrant("BiasBalance", "bias"), entrant("BiasBalance, LoadMonitor", "bias", "monitor")]
    return several


def judging_seconds(model: Any, ids: torch.Tensor, path: Path) -> float:
    """The median of three judgements, of the loads of one forward as if every step had given them."""
    watching = monitor(path, True).attach(model)
    model(input_ids=ids)
    watching.step()
    watching.detach()
    line = read_log(path).steps[0]
    loads = [np.array(load, dtype=float) for load in line["load"]]
    rules = [layer.config for layer in moe_layers(model)]
    judge, took = Judge(dict.fromkeys(map(str, range(len(loads))))), []
    for step in range(1, 3 * SUSTAINED + 1):
        start = time.process_time()
        verdict, _ = judge.add(step, 1, loads, rules, [None] * len(loads))
        took += [time.process_time() - start] if verdict else []
    return median(took)


@contextmanager
def attached(model: Any, kinds: tuple[str, ...], path: Path, watchers: list[Any]) -> Iterator[None]:
    """Watchers on the model inside the block."""
    for kind in kinds:
        if kind in LOSSES:
            new = ms.BalanceLoss(kind, 1e-9)
        else:
            new = ms.BiasBalance(1e-9) if kind == "bias" else monitor(path, kind == "loads")
        watchers.append(new.attach(model))
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.detach()
        watchers.clear()


def monitor(path: Path, loads: bool) -> ms.LoadMonitor:
    """One whose alerts are for the log alone: a batch that is the same every step gives some."""
    return ms.LoadMonitor(path, loads=loads, resume=True, on_alert=lambda _alert: None)


if __name__ == "__main__":
    main()
