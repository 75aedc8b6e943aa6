"""Rows of results as a terminal table, a Markdown page and one small table.

Times are milliseconds of the forward pass, or of forward and backward; CPU time is summed over
threads. A ratio is a provider's time over rankloss's in the same round, so above 1 rankloss is
faster; quartiles over the rounds stand in brackets. Memory is the peak beyond the inputs, in MB
(1e6 bytes).
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from benchmarks.measure import Spread, spread
from benchmarks.providers import OURS
from benchmarks.rows import Row, find
from benchmarks.targets import Target

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
    """The texts of a row in the order of COLUMNS; three of them, the last saying why, if none."""
    if not row.ok:
        return [row.case, row.provider, f"{row.status}: {row.detail}"]
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


def terminal(rows: Sequence[Row]) -> str:
    """An aligned table of one case, under its name."""
    lines = [cells(row, rows)[1:] for row in rows]
    full = [list(COLUMNS[1:]), *(line for line in lines if len(line) == len(COLUMNS) - 1)]
    widths = [max(len(line[i]) for line in full) for i in range(len(full[0]))]
    widths[0] = max(len(row.provider) for row in rows)
    texts = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False))
        for line in (full[0], *lines)
    )
    return "\n".join([rows[0].case, *("  " + text.rstrip() for text in texts)])


def targets_text(targets: Sequence[Target]) -> str:
    lines = [f"  {t.verdict:12} {t.name}: {t.measured} (target: {t.required})" for t in targets]
    return "\n".join(["targets", *lines])


def markdown(machine: dict[str, Any], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """A page: a table for each group of cases, then the targets."""
    about = (__doc__ or "").partition("\n\n")[2].strip()
    parts = ["# Benchmarks", "; ".join(f"{key} {value}" for key, value in machine.items()), about]
    return "\n\n".join([*parts, timings(rows), targets_table(targets)]) + "\n"


def timings(rows: Sequence[Row]) -> str:
    """A table for each group of cases."""
    parts = []
    for group, members in groupby(rows, key=lambda row: row.group):
        parts += [f"## {group}", table(COLUMNS, (cells(row, rows) for row in members))]
    return "\n\n".join(parts)


def targets_table(targets: Sequence[Target]) -> str:
    verdicts = ([t.verdict, t.name, t.measured, t.required] for t in targets)
    return "## Targets\n\n" + table(("", "target", "measured", "required"), verdicts)


def summary(machine: dict[str, Any], rows: Sequence[Row], targets: Sequence[Target]) -> str:
    """One row a case, the machine, and the targets that were missed: for the README."""
    names = dict.fromkeys(row.case for row in rows)
    where = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}."
    )
    small = table(SUMMARY, (_summary_cells(name, rows) for name in names))
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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled with empty cells."""
    filled = ([*row, *[""] * (len(header) - len(row))] for row in rows)
    lines = (header, ["---"] * len(header), *filled)
    return "\n".join(
        "| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines
    )
