"""The CPU suite: every provider at every case, as tables and JSON; targets are judged."""

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import AnyCase, GramCase, cases
from benchmarks.memory import free_bytes
from benchmarks.providers import BY_REQUEST, OURS, PROVIDERS, Provider
from benchmarks.rows import Row, from_json, to_json
from benchmarks.suite import Settings, run_case
from benchmarks.targets import targets
from examples.common.files import write_text

ORDERS, SIZES = [0, 1, 3], [128, 256, 512, 1024]


def main(arguments: Sequence[str], *, gram: bool = False) -> int:
    """Run the suite and write its results; `gram`: the cases of GramLoss instead of rankings."""
    options = parser(gram).parse_args(arguments)
    if options.render:
        machine, rows = from_json(options.render.read_text())
    else:
        settings = Settings(
            threads=options.threads,
            rounds=3 if options.quick else options.rounds,
            seconds=1.0 if options.quick else options.seconds,
            memory_share=options.memory_share,
            compile=not (options.quick or options.no_compile),
        )
        machine = this_machine(settings)
        rows = run(chosen_cases(options, gram), chosen_providers(options.providers, gram), settings)
    write(machine, rows, options)
    return 0


def parser(gram: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [provider.name for provider in (*PROVIDERS, *BY_REQUEST)]
    add = parser.add_argument
    if gram:
        add("--batch", type=_positive, default=GramCase.n, help="images")
        add("--patches", type=_positive, default=GramCase.patches, help="patches of an image")
    else:
        add("--orders", type=int, nargs="+", default=ORDERS, help="orders of the ranking model")
        add("--sizes", type=_positive, nargs="+", help="N=K=M; given, leaves out K=64, M=4096")
    add("--providers", nargs="+", choices=names, metavar="NAME", help=f"among {names}")
    add("--rounds", type=_positive, default=Settings.rounds, help="most rounds of a case")
    add("--seconds", type=float, default=Settings.seconds, help="about the time of a case's rounds")
    add("--threads", type=_positive, default=os.cpu_count() or 1, help="torch threads of each")
    add("--memory-share", type=float, default=0.6, help="of free memory that a provider may need")
    add("--seed", type=int, default=0, help="seed of the inputs")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--quick", action="store_true", help="one tiny size, 3 rounds, no torch.compile")
    add("--render", type=Path, metavar="FILE", help="measure nothing: tables from that JSON")
    for name, text in (("json", "all samples"), ("markdown", "tables"), ("summary", "small table")):
        add(f"--{name}", type=Path, metavar="FILE", help=f"write the {text} there")
    return parser


def chosen_cases(options: argparse.Namespace, gram: bool) -> Sequence[AnyCase]:
    if gram:
        batch, patches = (2, 32) if options.quick else (options.batch, options.patches)
        return [GramCase(batch, patches, seed=options.seed)]
    sizes = options.sizes or ([16] if options.quick else SIZES)
    return cases(options.orders, sizes, not (options.quick or options.sizes), options.seed)


def chosen_providers(names: Sequence[str] | None, gram: bool = False) -> list[Provider]:
    """All providers without a request; GramLoss is compared with its reference alone."""
    if names is None and not gram:
        return list(PROVIDERS)
    return [p for p in (*PROVIDERS, *BY_REQUEST) if p.name in (names or (OURS, "reference"))]


def run(chosen: Sequence[AnyCase], providers: Sequence[Provider], settings: Settings) -> list[Row]:
    """Measure all cases; each one's table is printed as soon as it is there."""
    torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for case in chosen:
        found = run_case(case, providers, settings)
        print(report.timings(found) + "\n", flush=True)
        rows += found
    return rows


def write(machine: dict[str, Any], rows: Sequence[Row], options: argparse.Namespace) -> None:
    machine, rows = from_json(to_json(machine, rows, ()))  # tables of the digits that are written
    verdicts = targets(rows)
    print(report.targets_table(verdicts))
    for file, write in (
        (options.summary, report.summary),
        (options.json, to_json),
        (options.markdown, report.markdown),
    ):
        if file:
            write_text(file, write(machine, rows, verdicts))


def this_machine(settings: Settings) -> dict[str, Any]:
    free = free_bytes()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "free memory GB": None if free is None else round(free / 1e9, 1),
        "load average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
