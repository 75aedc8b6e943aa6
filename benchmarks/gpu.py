"""Correctness, speed and memory on one GPU, stage by stage: compile, checks, kernels, losses.

Each stage writes DIR/<stage>.json and ends within its budget; a stage that is done is not run
again (remove its file to repeat it), so that a run cut short goes on where it stopped. Compiled
kernels are kept in DIR/cache. DIR/gpu.md is made anew from all files after every stage.
`--dry-run` runs the same code on tiny shapes on the CPU, interpreted.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import report
from benchmarks.cases import Case, square_case
from benchmarks.check import CHECK_SCORES
from benchmarks.cpu import this_machine
from benchmarks.measure import spread
from benchmarks.providers import GPU_PROVIDERS, OURS, first_line
from benchmarks.rows import Row, from_json, to_json
from benchmarks.suite import Contender, Settings, check, contend, run_case
from benchmarks.targets import gpu_targets
from benchmarks.worker import Inline, Worker
from examples.common.files import write_text
from examples.common.reports import rounded

if TYPE_CHECKING:
    from benchmarks.device import Ceilings, Device

BUDGET = 500.0  # seconds a stage may take
LONGEST = 60.0  # seconds one provider may take for one answer, compilation included
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    """Shapes by use, so that a dry run is the same code on small ones."""

    checks: tuple[Case, ...]
    kernels: tuple[Case, ...]  # timed kernel by kernel
    losses: tuple[Case, ...]  # timed against peers
    side: int  # of the measured matrix product


REAL = Sizes(
    checks=(
        *(Case(order, 256, 256, 256) for order in (3, 1, 2, 4)),
        Case(3, 256, 64, 1024),
        Case(3, 65, 333, 500),
        Case(3, 128, 10, 1000),
        Case(5, 64, 300, 300, r=128),
        square_case(0, 256),
    ),
    kernels=(square_case(3, 1024), square_case(3, 4096), Case(3, 512, 256, 4096)),
    losses=(
        *(square_case(3, size) for size in (1024, 4096, 512)),
        Case(3, 512, 256, 4096),
        square_case(1, 4096),
        square_case(0, 4096),
        square_case(0, 65536),
    ),
    side=8192,
)
DRY = Sizes(  # the interpreter takes a second for four anchors
    checks=(Case(3, 2, 3, 24), Case(1, 2, 3, 3), Case(4, 2, 8, 8), square_case(0, 64)),
    kernels=(square_case(3, 3),),
    losses=(Case(3, 2, 3, 24), square_case(1, 3), square_case(0, 16)),
    side=64,
)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: torch.cuda is not available; --dry-run works without one")
        return 1
    prepare(options.out, dry_run=options.dry_run)
    rows = [row for name in options.stage for row in run_stage(name, options)]
    print(f"wrote {options.out / 'gpu.md'}")
    return int(any(row.provider == OURS and row.status in ("failed", "wrong") for row in rows))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results and the cache go")
    add("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="all by default")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that it runs")
    add("--budget", type=float, default=BUDGET, help="seconds a stage may take")
    return parser


def prepare(out: Path, *, dry_run: bool) -> None:
    """Before Triton is imported, here and in workers: where compiled kernels are kept."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out.resolve() / "cache" / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out.resolve() / "cache" / "inductor")
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def run_stage(name: str, options: argparse.Namespace) -> list[Row]:
    """The stage's rows, from its file when it is done already."""
    from benchmarks.device import Device, DeviceSession

    file = options.out / f"{name}.json"
    if file.exists():
        return from_json(file.read_text())[1]
    device = Device("cpu" if options.dry_run else "cuda")
    settings = Settings(
        threads=torch.get_num_threads(),
        rounds=1 if options.dry_run else 10,
        seconds=0.0 if options.dry_run else 10.0,
        memory_share=0.8,
        timeout=LONGEST,
        deadline=time.monotonic() + options.budget,
        compile=device.real,
        device=device.name,
        session=DeviceSession,
        worker=Worker if device.real else Inline,
        free_bytes=device.free_bytes,
    )
    rows = []
    for row in STAGES[name](device, DRY if options.dry_run else REAL, settings):
        print(f"  {row.case}, {row.provider}: {_outcome(row)}", flush=True)
        rows.append(row)
    machine = {**this_machine(settings), "device": device.description, "dry run": options.dry_run}
    write_text(file, to_json(machine, rows, ()))
    write_text(options.out / "gpu.md", markdown(options.out))
    return rows


