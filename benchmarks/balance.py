"""The experiment: one model, one text, several ways to balance, three seeds each.

    python benchmarks/balance.py --out runs/balance              # every run that is not finished yet; hours
    python benchmarks/balance.py --out runs/balance --minutes 60 # begin no run after that; call again to go on

A run is `moesaic train tiny --balance B --seed S` in a folder of its own: finished ones are kept, an interrupted one
goes on from its last checkpoint. The records of finished runs lie in benchmarks/balance/, so that table and figure
(`moesaic compare benchmarks/balance/*`) can be made again without training.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from moesaic.train.run_folder import RECORD, finished

RECORDS = Path(__file__).parent / "balance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--balances", default="none,aux,seq,bias,bias-centred")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2600, help="as many as the shipped model had")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    args = parser.parse_args()

    begun = time.monotonic()
    for seed in args.seeds.split(","):
        for balance in args.balances.split(","):
            name = f"{balance}-{seed}"
            folder, record = args.out / name, RECORDS / name / RECORD
            if finished(record.parent) or (time.monotonic() - begun) / 60 > args.minutes:
                continue
            if not finished(folder):
                go_on = ["--resume", folder] if (folder / RECORD).exists() else ["--out", folder, "--seed", seed]
                new = [] if (folder / RECORD).exists() else ["--balance", balance, "--steps", str(args.steps)]
                print(name, flush=True)
                subprocess.run([sys.executable, "-m", "moesaic", "train", "tiny", *map(str, go_on), *new], check=True)
            record.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / RECORD, record)


if __name__ == "__main__":
    main()
