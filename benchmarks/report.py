"""Results as a terminal table, Markdown and JSON.

Times are milliseconds, memory is MB (1e6 bytes). A ratio is a provider's time over rankloss's in
the same round, so above 1 rankloss is faster; quartiles over the rounds stand in brackets.
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import Sample, Spread, paired_ratios, spread
from benchmarks.providers import OURS
from benchmarks.suite import CaseResult, Result
from benchmarks.targets import Target

COLUMNS = (
    "provider",
    "forward ms",
    "fwd+bwd ms",
    "processor ms",
    "time / rankloss",
    "processor / rankloss",
    "ns/score",
    "peak MB",
    "first call s",
)


def case_title(done: CaseResult) -> str:
    rounds = max((len(result.step) for result in done.results), default=0)
    return (
        f"{done.case.name} ({done.case.scores:.1e} scores; {rounds} rounds; "
        f"checked with {done.checked_anchors} anchors)"
    )


def case_rows(done: CaseResult) -> list[list[str]]:
    """One row for each provider, in the order of COLUMNS; a row of two cells says why not."""
    ours = done.of(OURS)
    return [_row(result, done, ours) for result in done.results]


def _row(result: Result, done: CaseResult, ours: Result | None) -> list[str]:
    if not result.ok:
        return [result.provider.name, f"{result.status}: {result.detail}"]
    step = spread(_wall(result.step))
    peak = "?" if result.peaks is None else f"{result.peaks.live / 1e6:.1f}"
    return [
        result.provider.name,
        milliseconds(spread(_wall(result.forward))),
        milliseconds(step),
        milliseconds(spread(_cpu(result.step))),
        _ratio_cell(result, ours, _wall),
        _ratio_cell(result, ours, _cpu),
        f"{step.median * 1e9 / done.case.scores:.2f}",
        peak,
        "?" if result.first_call is None else f"{result.first_call:.2f}",
    ]


def milliseconds(values: Spread) -> str:
    low, high = _short(values.low * 1e3), _short(values.high * 1e3)
    return f"{_short(values.median * 1e3)} [{low}-{high}]"


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio_cell(
    result: Result, ours: Result | None, of: Callable[[Sequence[Sample]], list[float]]
) -> str:
    if ours is None:
        return "-"
    ratio = spread(paired_ratios(of(result.step), of(ours.step)))
    return "1" if result is ours else f"{ratio.median:.2f} [{ratio.low:.2f}-{ratio.high:.2f}]"


def _wall(samples: Sequence[Sample]) -> list[float]:
    return [sample.wall for sample in samples]


def _cpu(samples: Sequence[Sample]) -> list[float]:
    return [sample.cpu for sample in samples]


def terminal(done: CaseResult) -> str:
    """A title and an aligned table."""
    rows = [list(COLUMNS), *case_rows(done)]
    full = [row for row in rows if len(row) == len(COLUMNS)]
    widths = [max(len(row[i]) for row in full) for i in range(len(COLUMNS))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) for row in rows]
    return "\n".join([case_title(done), *("  " + line.rstrip() for line in lines)])


def targets_text(targets: Sequence[Target]) -> str:
    lines = [f"  {t.verdict:12} {t.name}: {t.measured} (target: {t.required})" for t in targets]
    return "\n".join(["targets", *lines])


def markdown(machine: dict[str, Any], done: Sequence[CaseResult], targets: Sequence[Target]) -> str:
    parts = ["# Benchmarks", "; ".join(f"{key} {value}" for key, value in machine.items())]
    parts += [(__doc__ or "").strip()]
    for case in done:
        rows = [row + [""] * (len(COLUMNS) - len(row)) for row in case_rows(case)]
        table = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
        parts += [f"## {case_title(case)}", "\n".join(_markdown_row(row) for row in table)]
    rows = [[t.verdict, t.name, t.measured, t.required] for t in targets]
    table = [["", "target", "measured", "required"], ["---"] * 4, *rows]
    parts += ["## Targets", "\n".join(_markdown_row(row) for row in table)]
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_json(
    machine: dict[str, Any], done: Sequence[CaseResult], targets: Sequence[Target]
) -> dict[str, Any]:
    """Everything measured, every sample included; null where there is nothing."""
    return {
        "version": 1,
        "machine": machine,
        "cases": [_json_case(case) for case in done],
        "targets": [
            {"name": t.name, "required": t.required, "measured": t.measured, "met": t.met}
            for t in targets
        ],
    }


def _json_case(done: CaseResult) -> dict[str, Any]:
    case, ours = done.case, done.of(OURS)
    return {
        "name": case.name,
        **{name: getattr(case, name) for name in ("order", "n", "k", "m", "r", "seed", "scores")},
        "checked_anchors": done.checked_anchors,
        "seconds": done.seconds,
        "providers": [_json_result(result, case.scores, ours) for result in done.results],
    }


def _json_result(result: Result, scores: int, ours: Result | None) -> dict[str, Any]:
    errors, peaks = result.errors, result.peaks
    compared = ours is not None and result.ok
    return {
        "provider": result.provider.name,
        "status": result.status,
        "detail": result.detail,
        "first_call_s": result.first_call,
        "value_error": errors and _finite(errors.value),
        "gradient_error": errors and _finite(errors.gradient),
        "forward": _json_timing(result.forward),
        "forward_backward": _json_timing(result.step),
        "ns_per_score": spread(_wall(result.step)).median * 1e9 / scores if result.step else None,
        "time_over_rankloss": _json_ratio(result, ours, _wall) if compared else None,
        "processor_over_rankloss": _json_ratio(result, ours, _cpu) if compared else None,
        "peak_extra_mb": peaks and peaks.live / 1e6,
        "peak_extra_resident_mb": peaks and peaks.resident / 1e6,
    }


def _json_timing(samples: Sequence[Sample]) -> dict[str, Any] | None:
    if not samples:
        return None
    return {
        "wall_ms": _json_spread([1e3 * value for value in _wall(samples)]),
        "processor_ms": _json_spread([1e3 * value for value in _cpu(samples)]),
    }


def _json_ratio(
    result: Result, ours: Result | None, of: Callable[[Sequence[Sample]], list[float]]
) -> dict[str, Any] | None:
    return _json_spread(paired_ratios(of(result.step), of(ours.step))) if ours else None


def _json_spread(values: list[float]) -> dict[str, Any]:
    s = spread(values)
    return {
        "median": s.median,
        "first_quartile": s.low,
        "third_quartile": s.high,
        "min": s.least,
        "samples": values,
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
