"""The GPU command's results: one record of everything, as JSON, Markdown and promises kept."""

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, square_case
from benchmarks.gpu_checks import Check
from benchmarks.gpu_measure import median
from benchmarks.gpu_problems import Ceilings, Sizes, least_seconds
from benchmarks.gpu_providers import COMPILED, FLEX, NAIVE
from benchmarks.output import write_whole
from benchmarks.providers import OURS
from benchmarks.targets import Target

DRY_RUN = "**Dry run on a CPU: no number below says anything about speed.**"
COLUMNS = (
    "provider",
    "forward ms",
    "fwd+bwd ms",
    "on the wall ms",
    "of the limit",
    "time / rankloss",
    "peak MB",
    "first call s",
    "loss",
)


@dataclass
class Measured:
    """One provider at one case; `detail` says why where the status is not "ok"."""

    provider: str
    status: str = "ok"
    detail: str = ""
    first_call: float | None = None
    forward: list[float] = field(default_factory=list)  # seconds
    step: list[float] = field(default_factory=list)
    wall: float | None = None  # seconds of a step with the host's share
    peak: int | None = None  # bytes above the inputs
    loss: float | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok" and bool(self.step)


@dataclass
class CaseRecord:
    case: Case
    peaked: bool
    measured: list[Measured] = field(default_factory=list)
    sort_ms: float | None = None  # making the ranking, which no time above holds

    @property
    def name(self) -> str:
        return self.case.name + (", peaked scores" if self.peaked else "")

    def of(self, provider: str) -> Measured | None:
        return next((m for m in self.measured if m.provider == provider and m.ok), None)


