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
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_measure import Bench
    from benchmarks.gpu_problems import Sizes

BUDGET = 500.0  # seconds a stage may take
LONGEST = 60.0  # seconds one provider may take at one case, compilation included
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Context:
    bench: "Bench"
    sizes: "Sizes"
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    prepare(options.out, dry_run=options.dry_run)
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: torch.cuda is not available; --dry-run works without one")
        return 1
    failed = False
    for name in options.stage:
        rows = run_stage(name, options)
        failed |= any(row["status"] == "failed" for row in rows)
        write_report(options.out, dry_run=options.dry_run)
    print(f"wrote {options.out / 'gpu.md'}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where results and the cache go")
    add("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), help="all by default")
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that it runs")
    add("--budget", type=float, default=BUDGET, help="seconds a stage may take")
    return parser


def prepare(out: Path, *, dry_run: bool) -> None:
    """Before torch and Triton are imported: where compiled kernels are kept."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out.resolve() / "cache" / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out.resolve() / "cache" / "inductor")
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def run_stage(name: str, options: argparse.Namespace) -> Rows:
    """The stage's rows, from its file when it is done already."""
    import torch

    from benchmarks.gpu_measure import Bench
    from benchmarks.gpu_problems import DRY, REAL
    from benchmarks.output import write_whole

    file = options.out / f"{name}.json"
    if file.exists():
        found: Rows = json.loads(file.read_text())["rows"]
        return found
    bench = Bench(torch.device("cpu" if options.dry_run else "cuda"))
    sizes = DRY if options.dry_run else REAL
    context = Context(bench, sizes, time.monotonic() + options.budget)
    rows = STAGES[name](context)
    content = {"machine": machine(bench), "dry_run": options.dry_run, "rows": rows}
    write_whole(file, json.dumps(content, indent=1) + "\n")
    return rows


def machine(bench: "Bench") -> dict[str, Any]:
    import torch
    import triton

    name = torch.cuda.get_device_name(bench.device) if bench.real else platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **versions}


def attempt(context: Context, name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The call's row, or why there is none."""
    from benchmarks.gpu_measure import OutOfTime, at_most
    from benchmarks.providers import Unavailable, first_line

    row: dict[str, Any] = {"name": name, "status": "ok"}
    try:
        with at_most(min(LONGEST, context.left)):
            row |= call()
    except Unavailable as reason:
        row |= {"status": "unavailable", "detail": str(reason)}
    except OutOfTime as reason:
        row |= {"status": "not measured", "detail": str(reason)}
    except Exception as error:
        row |= {"status": "failed", "detail": first_line(error)}
    context.bench.free()
    print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


# ---------------------------------------------------------------- stages


def compile_stage(context: Context) -> Rows:
    """Compile what later stages launch, on all cores, into the cache that they read."""
    work = [
        (case, name)
        for case in (*context.sizes.checks, *context.sizes.losses)
        if case.order > 1
        for name in ("bfloat16", "float16", "float32")
    ]
    if not context.bench.real:
        return [{"name": "compile", "status": "unavailable", "detail": "interpreted"}]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=spawn) as pool:
        return list(pool.map(warm, work))


def warm(work: tuple[Any, str]) -> dict[str, Any]:
    """Compile every kernel of one case, launching none."""
    import torch

    from rankloss.kernels import high_order
    from rankloss.kernels.configurations import architecture
    from rankloss.kernels.signature import Lists
    from tests.helpers.launches import recorded

    case, name = work
    dtype = getattr(torch, name)
    target = architecture(torch.device("cuda"))
    start = time.perf_counter()
    with recorded(high_order, architecture=target) as launches, torch.device("meta"):
        pairs = case.order * (case.order - 1) // 2
        x = Lists(
            torch.empty(case.n, case.m),
            torch.empty(case.n, case.k, dtype=torch.int64),
            torch.empty(case.n, dtype=torch.int64),
            torch.empty(case.k),
            torch.empty(pairs, case.m, case.r, dtype=dtype),
            torch.empty(case.order - 1, case.m, case.r, dtype=dtype),
        )
        high_order.nll(x)
        high_order.nll_and_gradients(torch.empty(case.n), x)
    for launch in launches:
        arguments = [getattr(x, "dtype", x) for x in launch.arguments.values()]
        launch.kernel.warmup(*arguments, **launch.constants, **launch.options, grid=(1,))
    seconds = round(time.perf_counter() - start, 2)
    return {"name": f"{case.name}, {name}", "status": "ok", "seconds": seconds}


