"""Rows of results as a table of one case, a page and one small table, all in Markdown.

Times are milliseconds of the forward pass, or of forward and backward; CPU time is summed over
threads. A ratio is a provider's time over rankloss's in the same round, so above 1 rankloss is
faster; quartiles over the rounds stand in brackets. Memory is the peak beyond the inputs, in MB
(1e6 bytes).
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.measure import Spread, spread
from benchmarks.providers import OURS
from benchmarks.rows import Row, find
from benchmarks.targets import Target
from examples.common.reports import markdown_table

COLUMNS = (
    "case",
    "provider",
    "forward",
    "both",
    "CPU, both",
    "over rankloss",
    "peak",
    "first call s",
)
PEERS = ("open_clip", "list_mle")
SUMMARY = ("case", "rankloss", "naive", "naive compiled", "peer", "memory", "naive's memory")
NOTE = (
    "Forward + backward, milliseconds: median of the rounds, in brackets the time over rankloss's "
    "in the same round (above 1: rankloss is faster). Memory: peak beyond the inputs, MB. Peer: "
    "open_clip's ClipLoss at order 0, exact ListMLE in plain PyTorch at order 1."
)


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The texts of a row that was measured, in the order of COLUMNS."""
    return [
        row.case,
        row.provider,
        milliseconds(spread(row.forward)),
        milliseconds(spread(row.step)),
        milliseconds(spread(row.step_cpu)),
        _ratio(row, find(rows, row.case, OURS)),
        "?" if row.peak_mb is None else f"{row.peak_mb:.1f}",
        "?" if row.first_call_s is None else f"{row.first_call_s:.2f}",
    ]


def milliseconds(values: Spread) -> str:
    return f"{_short(values.median)} [{_short(values.low)}-{_short(values.high)}]"


def _short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row, ours: Row | None) -> str:
    if ours is None:
        return "-"
    ratio = row.time_over(ours)
    return "1" if row is ours else f"{ratio.median:.2f} [{ratio.low:.2f}-{ratio.high:.2f}]"


def timings(rows: Sequence[Row]) -> str:
    """A table of what was measured, and a line for each row that was not, with the reason."""
    measured = [cells(row, rows) for row in rows if row.ok]
    parts = [markdown_table(COLUMNS, measured)] if measured else []
    reasons = [f"- {x.case}, {x.provider}: {x.status}: {x.detail}" for x in rows if not x.ok]
    return "\n\n".join([*parts, "\n".join(reasons)]).rstrip()


def markdown(machine: dict[str, Any], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """A page: a table for each group of cases, then the targets."""
    about = (__doc__ or "").partition("\n\n")[2].strip()
    parts = ["# Benchmarks", "; ".join(f"{key} {value}" for key, value in machine.items()), about]
    for group, members in groupby(rows, key=lambda row: row.group):
        parts += [f"## {group}", timings(list(members))]
    return "\n\n".join([*parts, targets_table(targets)]) + "\n"


def targets_table(targets: Sequence[Target]) -> str:
    verdicts = [[t.verdict, t.name, t.measured, t.required] for t in targets]
    return "## Targets\n\n" + markdown_table(("", "target", "measured", "required"), verdicts)


def summary(machine: dict[str, Any], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """One row a case, the machine, and the targets that were missed: for the README."""
    names = dict.fromkeys(row.case for row in rows)
    where = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}."
    )
    small = markdown_table(SUMMARY, [_summary_cells(name, rows) for name in names])
    return "\n\n".join([small, f"{NOTE} {where}", _verdict(targets)]) + "\n"


def _summary_cells(name: str, rows: Sequence[Row]) -> list[str]:
    ours, naive, compiled, *peers = (
        find(rows, name, provider) for provider in (OURS, "naive", "naive compiled", *PEERS)
    )
    peer = next((row for row in peers if row), None)
    memory = ("-" if x is None or x.peak_mb is None else f"{x.peak_mb:.1f}" for x in (ours, naive))
    return [name, *(_time(row, ours) for row in (ours, naive, compiled, peer)), *memory]


def _time(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "-"
    shown = _short(spread(row.step).median)
    if ours is None or row is ours:
        return shown
    return f"{shown} ({row.time_over(ours).median:.2f}x)"


def _verdict(targets: Sequence[Target]) -> str:
    judged = [t for t in targets if t.met is not None]
    missed = [f"{t.name}: {t.measured} ({t.required})" for t in judged if not t.met]
    met = f"{len(judged) - len(missed)} of {len(judged)} measured targets met."
    return " ".join([met, *(f"Missed: {each}." for each in missed)])