@dataclass
class Record:
    """All of a run; written after every measurement, so that a killed run leaves what it had."""

    machine: dict[str, Any]
    dry_run: bool
    checks: list[Check] = field(default_factory=list)
    ceilings: Ceilings | None = None
    cases: list[CaseRecord] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    seconds: float = 0.0


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["memory GB"] = round(properties.total_memory / 1e9, 1)
        found["CUDA"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    import triton

    found |= {"torch": torch.__version__, "triton": triton.__version__}
    return found | {"python": platform.python_version()}


def write(record: Record, sizes: Sizes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = targets(record, sizes)
    content = {
        "version": 1,
        **asdict(record),
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    write_whole(folder / "gpu.json", json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    write_whole(folder / "gpu.md", markdown(record, verdicts))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- Markdown


def markdown(record: Record, verdicts: Sequence[Target]) -> str:
    parts = ["# GPU benchmarks", *([DRY_RUN] if record.dry_run else [])]
    parts.append("; ".join(f"{key} {value}" for key, value in record.machine.items()))
    if record.ceilings:
        c = record.ceilings
        parts.append(
            f"Measured ceilings: copy {c.copy / 1e12:.2f} TB/s, bf16 matrix product "
            f"{c.matrix / 1e12:.0f} TFLOP/s, exponentials {c.exponentials / 1e12:.2f} T/s."
        )
    parts.append(
        "## Targets\n\n" + _table([["", "target", "measured", "required"], *_rows(verdicts)])
    )
    for case in record.cases:
        rows = [list(COLUMNS), *(_row(m, case, record.ceilings) for m in case.measured)]
        sort = "" if case.sort_ms is None else f"\n\nMaking the ranking: {case.sort_ms:.3g} ms."
        parts.append(f"## {case.name}\n\n{_table(rows)}{sort}")
    if record.tuning:
        header = list(record.tuning[0])
        rows = [header, *([str(row[x]) for x in header] for row in record.tuning)]
        parts.append("## Configurations tried\n\n" + _table(rows))
    rows = [["", "check", "relative errors"]]
    verdict = {True: "passed", False: "FAILED", None: "not made"}
    rows += [[verdict[c.passed], c.name, c.detail] for c in record.checks]
    parts.append("## Correctness\n\n" + _table(rows))
    missing = "\n".join(f"- {x}" for x in record.not_measured) or "Nothing."
    parts.append(f"## Not measured\n\n{missing}\n\n{record.seconds:.0f} s in all.")
    return "\n\n".join(parts) + "\n"


def _rows(verdicts: Sequence[Target]) -> list[list[str]]:
    return [[t.verdict, t.name, t.measured, t.required] for t in verdicts]


def _table(rows: Sequence[Sequence[str]]) -> str:
    width = len(rows[0])
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    lines = [full[0], ["---"] * width, *full[1:]]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines
    )


def _row(m: Measured, case: CaseRecord, ceilings: Ceilings | None) -> list[str]:
    if not m.ok:
        return [m.provider, f"{m.status}: {m.detail}"]
    ours = case.of(OURS)
    step = median(m.step)
    return [
        m.provider,
        f"{median(m.forward) * 1e3:.3g}",
        f"{step * 1e3:.3g}",
        "?" if m.wall is None else f"{m.wall * 1e3:.3g}",
        _share(case.case, m, ceilings),
        "-" if ours is None else f"{step / median(ours.step):.3g}",
        "?" if m.peak is None else f"{m.peak / 1e6:.1f}",
        "?" if m.first_call is None else f"{m.first_call:.1f}",
        "?" if m.loss is None else f"{m.loss:.5f}",
    ]


def _share(case: Case, m: Measured, ceilings: Ceilings | None) -> str:
    share = share_of_limit(case, m, ceilings)
    return "?" if share is None else f"{share[0]:.0%} fwd, {share[1]:.0%} both"


def share_of_limit(
    case: Case, m: Measured, ceilings: Ceilings | None
) -> tuple[float, float] | None:
    """The least time over the measured one, of the forward pass and of both."""
    if ceilings is None:
        return None
    forward, step = least_seconds(case, ceilings)
    return forward / median(m.forward), step / median(m.step)


# ---------------------------------------------------------------- promises


def targets(record: Record, sizes: Sizes) -> list[Target]:
    """Of a dry run, none is met or missed."""
    found: list[Target] = []
    for size in sizes.targets:
        found += _high_order(record, size)
    found.append(_first_order(record, sizes.targets[1]))
    found += _contrastive(record, sizes.pairs[-1])
    if record.dry_run:
        found = [replace(t, measured=f"{t.measured} (dry run)", met=None) for t in found]
    return found


def _find(record: Record, order: int, size: int, peaked: bool = False) -> CaseRecord | None:
    wanted = square_case(order, size)
    found = (case for case in record.cases if case.case == wanted and case.peaked == peaked)
    return next(found, None)


def _high_order(record: Record, size: int) -> Iterator[Target]:
    case = _find(record, 3, size)
    head = f"order 3, N=K=M={size}, forward+backward"
    yield _share_target(record, case, f"{head}: of the dense limit", 0.5)
    for peer, times in ((NAIVE, 40), (COMPILED, 15), (FLEX, 2)):
        yield _ratio(case, f"{head}: {peer}'s time over ours", peer, times)
    most = 6 * size * size * 4
    yield _peak(case, f"order 3, N=K=M={size}: peak extra memory", most, "6 N M floats")
    peaked = _find(record, 3, size, peaked=True)
    yield _share_target(record, peaked, f"{head}, peaked scores: of the dense limit", 1.0)


def _first_order(record: Record, size: int) -> Target:
    name = f"order 1, N=K=M={size}: of copy bandwidth, without the sort"
    return _share_target(record, _find(record, 1, size), name, 0.7)


def _contrastive(record: Record, pairs: int) -> Iterator[Target]:
    case = _find(record, 0, pairs)
    name, required = f"order 0, {pairs} pairs: best alternative's time over ours", "at least 1x"
    ours = case.of(OURS) if case else None
    others = [m for m in case.measured if m.ok and m.provider != OURS] if case else []
    if ours is None or not others:
        yield Target(name, required, "-", None)
    else:
        best = min(others, key=lambda m: median(m.step))
        ratio = median(best.step) / median(ours.step)
        yield Target(name, required, f"{ratio:.2f}x ({best.provider})", ratio >= 1)
    yield _peak(case, f"order 0, {pairs} pairs: peak extra memory", 10**9, "1 GB")


def _share_target(record: Record, case: CaseRecord | None, name: str, least: float) -> Target:
    required = f"at least {least:.0%}" if least < 1 else f"more than {least:.0%}"
    ours = case.of(OURS) if case else None
    share = share_of_limit(case.case, ours, record.ceilings) if case and ours else None
    if share is None:
        return Target(name, required, "-", None)
    return Target(name, required, f"{share[1]:.0%}", share[1] >= least)


def _ratio(case: CaseRecord | None, name: str, peer: str, least: float) -> Target:
    ours, theirs = (case.of(OURS), case.of(peer)) if case else (None, None)
    if ours is None or theirs is None:
        return Target(name, f"at least {least}x", "-", None)
    ratio = median(theirs.step) / median(ours.step)
    return Target(name, f"at least {least}x", f"{ratio:.1f}x", ratio >= least)


def _peak(case: CaseRecord | None, name: str, most: int, words: str) -> Target:
    ours = case.of(OURS) if case else None
    if ours is None or ours.peak is None:
        return Target(name, f"at most {words}", "-", None)
    text = f"{ours.peak / 1e6:.1f} of {most / 1e6:.1f} MB"
    return Target(name, f"at most {words}", text, ours.peak <= most)