# ---------------------------------------------------------------- stages


def compile_stage(device: "Device", sizes: Sizes, settings: Settings) -> Iterator[Row]:
    """Compile what later stages launch, on all cores, into the cache that they read."""
    checked = [case.with_at_most(CHECK_SCORES) for case in sizes.losses]
    work = [
        replace(case, dtype=dtype)
        for case in (*sizes.checks, *checked, *sizes.losses)
        if case.order > 1
        for dtype in (*HALVES, torch.float32)
    ]
    if not device.real:
        yield Row("compile", "all", 0, OURS, "skipped", "interpreted")
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=spawn) as pool:
        yield from pool.map(warm, dict.fromkeys(work))


def warm(case: Case) -> Row:
    """Compile every kernel of one case, launching none."""
    from benchmarks.compiled.launches import lists, recorded
    from rankloss.kernels import high_order
    from rankloss.kernels.configurations import architecture

    row, start = Row("compile", case.name, case.scores, OURS), time.perf_counter()
    target = architecture(torch.device("cuda"))
    try:
        with recorded(high_order, architecture=target) as launches, torch.device("meta"):
            x = lists(case.n, case.k, case.m, case.order, case.r, case.dtype)
            high_order.nll(x)
            high_order.nll_and_gradients(torch.empty(case.n), x)
        for launch in launches:
            arguments = [getattr(x, "dtype", x) for x in launch.arguments.values()]
            launch.kernel.warmup(*arguments, **launch.constants, **launch.options, grid=(1,))
    except Exception as error:
        row.give_up("failed", first_line(error))
    row.first_call_s = time.perf_counter() - start
    return row


def check_stage(device: "Device", sizes: Sizes, settings: Settings) -> Iterator[Row]:
    """Values and all gradients against float64; bits that repeat; a graph captured, replayed."""
    # the interpreter has no bfloat16 arithmetic
    halves = HALVES if device.real else ()
    for case in sizes.checks:
        for dtype in (*halves, torch.float32) if case.order > 1 else (torch.float32,):
            yield from _of_ours(replace(case, dtype=dtype), settings, lambda x, c: check([x], c))
    first = replace(sizes.checks[0], dtype=(*halves, torch.float32)[0])

    def repeat(contender: Contender, case: Case) -> None:
        if contender.ask("repeats", case, 5 if device.real else 2) is False:
            contender.row.give_up("wrong", "runs differ")

    def replay(contender: Contender, case: Case) -> None:
        if not device.real:
            contender.row.give_up("skipped", "needs a GPU")
        elif contender.ask("replays", case, replace(case, seed=1)) is False:
            contender.row.give_up("wrong", "the replay differs")

    yield from _of_ours(first, settings, repeat, "runs repeat bit for bit: ")
    yield from _of_ours(first, settings, replay, "CUDA graph capture and replay: ")


def kernel_stage(device: "Device", sizes: Sizes, settings: Settings) -> Iterator[Row]:
    """Time of every kernel of one step, and its clocks a score beside the slots counted."""

    def measure(contender: Contender, case: Case) -> None:
        times = contender.ask("kernels", case)
        if times is None:
            return
        figures = {"microseconds": times}
        if device.real:
            clocks = device.lane_clocks_per_second * 1e-6 / case.remaining_scores
            figures["clocks a score"] = {name: clocks * time for name, time in times.items()}
            figures["slots a score, counted"] = counted_slots(case)
        contender.row.figures = figures

    for case in sizes.kernels:
        for dtype in (torch.bfloat16, torch.float32) if device.real else (torch.float32,):
            yield from _of_ours(replace(case, dtype=dtype), settings, measure)


