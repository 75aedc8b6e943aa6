"""The CPU suite: every provider at every case, as a table, Markdown and JSON."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import Case, cases
from benchmarks.memory import free_bytes
from benchmarks.output import write_whole
from benchmarks.providers import BY_REQUEST, PROVIDERS, Provider
from benchmarks.suite import CaseResult, Settings, run_case
from benchmarks.summary import summary
from benchmarks.targets import targets

ORDERS = [0, 1, 3]
SIZES = [128, 256, 512, 1024]


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    settings = Settings(
        threads=options.threads,
        rounds=3 if options.quick else options.rounds,
        seconds=1.0 if options.quick else options.seconds,
        memory_share=options.memory_share,
        compile=not (options.quick or options.no_compile),
    )
    sizes = options.sizes or ([16] if options.quick else SIZES)
    wide = not options.quick and options.sizes is None
    chosen = cases(options.orders, sizes, wide, options.seed)
    before = machine(settings)
    results = run(chosen, chosen_providers(options.providers), settings)
    write(results, before, options)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [provider.name for provider in (*PROVIDERS, *BY_REQUEST)]
    add = parser.add_argument
    add("--orders", type=int, nargs="+", default=ORDERS, help="orders of the ranking model")
    add("--sizes", type=_positive, nargs="+", help="N=K=M; given, leaves out K=64, M=4096")
    add("--providers", nargs="+", choices=names, metavar="NAME", help=f"among {names}")
    add("--rounds", type=_positive, default=Settings.rounds, help="most rounds of a case")
    add(
        "--seconds",
        type=float,
        default=Settings.seconds,
        help="about the time for one case's rounds (at least 5)",
    )
    add("--threads", type=_positive, default=os.cpu_count() or 1, help="torch threads of each")
    add("--memory-share", type=float, default=0.6, help="of free memory that a provider may need")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--quick", action="store_true", help="one tiny size, 3 rounds, no torch.compile")
    add("--json", type=Path, metavar="FILE", help="write all samples there")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there")
    add("--summary", type=Path, metavar="FILE", help="write one small table there")
    return parser


def chosen_providers(names: Sequence[str] | None) -> list[Provider]:
    if names is None:
        return list(PROVIDERS)
    return [provider for provider in (*PROVIDERS, *BY_REQUEST) if provider.name in names]


def run(
    chosen: Sequence[Case], providers: Sequence[Provider], settings: Settings
) -> list[CaseResult]:
    """Each case's table is printed as soon as it is measured."""
    torch.set_num_threads(settings.threads)
    results = []
    for case in _with_progress(chosen):
        results.append(run_case(case, providers, settings))
        print(report.terminal(results[-1]) + "\n", flush=True)
    return results


def write(
    results: Sequence[CaseResult], machine: dict[str, Any], options: argparse.Namespace
) -> None:
    verdicts = targets(results)
    print(report.targets_text(verdicts))
    content = report.as_json(machine, results, verdicts)
    if options.summary:
        write_whole(options.summary, summary(content))
    if options.json:
        write_whole(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if options.markdown:
        write_whole(options.markdown, report.markdown(machine, results, verdicts))


def machine(settings: Settings) -> dict[str, Any]:
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


def _with_progress(chosen: Sequence[Case]) -> Iterator[Case]:
    bar: Iterable[Case] = chosen
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(chosen, unit="case", file=sys.stderr)
    yield from bar


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
