"""Correctness, speed and memory on one GPU, in less than nine minutes: gpu.json and gpu.md.

Checks against float64 come first, then what this device can do at most, then every provider at
every case, those with promises first. Each stage has a share of the time; what does not fit is
listed as not measured. `--dry-run` runs the same code on tiny shapes on the CPU, interpreted.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu_stages import Run

SHARES = {"checks": 0.35, "ceilings": 0.03, "cases": 0.62, "tuning": 0.0}
TUNING_SHARES = {"checks": 0.2, "ceilings": 0.03, "cases": 0.42, "tuning": 0.35}
BUDGET = 500.0  # seconds for all stages; one device call more may follow each


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rankloss-gpu-") as caches:
        prepare(caches, dry_run=options.dry_run)
        import torch

        if not options.dry_run and not torch.cuda.is_available():
            print("no GPU here: torch.cuda is not available; --dry-run works without one")
            return 1
        return run(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where gpu.json and gpu.md go")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that it runs")
    add("--tune", action="store_true", help="also try launch configurations at the main shapes")
    add("--budget", type=float, default=BUDGET, help="seconds for everything")
    return parser


def prepare(caches: str, *, dry_run: bool) -> None:
    """Before torch and Triton are imported: first calls compile, and say so in their times."""
    os.environ["TRITON_CACHE_DIR"] = os.path.join(caches, "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(caches, "inductor")
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def run(options: argparse.Namespace) -> int:
    from benchmarks import gpu_stages as stages

    current = stages.Run.start(options.out, dry_run=options.dry_run)
    shares = TUNING_SHARES if options.tune else SHARES
    for name, stage in stages.STAGES.items():
        if shares[name]:
            spent = time.monotonic() - current.started
            later = sum(share for other, share in shares.items() if _not_before(other, name))
            # a stage may have its share of what is left: time saved earlier is not lost
            stage(current, time.monotonic() + (options.budget - spent) * shares[name] / later)
            current.save()
    report(current)
    return 0 if all(check.passed is not False for check in current.record.checks) else 1


def _not_before(name: str, other: str) -> bool:
    order = list(SHARES)
    return order.index(name) >= order.index(other)


def report(current: "Run") -> None:
    from benchmarks.gpu_report import targets
    from benchmarks.report import targets_text

    print(targets_text(targets(current.record, current.sizes)))
    failed = [check for check in current.record.checks if check.passed is False]
    for check in failed:
        print(f"FAILED {check.name}: {check.detail}", file=sys.stderr)
    missing = len(current.record.not_measured)
    print(f"{missing} not measured; wrote {current.folder / 'gpu.json'} and gpu.md")
