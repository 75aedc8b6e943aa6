"""The stages of the GPU command; each stops at its deadline and says what it left out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.gpu_checks import Check, checks
from benchmarks.gpu_kernels import exponentials
from benchmarks.gpu_measure import (
    Bench,
    OutOfTime,
    at_most,
    copy_rate,
    exponential_rate,
    matrix_rate,
    median,
)
from benchmarks.gpu_problems import DRY, REAL, Ceilings, Problem, Sizes, make_problem
from benchmarks.gpu_providers import FAST, SLOW, Build, build_ours, bytes_needed, providers
from benchmarks.gpu_report import CaseRecord, Measured, Record, machine, write
from benchmarks.providers import Unavailable, first_line
from rankloss import rankings
from rankloss.kernels.configurations import Configuration, configuration, using

LONGEST = 60.0  # seconds one provider may take at one case, compilation included
MEMORY_SHARE = 0.8  # of free memory one provider may be expected to need


@dataclass
class Run:
    bench: Bench
    sizes: Sizes
    dtype: torch.dtype  # of tables and features
    record: Record
    folder: Path
    started: float

    @classmethod
    def start(cls, folder: Path, *, dry_run: bool) -> "Run":
        device = torch.device("cpu" if dry_run else "cuda")
        record = Record(machine(device) | {"date": time.strftime("%Y-%m-%d")}, dry_run)
        # the interpreter has no bfloat16 arithmetic
        sizes, dtype = (DRY, torch.float32) if dry_run else (REAL, torch.bfloat16)
        return cls(Bench(device), sizes, dtype, record, folder, time.monotonic())

    def save(self) -> None:
        self.record.seconds = time.monotonic() - self.started
        write(self.record, self.sizes, self.folder)

    def leave_out(self, what: str) -> None:
        self.record.not_measured.append(what)
        print(f"  not measured: {what}", flush=True)


Stage = Callable[[Run, float], None]


def check_stage(run: Run, deadline: float) -> None:
    for number, check in enumerate(checks(run.bench, run.sizes)):
        if time.monotonic() >= deadline:
            run.leave_out(f"correctness checks from number {number + 1} on: the stage's time is up")
            return
        try:
            with at_most(min(LONGEST, deadline - time.monotonic())):
                result = check()
        except OutOfTime as reason:
            run.leave_out(f"correctness check {number + 1}: {reason}")
            continue
        except Exception as error:
            result = Check(f"correctness check {number + 1}", False, first_line(error))
        run.record.checks.append(result)
        verdict = {True: "ok", False: "FAILED", None: "not made"}[result.passed]
        print(f"  {verdict}: {result.name}; {result.detail}", flush=True)
        run.bench.free()
        run.save()


def ceiling_stage(run: Run, deadline: float) -> None:
    bench, size = run.bench, run.sizes.ceiling
    try:
        with at_most(deadline - time.monotonic()):
            run.record.ceilings = Ceilings(
                copy_rate(bench, size),
                matrix_rate(bench, size),
                exponential_rate(bench, exponentials),
            )
    except (OutOfTime, RuntimeError) as error:
        run.leave_out(f"ceilings: {first_line(error)}")
    bench.free()
    print(f"  {run.record.ceilings}", flush=True)


def case_stage(run: Run, deadline: float) -> None:
    """Cases with promises first; then the others, without and with providers slow to compile."""
    promised, others = run.sizes.promised(), run.sizes.others()
    passes = [(promised, FAST + SLOW), (others, FAST), (others, SLOW)]
    records: dict[tuple[Case, bool], CaseRecord] = {}
    for cases, names in passes:
        for case, peaked in cases:
            chosen = {
                name: build
                for name, build in providers(case, compiles=run.bench.real).items()
                if name in names
            }
            done = records.setdefault((case, peaked), CaseRecord(case, peaked))
            if time.monotonic() >= deadline:
                run.leave_out(f"{done.name}, {', '.join(chosen)}: the stage's time is up")
            elif chosen:
                if done not in run.record.cases:
                    run.record.cases.append(done)
                _measure_case(run, done, chosen, deadline)


def _measure_case(run: Run, done: CaseRecord, chosen: dict[str, Build], deadline: float) -> None:
    print(f"{done.name}", flush=True)
    problem = make_problem(done.case, run.bench.device, run.dtype, peaked=done.peaked)
    if problem.ranking is not None and done.sort_ms is None:
        sort = partial(rankings, problem.leaves["scores"].detach(), done.case.k)
        done.sort_ms = 1e3 * median(run.bench.samples(sort))
    for name, build in chosen.items():
        measured = measure(run, name, build, problem, deadline)
        done.measured.append(measured)
        if measured.status == "not measured":
            run.leave_out(f"{done.name}, {name}: {measured.detail}")
        elif measured.ok:
            print(f"  {name}: {median(measured.step) * 1e3:.3g} ms", flush=True)
        else:
            print(f"  {name}: {measured.status}, {measured.detail}", flush=True)
        run.save()
    del problem
    run.bench.free()


def measure(run: Run, name: str, build: Build, problem: Problem, deadline: float) -> Measured:
    result, bench = Measured(name), run.bench
    need, free = bytes_needed(name, problem.case), bench.free_bytes()
    try:
        if need > MEMORY_SHARE * free:
            raise Unavailable(f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        with at_most(min(LONGEST, deadline - time.monotonic())):
            _measure(bench, build, problem, result)
    except Unavailable as reason:
        result.status, result.detail = "unavailable", str(reason)
    except OutOfTime as reason:
        result.status, result.detail = "not measured", str(reason)
    except Exception as error:
        result.status, result.detail = "failed", first_line(error)
    bench.free()
    return result


def _measure(bench: Bench, build: Build, problem: Problem, result: Measured) -> None:
    loss = build(problem)
    leaves = list(problem.leaves.values())

    value = torch.empty(0)

    def step() -> tuple[Tensor, ...]:
        nonlocal value
        value = loss()
        return torch.autograd.grad(value, leaves)

    result.first_call = bench.first_call(step)
    result.loss = float(value.detach())
    result.forward = bench.samples(loss)
    result.step = bench.samples(step)
    result.wall = bench.wall_seconds(step) if bench.real else None
    result.peak = bench.peak_extra_bytes(step)


# ---------------------------------------------------------------- tuning


def candidates(base: Configuration, *, few: bool) -> list[Configuration]:
    """The table's entry and its neighbours."""
    shapes = [(64, 64), (128, 64), (64, 128), (128, 128), (64, 32), (32, 64)]
    warps = [(4, 4), (8, 8), (4, 8)]
    found = [base]
    for places, columns in shapes:
        for forward, backward in warps:
            found.append(
                replace(
                    base,
                    places=places,
                    candidates=columns,
                    forward_warps=forward,
                    backward_warps=backward,
                )
            )
    found += [replace(base, stages=stages) for stages in (1, 3)]
    return list(dict.fromkeys(found))[: 2 if few else None]


