"""Compile every kernel for GPUs that need not be here, and print what it takes there.

Registers, spills, shared memory, tensor-core instructions and atomics, read off PTX and machine
code by tools that come with Triton. Exit code 1 when a kernel spills, exceeds its architecture's
shared memory, uses atomics, misses tensor cores it should use, or multiplies sizes in 32 bits.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.aot_binary import SHARED_LIMITS, Resources, compile_and_read
from benchmarks.output import write_whole
from rankloss.kernels.dispatch import OLDEST_TRITON

NEWEST = (3, 9)  # version of Triton this was run with
COLUMNS = ("registers", "spills", "shared", "matrix", "atomics", "narrow")


@dataclass(frozen=True)
class Finding:
    """What one cell takes, or the error its compilation ended with."""

    architecture: str
    name: str
    resources: Resources | None
    faults: tuple[str, ...]
    seconds: float


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):  # then kernels are Python functions: start afresh
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "benchmarks", "aot", *arguments]
        return subprocess.run(command, env=environment).returncode
    reason = why_not_supported()
    if reason is not None:
        print(f"cannot compile ahead of time: {reason}")
        return 1
    return run(options)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="every kernel once on every target")
    size.add_argument("--full", action="store_true", help="all orders, widths and walks: hours")
    add = parser.add_argument
    add("--targets", nargs="+", choices=list(SHARED_LIMITS), default=list(SHARED_LIMITS))
    add("--processes", type=int, default=min(4, os.cpu_count() or 1), help="compile side by side")
    add("--json", type=Path, metavar="FILE", help="write all of it there")
    return parser


def why_not_supported() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if OLDEST_TRITON <= version <= NEWEST:
        return None
    first, last = (".".join(map(str, x)) for x in (OLDEST_TRITON, NEWEST))
    return f"triton {triton.__version__} is outside {first} to {last}, the supported versions"


def run(options: argparse.Namespace) -> int:
    import triton

    from benchmarks.aot_cells import default_grid, full_grid, quick_grid

    grid = quick_grid if options.quick else full_grid if options.full else default_grid
    cells = list(dict.fromkeys(cell for cell in grid() if cell.architecture in options.targets))
    print(f"triton {triton.__version__}, {len(cells)} kernels, {options.processes} processes")
    print(f"{'':60} " + " ".join(f"{column:>9}" for column in COLUMNS))
    findings = []
    start = time.perf_counter()
    for finding in examine_all(cells, options.processes):
        findings.append(finding)
        print(line(finding), flush=True)
        if sys.stderr.isatty():
            done = f"{len(findings)} of {len(cells)}, {time.perf_counter() - start:.0f} s"
            print(done, end="\r", file=sys.stderr, flush=True)
    faulty = [finding for finding in findings if finding.faults]
    print(summary(findings, time.perf_counter() - start))
    if options.json:
        content = {"triton": triton.__version__, "kernels": [asdict(x) for x in findings]}
        write_whole(options.json, json.dumps(content, indent=1) + "\n")
    return 1 if faulty else 0


def examine_all(cells: Sequence[Any], processes: int) -> Iterator[Finding]:
    if processes == 1:
        yield from map(examine, cells)
        return
    context = multiprocessing.get_context("spawn")  # the compiler's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(examine, cells)


def examine(cell: Any) -> Finding:
    from benchmarks.aot_cells import source

    start = time.perf_counter()
    try:
        resources = compile_and_read(source(cell), cell.architecture)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        failed = (f"does not compile: {text[0][:200]}",)
        return Finding(cell.architecture, cell.name, None, failed, time.perf_counter() - start)
    faults = tuple(faults_of(resources, cell.architecture, cell.needs_matrix_units))
    return Finding(cell.architecture, cell.name, resources, faults, time.perf_counter() - start)


def faults_of(found: Resources, architecture: str, needs_matrix_units: bool) -> Iterator[str]:
    limit = SHARED_LIMITS[architecture]
    if found.spills:
        yield f"{found.spills} spills"
    if found.shared > limit:
        yield f"{found.shared} bytes of shared memory, {limit} at most"
    if found.atomics:
        yield f"{found.atomics} atomics"
    if needs_matrix_units and not found.matrix:
        yield "no tensor-core instruction"
    if found.narrow_products:
        yield f"{found.narrow_products} products of sizes in 32 bits"


def line(finding: Finding) -> str:
    head = f"{finding.architecture:7} {finding.name:52} "
    if finding.resources is None:
        return f"{head} FAILED: {finding.faults[0]}"
    numbers = " ".join(f"{value:9}" for value in asdict(finding.resources).values())
    return f"{head} {numbers}" + (f"  FAULT: {', '.join(finding.faults)}" if finding.faults else "")


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """The worst of every architecture."""
    lines = [f"worst of {len(findings)} kernels in {seconds:.0f} s, and shared memory's limit"]
    for architecture in dict.fromkeys(finding.architecture for finding in findings):
        own = [x for x in findings if x.architecture == architecture]
        read = [x.resources for x in own if x.resources]
        if not read:
            continue
        lines.append(
            f"  {architecture:7} registers {max(x.registers for x in read)}, "
            f"spills {max(x.spills for x in read)}, "
            f"shared {max(x.shared for x in read)} of {SHARED_LIMITS[architecture]}, "
            f"atomics {max(x.atomics for x in read)}, faults {sum(bool(x.faults) for x in own)}"
        )
    return "\n".join(lines)
