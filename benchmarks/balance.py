"""The experiment: one model, one text, several ways to balance, three seeds each.

    python benchmarks/balance.py --out runs/balance              # every run that is not finished yet; hours
    python benchmarks/balance.py --out runs/balance --minutes 60 # begin no run after that; call again to go on
    python benchmarks/balance.py --out runs/balance --jobs 8     # so many at a time, each on one core

A run is `moesaic train tiny --balance B --seed S` in a folder of its own: finished ones are kept, an interrupted one
goes on from its last checkpoint. The records of finished runs lie in benchmarks/balance/. At the end what `moesaic
compare benchmarks/balance` prints and draws of them is written into docs/*/balance-experiment.md, with --minutes 0
without training.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from moesaic.train.run_folder import RECORD

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "balance"
PAGES = {lang: ROOT / "docs" / lang / "balance-experiment.md" for lang in ("en", "zh")}
BEGIN, END = "<!-- results: written by benchmarks/balance.py, not by hand -->\n", "<!-- end of results -->\n"
SAID = {
    "en": {
        "none": "No run has finished yet.",
        "some": "{done} of {planned} runs have finished. What follows rests on these alone, and is no result yet.",
        "figure": "Loss and MaxVio over the steps, load of every expert, paths of the biases",
    },
    "zh": {
        "none": "还没有一次训练结束。",
        "some": "{planned} 次训练中已结束 {done} 次。下面只依据这几次，还算不上结论。",
        "figure": "损失与 MaxVio 的变化、每个专家的负载、偏置的轨迹",
    },
}
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
        try:
            for done in as_completed(runs):
                done.result()
        except BaseException:  # Ctrl-C too: those that run save what they have, and no other begins
            jobs.shutdown(cancel_futures=True)
            raise
    for lang, page in PAGES.items():
        head, _, rest = page.read_text("utf-8").partition(BEGIN)
        page.write_text(head + BEGIN + results(lang, planned=len(runs)) + END + rest.partition(END)[2], "utf-8")
        if any(RECORDS.glob(f"*/{RECORD}")):
            compare(lang, "--out", page.with_suffix(".png"))


def finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    try:
        return bool(json.loads((folder / RECORD).read_text("utf-8"))["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def results(lang: str, *, planned: int) -> str:
    """The section of the page: what `moesaic compare` prints of the records, and the place of its figure."""
    done = len(list(RECORDS.glob(f"*/{RECORD}")))
    if not done:
        return f"\n{SAID[lang]['none']}\n\n"
    warning = "" if done >= planned else f"{SAID[lang]['some'].format(done=done, planned=planned)}\n\n"
    return f"\n{warning}```\n{compare(lang)}\n```\n\n![{SAID[lang]['figure']}](balance-experiment.png)\n\n"


def compare(lang: str, *options: str | Path) -> str:
    command = [sys.executable, "-m", "moesaic", "compare", RECORDS.relative_to(ROOT), "--lang", lang, *options]
    shown = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "110"},
        capture_output=True,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in shown.stdout.strip("\n").splitlines())


if __name__ == "__main__":
    main()
