"""What recording costs on this machine: time of a forward, and memory of a long record.

python benchmarks/recording.py               # the shipped model and a random Qwen3-MoE, one thread
python benchmarks/recording.py --tokens 1 --forwards 50 [--to FILE]     # of a decoded token
python benchmarks/recording.py --memory      # 100k tokens x 26 layers, K=8, E=256
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--forwards", type=int, default=1, help="in one record")
    parser.add_argument("--to", type=Path, help="a file that records go to")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    import torch

    from moesaic.bench.recording import mid_size_model, recording_cost, recording_memory
    from moesaic.hf.load import load_model

    torch.set_num_threads(1)
    if options.memory:
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:  # a high-water mark each
            for detail in ("ids", "picks"):
                grown = fresh.submit(recording_memory, 100_000, detail=detail).result()
                print(f"{detail:>6}: {grown / 1e6:.0f} MB more for 100,000 tokens x 26 layers")
        return
    for name, model in (("shipped model", load_model()[0]), ("random Qwen3-MoE", mid_size_model())):
        ids = torch.randint(3, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        found = recording_cost(model, ids, rounds=options.rounds, forwards=options.forwards, to=options.to)
        for cost in found:
            seconds = cost.seconds
            print(
                f"{name}, {ids.numel()} tokens, {cost.detail:>12}: median {seconds.median * 1e3:8.2f} ms "
                f"(p10 {seconds.p10 * 1e3:.2f}, p90 {seconds.p90 * 1e3:.2f}), {cost.overhead:+.2%}"
            )


if __name__ == "__main__":
    main()