def tuning_stage(run: Run, deadline: float) -> None:
    """One line for each shape and configuration, the fastest step of a shape marked."""
    few_places = [(case, peaked) for case, peaked in run.sizes.others() if case.k < case.m]
    main = [entry for entry in run.sizes.promised() + few_places if entry[0].order == 3]
    if run.record.dry_run:
        main = main[:1]
    for case, peaked in main:
        name = CaseRecord(case, peaked).name
        problem = make_problem(case, run.bench.device, run.dtype, peaked=peaked)
        base = configuration(run.bench.device, run.dtype, case.k)
        rows: list[dict[str, Any]] = []
        for config in candidates(base, few=run.record.dry_run):
            if time.monotonic() >= deadline:
                run.leave_out(f"tuning of {name} from {config} on: the stage's time is up")
                break
            with using(config):
                measured = measure(run, "tuning", build_ours, problem, deadline)
            rows.append(_tuning_row(name, config, measured))
        done = [row for row in rows if row["step ms"] is not None]
        if done:
            best = min(done, key=lambda row: float(row["step ms"]))
            best["best"] = "yes"
            print(f"  best for {name}: {best}", flush=True)
        run.record.tuning += rows
        run.save()


def _tuning_row(name: str, config: Configuration, measured: Measured) -> dict[str, Any]:
    times = (1e3 * median(x) if measured.ok else None for x in (measured.forward, measured.step))
    forward, step = times
    return {
        "case": name,
        "tile": f"{config.places}x{config.candidates}",
        "warps": f"{config.forward_warps}, {config.backward_warps}",
        "stages": config.stages,
        "columns": config.columns,
        "forward ms": forward,
        "step ms": step,
        "best": "",
        "detail": measured.detail,
    }


STAGES: dict[str, Stage] = {
    "checks": check_stage,
    "ceilings": ceiling_stage,
    "cases": case_stage,
    "tuning": tuning_stage,
}
