"""Time and memory of GramLoss, blocked against reference: one forward and backward pass.

Both run in fresh processes and are timed in turn. A ratio is blocked over reference in the same
round, with quartiles in brackets; least processor time is the figure a busy machine disturbs
least. Memory is what is alive at the peak beyond the features themselves.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Inputs, square_case
from benchmarks.check import errors
from benchmarks.cpu import machine
from benchmarks.measure import Sample, Spread, paired_ratios, spread
from benchmarks.output import write_whole
from benchmarks.providers import Loss
from benchmarks.suite import Settings
from benchmarks.worker import Checked, Peaks, Worker

IMPLEMENTATIONS = ("blocked", "reference")
PLACEHOLDER = square_case(0, 1)  # a worker's own cases are rankings
MOST_TIME, LEAST_SAVING = 1.2, 4.0  # what is promised of blocked at the default size


@dataclass(frozen=True)
class GramCase:
    batch: int
    patches: int
    student_width: int
    teacher_width: int
    negatives: str
    seed: int = 0

    @property
    def name(self) -> str:
        return (
            f"B={self.batch}, P={self.patches}, widths {self.student_width} and "
            f"{self.teacher_width}, negatives {self.negatives!r}"
        )


@dataclass(frozen=True)
class Measured:
    first: Checked
    samples: list[Sample]
    peaks: Peaks

    def wall(self) -> list[float]:
        return [sample.wall for sample in self.samples]

    def cpu(self) -> list[float]:
        return [sample.cpu for sample in self.samples]


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    case = GramCase(
        options.batch,
        options.patches,
        options.student_width,
        options.teacher_width,
        options.negatives,
    )
    described = machine(Settings(threads=options.threads))
    measured = measure(case, options.rounds, options.threads)
    content = as_json(case, described, measured)
    text = markdown(case, described, measured)
    print(text)
    if options.json:
        write_whole(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if options.markdown:
        write_whole(options.markdown, text)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gram", description=__doc__)
    add = parser.add_argument
    add("--batch", type=int, default=64, help="images")
    add("--patches", type=int, default=1024, help="patches of an image")
    add("--student-width", type=int, default=384)
    add("--teacher-width", type=int, default=768)
    add("--negatives", choices=["keep", "clamp", "clamp_teacher"], default="keep")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=torch.get_num_threads(), help="torch threads of each")
    add("--json", type=Path, metavar="FILE", help="write all samples there")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    return parser


def measure(case: GramCase, rounds: int, threads: int) -> dict[str, Measured]:
    """By implementation.

    Raises:
        ValueError: the implementations disagree; nothing is timed then.
    """
    workers = {impl: Worker(partial(build, case, impl), threads) for impl in IMPLEMENTATIONS}
    try:
        return _measure(workers, rounds)
    finally:
        for worker in workers.values():
            worker.stop()


def build(gram: GramCase, impl: str, case: Case, inputs: Inputs) -> Loss:
    """The loss of seeded features, which take the place of the worker's own leaves."""
    from rankloss import GramLoss

    generator = torch.Generator().manual_seed(gram.seed)
    student, teacher = (
        torch.randn(gram.batch, gram.patches, width, generator=generator)
        for width in (gram.student_width, gram.teacher_width)
    )
    inputs.leaves.clear()
    inputs.leaves["student"] = student.requires_grad_()
    loss = GramLoss(negatives=gram.negatives, impl=impl)  # type: ignore[arg-type]
    return partial(loss, student, teacher)


def _measure(workers: dict[str, Worker], rounds: int) -> dict[str, Measured]:
    def ask(impl: str, request: str, *arguments: object) -> Any:
        return workers[impl].ask(600.0, request, *arguments)

    first: dict[str, Checked] = {impl: ask(impl, "check", PLACEHOLDER) for impl in workers}
    found = errors(first["blocked"].outcome, first["reference"].outcome)
    if not found.acceptable:
        raise ValueError(f"blocked is wrong: relative {found}")
    samples: dict[str, list[Sample]] = {impl: [] for impl in workers}
    for number in range(rounds):
        for impl in list(workers)[:: 1 if number % 2 else -1]:  # each round another goes first
            samples[impl].append(ask(impl, "sample", "step"))
    return {impl: Measured(first[impl], samples[impl], ask(impl, "peaks")) for impl in workers}


# ---------------------------------------------------------------- report


def ratios(measured: dict[str, Measured]) -> dict[str, float | Spread]:
    blocked, reference = measured["blocked"], measured["reference"]
    return {
        "wall": spread(paired_ratios(blocked.wall(), reference.wall())),
        "processor": spread(paired_ratios(blocked.cpu(), reference.cpu())),
        "least wall": min(blocked.wall()) / min(reference.wall()),
        "least processor": min(blocked.cpu()) / min(reference.cpu()),
        "memory saved": reference.peaks.live / blocked.peaks.live,
        "resident memory saved": reference.peaks.resident / blocked.peaks.resident,
    }


def markdown(case: GramCase, described: dict[str, Any], measured: dict[str, Measured]) -> str:
    header = ["", "wall ms", "least wall", "processor ms", "least processor", "peak MB"]
    rows = [header, ["---"] * len(header)]
    for impl, one in measured.items():
        wall, cpu = spread(one.wall()), spread(one.cpu())
        rows.append(
            [
                impl,
                _interval(wall, 1e3, 0),
                f"{1e3 * wall.least:.0f}",
                _interval(cpu, 1e3, 0),
                f"{1e3 * cpu.least:.0f}",
                f"{one.peaks.live / 1e6:.0f}",
            ]
        )
    lines = []
    for name, value in ratios(measured).items():
        text = _interval(value, 1, 2) if isinstance(value, Spread) else f"{value:.2f}"
        lines.append(f"- {name}: {text}")
    parts = [
        f"# Gram loss, {case.name}",
        "; ".join(f"{key} {value}" for key, value in described.items()),
        (__doc__ or "").strip(),
        "\n".join("| " + " | ".join(row) + " |" for row in rows),
        f"Blocked over reference (promised: time at most {MOST_TIME}, memory saved at least "
        f"{LEAST_SAVING:.0f}, at B=64, P=1024):",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"


def _interval(values: Spread, unit: float, digits: int) -> str:
    median, low, high = (unit * x for x in (values.median, values.low, values.high))
    return f"{median:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def as_json(
    case: GramCase, described: dict[str, Any], measured: dict[str, Measured]
) -> dict[str, Any]:
    return {
        "version": 1,
        "machine": described,
        "case": asdict(case),
        "implementations": {
            impl: {
                "first_call_s": one.first.seconds,
                "samples": [asdict(sample) for sample in one.samples],
                "peaks": asdict(one.peaks),
            }
            for impl, one in measured.items()
        },
        "ratios": {
            name: asdict(value) if isinstance(value, Spread) else value
            for name, value in ratios(measured).items()
        },
    }