def counted_slots(case: Case, target: str | None = None) -> dict[str, float | str]:
    """Slots a score of the streaming passes' interior loops, or why they cannot be counted."""
    from benchmarks.compiled.kernels import DTYPES, PASSES_OF_LISTS, Cell, examine
    from rankloss.kernels.configurations import architecture

    name = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    target = target or architecture(torch.device("cuda"))
    cell = Cell(target, name, case.order, case.r, "ranked" if case.k == case.m else "natural")
    try:
        rows = [examine((cell, x)) for x in PASSES_OF_LISTS]
    except Exception as error:
        return {"none": first_line(error)}
    return {row.kernel: row.slots_per_score or 0.0 for row in rows}


def loss_stage(device: "Device", sizes: Sizes, settings: Settings) -> Iterator[Row]:
    """Steps of this library and of its peers, beside what this device can do at most."""
    from benchmarks.device import ceilings

    limits = ceilings(device, sizes.side)
    yield Row("ceilings", "rates a second", 0, "the device", figures=asdict(limits))
    device.free()
    for case in sizes.losses:
        dtype = torch.bfloat16 if device.real and case.order != 1 else torch.float32
        case = replace(case, dtype=dtype, presorted=True)
        for row in run_case(case, GPU_PROVIDERS, settings):
            if device.real and row.ok:
                row.figures = {"share of the limit": _share(case, row, limits)}
            yield row


def _share(case: Case, row: Row, limits: "Ceilings") -> float:
    from benchmarks.device import least_seconds

    return 1e3 * least_seconds(case, limits)[1] / spread(row.step).median


def _of_ours(
    case: Case, settings: Settings, ask: Callable[[Contender, Case], None], prefix: str = ""
) -> list[Row]:
    """The row of this library at one case, once a worker was asked."""
    case = replace(case, presorted=True)
    rows, contenders = contend(case, GPU_PROVIDERS[:1], settings)
    for contender in contenders:
        contender.row.case = prefix + case.name
        try:
            ask(contender, case)
        finally:
            contender.worker.stop()
    return rows


STAGES: dict[str, Callable[["Device", Sizes, Settings], Iterator[Row]]] = {
    "compile": compile_stage,
    "checks": check_stage,
    "kernels": kernel_stage,
    "losses": loss_stage,
}


# ---------------------------------------------------------------- report


def markdown(out: Path) -> str:
    """A page from the files of all stages that are done."""
    parts, measured = ["# Kernels on a GPU"], list[Row]()
    for name in STAGES:
        file = out / f"{name}.json"
        if not file.exists():
            parts += [f"## {name}", "Not run."]
            continue
        machine, rows = from_json(file.read_text())
        dry = "**Dry run on a CPU: no number below says anything about speed.** "
        about = "; ".join(f"{key} {value}" for key, value in machine.items())
        parts += [f"## {name}", dry * machine["dry run"] + about]
        if name == "losses":
            measured = [] if machine["dry run"] else rows
            parts.append(report.timings([row for row in rows if row.step or not row.ok]))
        parts.append("\n".join(f"- {x.case}, {x.provider}: {_outcome(x)}" for x in rows))
    return "\n\n".join([*parts, report.targets_table(gpu_targets(measured))]) + "\n"


def _outcome(row: Row) -> str:
    """Status, and the figures that are not times of the loss."""
    figures = {
        "relative errors": [x for x in (row.value_error, row.gradient_error) if x is not None],
        "first call s": row.first_call_s,
        **row.figures,
    }
    told = (
        f"{name} {json.dumps(rounded(x, 3))}" for name, x in figures.items() if x not in (None, [])
    )
    return "; ".join([f"{row.status} {row.detail}".strip(), *told])