def check_stage(context: Context) -> Rows:
    from benchmarks.gpu_checks import checks

    def verdict(check: Callable[[], Any]) -> dict[str, Any]:
        found = check()
        status = {True: "ok", False: "failed", None: "unavailable"}[found.passed]
        return {"name": found.name, "status": status, "detail": found.detail}

    return [
        attempt(context, f"check {number}", lambda check=check: verdict(check))  # type: ignore[misc]
        for number, check in enumerate(checks(context.bench, context.sizes))
    ]


def kernel_stage(context: Context) -> Rows:
    """Time of every kernel of one step, by the profiler, and its clocks a score."""
    rows: Rows = []
    for case in context.sizes.kernels:
        for dtype in ("bfloat16", "float32") if context.bench.real else ("float32",):
            name = f"{case.name}, {dtype}"
            rows.append(attempt(context, name, lambda c=case, d=dtype: kernel_times(context, c, d)))  # type: ignore[misc]
    return rows


def kernel_times(context: Context, case: Any, dtype: str) -> dict[str, Any]:
    import torch

    from benchmarks.gpu_checks import outcome
    from benchmarks.gpu_problems import make_problem, remaining_scores
    from benchmarks.gpu_providers import build_ours

    problem = make_problem(case, context.bench.device, getattr(torch, dtype))
    loss = build_ours(problem)
    outcome(loss(), problem)  # compiled and warm
    context.bench.wait()
    with torch.profiler.profile() as profile:
        outcome(loss(), problem)
        context.bench.wait()
    times: dict[str, float] = {}
    for event in profile.events() or []:
        if event.name.endswith("_kernel") and event.device_type.name == "CUDA":
            times[event.name] = times.get(event.name, 0.0) + event.device_time
    row: dict[str, Any] = {"microseconds": {k: round(v, 1) for k, v in times.items()}}
    if context.bench.real:
        properties = torch.cuda.get_device_properties(context.bench.device)
        # 128 lanes of every multiprocessor issue in a clock: comparable to slots a score
        clocks = properties.multi_processor_count * 128 * properties.clock_rate * 1e-3
        scores = remaining_scores(case)
        row["slots of time a score"] = {k: round(v * clocks / scores, 2) for k, v in times.items()}
    return row


def loss_stage(context: Context) -> Rows:
    """Steps of this library and of its peers, and what this device can do at most."""
    import torch

    from benchmarks.gpu_kernels import exponentials
    from benchmarks.gpu_measure import copy_rate, exponential_rate, matrix_rate
    from benchmarks.gpu_problems import Ceilings, make_problem
    from benchmarks.gpu_providers import providers
    from benchmarks.providers import OURS

    bench, size = context.bench, context.sizes.ceiling

    def rates() -> dict[str, Any]:
        return asdict(
            Ceilings(
                copy_rate(bench, size),
                matrix_rate(bench, size),
                exponential_rate(bench, exponentials),
            )
        )

    rows = [attempt(context, "ceilings", rates)]
    ceilings = Ceilings(*(rows[0].get(x, 0.0) for x in ("copy", "matrix", "exponentials")))
    dtype = torch.bfloat16 if bench.real else torch.float32
    for case in context.sizes.losses:
        problem = make_problem(case, bench.device, dtype)
        for provider, build in providers(case, compiles=bench.real).items():
            name = f"{case.name}: {provider}"
            row = attempt(
                context,
                name,
                lambda b=build, p=problem, n=provider: step_times(bench, n, b, p, ceilings),  # type: ignore[misc]
            )
            if provider != OURS and row["status"] == "failed":
                row["status"] = "unavailable"  # a peer's failure is not this project's
            rows.append({**row, "case": asdict(case), "provider": provider})
    return rows


