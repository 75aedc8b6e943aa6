"""Compile every kernel for GPUs that need not be here, and count what it costs there.

One row a kernel and target (`benchmarks/compiled/kernels.py` makes them and knows the budgets).
Exit code 1 when a kernel has a fault.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compiled.kernels import (
    Row,
    default_work,
    examine_all,
    faults,
    full_work,
    why_not_supported,
)
from examples.common.files import write_text


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):  # then kernels are Python functions: start afresh
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "benchmarks", "aot", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode
    reason = why_not_supported()
    if reason is not None:
        print(f"cannot compile ahead of time: {reason}")
        return 1
    return run(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="all dtypes, widths and walks: minutes")
    add("--processes", type=int, default=min(4, os.cpu_count() or 1), help="compile side by side")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    return parser


def run(options: argparse.Namespace) -> int:
    work = full_work() if options.full else default_work()
    start, rows, failed = time.perf_counter(), [], 0
    for (cell, name), found in zip(work, examine_all(work, options.processes), strict=True):
        if isinstance(found, str):
            print(f"{cell} {name}: FAILED {found}")
            failed += 1
            continue
        wrong = list(faults(found))
        failed += bool(wrong)
        rows.append(found)
        print(line(found) + (f"  FAULT: {', '.join(wrong)}" if wrong else ""), flush=True)
    print(f"{len(work)} kernels in {time.perf_counter() - start:.0f} s, {failed} with faults")
    if options.json:
        write_text(options.json, json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    return 1 if failed else 0


def line(row: Row) -> str:
    costs = row.slots_per_score, row.exp2_per_score, row.tensor_flops_per_score
    text = " ".join("      -" if x is None else f"{x:7.2f}" for x in costs)
    return (
        f"{row.target:7} {row.kernel:25} {row.dtype} W={row.width:<3} {row.walk:7} {row.tile:>7} "
        f"{row.warps} warps {row.stages} stages {row.registers:4} reg {row.spills:3} spills "
        f"{row.shared:6} B {row.programs:2} programs {text}"
    )
