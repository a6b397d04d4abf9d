"""The GPU engine beside its peers, in one run with a time budget.

    python benchmarks/gpu.py --out results --minutes 9     # again with the same --out: goes on where it ended
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke    # tiny, on a CPU: does everything work?

Correctness against float64 first, then the ladder shape, decode, the router, other sizes and shapes, memory; the most
important first. Needs torch with CUDA and triton; Liger is measured where it is installed
(pip install --no-deps liger-kernel==0.8.5). In --out: journal.jsonl (a line for every cell as soon as it is measured),
report.json, report.md.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    options = parsed()
    import torch

    if options.smoke:
        torch.set_num_threads(1)
        if os.environ.get("TRITON_INTERPRET") != "1":
            return refuse("--smoke interprets the kernels: set TRITON_INTERPRET=1 before it starts")
    elif not torch.cuda.is_available():
        return refuse("no CUDA device: nothing can be measured here; TRITON_INTERPRET=1 and --smoke try the code")
    try:
        return measure(options)
    except ValueError as error:
        return refuse(str(error))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the journal and the reports")
    parser.add_argument("--minutes", type=float, default=9.0, help="after these no cell is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny cells on the CPU, kernels interpreted")
    parser.add_argument("--only", default="", help="cells whose key contains this, as in 'decode' or 'T=32768'")
    parser.add_argument("--rounds", type=int, help="rounds of every cell; what suits its time unless given")
    parser.add_argument("--commit", help="where the sources are no checkout, the commit they are of")
    options = parser.parse_args()
    if options.out is None and not options.smoke:
        parser.error("give --out: what an interrupted run has measured would be lost")
    return options


def measure(options: argparse.Namespace) -> int:
    from moesaic.bench.gpu.campaign import GpuCampaign, gpu_machine, measured_in, open_journal
    from moesaic.bench.gpu.cells import cells, smoke_cells
    from moesaic.bench.gpu.clock import CudaClock
    from moesaic.bench.gpu.judge import DeviceLost
    from moesaic.bench.timing import Clock

    out = options.out or Path(tempfile.mkdtemp(prefix="moesaic-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock() if options.smoke else CudaClock()
    machine = gpu_machine(clock, smoke=options.smoke, command=command(), named_commit=options.commit)
    journal = open_journal(out, machine)
    rounds = options.rounds or (1 if options.smoke else None)
    every = smoke_cells() if options.smoke else cells(liger=find_spec("liger_kernel") is not None)
    wanted = [cell for cell in every if options.only in cell.key]
    if not wanted:
        raise ValueError(f"--only {options.only!r} names no cell")
    campaign = GpuCampaign(journal, clock, 60 * options.minutes, rounds)
    lost = ""
    try:
        left_out = campaign.run(wanted, lambda line: (print(line, flush=True), write(out, journal, ())))
    except DeviceLost as error:
        lost, left_out = str(error), []
    write(out, journal, left_out)
    tell(out, journal, left_out)
    if lost:
        cell = measured_in(journal)[-1].cell.key
        print(
            f"the device was lost ({lost}): run the same command again, it goes on with the next cell; which kernel it "
            f'was, CUDA_LAUNCH_BLOCKING=1 says with --only "{cell}" and another --out'
        )
        return 3
    return 1 if any_wrong(journal) else 0


def any_wrong(journal) -> bool:
    """Ours, in one of its ways, in a cell that was measured."""
    from moesaic.bench.gpu.campaign import measured_in
    from moesaic.bench.gpu.cells import INVARIANT

    for result in measured_in(journal):
        ours = [row.note for row in result.rows if row.kind == "ours" or row.name == INVARIANT]
        if any(note.startswith(("wrong", "failed", "no graph")) for note in ours):
            return True
    return False


def write(out: Path, journal, left_out: Iterable) -> None:
    from moesaic.bench.gpu.campaign import measured_in
    from moesaic.bench.gpu.report import markdown, target_table

    report = {
        "machine": journal.machine,
        "ceilings": journal.ceilings,
        "cells": [line for line in journal.lines if line["kind"] == "cell"],
        "targets": target_table(measured_in(journal)),
        "left_out": [cell.key for cell in left_out],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / "report.md").write_text(markdown(journal, list(left_out)), encoding="utf-8")


def tell(out: Path, journal, left_out: list) -> None:
    """A short table last: of a remote run only the end of the output may be seen."""
    from moesaic.bench.gpu.report import short

    print(f"\n{short(journal)}\n")
    if left_out:
        print(f"cells not measured: {len(left_out)}; the same command goes on with them")
    print(f"everybody's numbers: {out / 'report.md'}")


def command() -> str:
    """Without what only says where and how long."""
    kept, words = ["python", "benchmarks/gpu.py"], iter(sys.argv[1:])
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--out", "--minutes", "--commit"):
            if not value:
                next(words, "")
        else:
            kept.append(word)
    return shlex.join(kept)


def refuse(message: str) -> int:
    print(f"gpu.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