def step_times(
    bench: "Bench", name: str, build: Any, problem: Any, ceilings: Any
) -> dict[str, Any]:
    import torch

    from benchmarks.gpu_measure import median
    from benchmarks.gpu_problems import least_seconds
    from benchmarks.gpu_providers import bytes_needed
    from benchmarks.providers import Unavailable

    need, free = bytes_needed(name, problem.case), bench.free_bytes()
    if need > 0.8 * free:
        raise Unavailable(f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    loss, leaves = build(problem), list(problem.leaves.values())

    def step() -> tuple[Any, ...]:
        return torch.autograd.grad(loss(), leaves)

    first = bench.first_call(step)
    seconds = median(bench.samples(step))
    row = {
        "ms": round(1e3 * seconds, 4),
        "first call s": round(first, 2),
        "peak bytes": bench.peak_extra_bytes(step),
        "loss": float(loss().detach()),
    }
    if ceilings.matrix:
        row["share of the limit"] = round(least_seconds(problem.case, ceilings)[1] / seconds, 4)
    return row


STAGES: dict[str, Callable[[Context], Rows]] = {
    "compile": compile_stage,
    "checks": check_stage,
    "kernels": kernel_stage,
    "losses": loss_stage,
}


# ---------------------------------------------------------------- report


def write_report(out: Path, *, dry_run: bool) -> None:
    """gpu.md from the files of all stages that are done."""
    from benchmarks.output import write_whole

    parts = ["# Kernels on a GPU"]
    if dry_run:
        parts.append("**Dry run on a CPU: no number below says anything about speed.**")
    for name in STAGES:
        file = out / f"{name}.json"
        if not file.exists():
            parts.append(f"## {name}\n\nNot run.")
            continue
        content = json.loads(file.read_text())
        made = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        lines = [_line(row) for row in content["rows"]]
        parts.append(f"## {name}\n\n{made}\n\n" + "\n".join(lines))
    parts += ["## Promises\n", *(f"- {line}" for line in promises(out))]
    write_whole(out / "gpu.md", "\n\n".join(parts) + "\n")


def _line(row: dict[str, Any]) -> str:
    rest = {k: v for k, v in row.items() if k not in ("name", "case", "provider", "status")}
    text = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"- {row['name']}: {row['status']}" + (f"; {text}" if text else "")


def promises(out: Path) -> list[str]:
    """Verdicts on the two largest third-order squares; a dry run has none."""
    from benchmarks.providers import OURS

    file = out / "losses.json"
    content: dict[str, Any] = {"dry_run": False, "rows": []}
    if file.exists():
        content = json.loads(file.read_text())
    found = []
    for size in (1024, 4096):
        rows = {
            row["provider"]: row
            for row in content["rows"]
            if row["status"] == "ok" and row.get("case", {}).get("order") == 3
            if row["case"]["n"] == row["case"]["k"] == row["case"]["m"] == size
        }
        ours = rows.get(OURS)
        if ours is None or content["dry_run"]:
            found.append(f"order 3, N=K=M={size}: not measured")
            continue
        share = ours.get("share of the limit", 0.0)
        found.append(f"order 3, N=K=M={size}: {share:.0%} of the limit, at least 50% promised")
        for peer, least in (("FlexAttention", 2), ("naive compiled", 15)):
            if peer in rows:
                ratio = rows[peer]["ms"] / ours["ms"]
                found.append(f"N=K=M={size}: {peer} takes {ratio:.1f}x, at least {least}x promised")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
