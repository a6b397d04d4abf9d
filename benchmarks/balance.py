"""The experiment: one model, one text, several ways to balance, three seeds each.

    python benchmarks/balance.py --out runs/balance              # every run that is not finished yet; hours
    python benchmarks/balance.py --out runs/balance --minutes 60 # begin no run after that; call again to go on
    python benchmarks/balance.py --out runs/balance --jobs 8     # so many at a time, each on one core

A run is `moesaic train tiny --balance B --seed S` in a folder of its own: finished ones are kept, an interrupted one
goes on from its last checkpoint. The records of finished runs lie in benchmarks/balance/, so that table and figure
(`moesaic compare benchmarks/balance/*`) can be made again without training.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moesaic.train.run_folder import RECORD, finished

RECORDS = Path(__file__).parent / "balance"
# glibc gives large blocks back and faults them in again at every step: 19.9 s for 30 steps, 17.3 s with these
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**28)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--balances", default="none,aux,seq,bias,bias-centred")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2600, help="as many as the shipped model had")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()

    begun = time.monotonic()

    def run(balance: str, seed: str) -> None:
        name = f"{balance}-{seed}"
        folder, record = args.out / name, RECORDS / name / RECORD
        if finished(record.parent) or (time.monotonic() - begun) / 60 > args.minutes:
            return
        if not finished(folder):
            go_on = ["--resume", folder] if (folder / RECORD).exists() else ["--out", folder, "--seed", seed]
            new = [] if (folder / RECORD).exists() else ["--balance", balance, "--steps", str(args.steps)]
            print(name, flush=True)
            command = [sys.executable, "-m", "moesaic", "train", "tiny", *map(str, go_on), *new]
            subprocess.run(command, check=True, env=os.environ | KEEP_PAGES)
        record.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / RECORD, record)

    with ThreadPoolExecutor(args.jobs) as jobs:
        runs = [
            jobs.submit(run, balance, seed) for seed in args.seeds.split(",") for balance in args.balances.split(",")
        ]
    for done in runs:
        done.result()


if __name__ == "__main__":
    main()
