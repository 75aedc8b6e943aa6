"""Results as JSON, as a table and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.common.files import write_atomically, write_json, write_text


@dataclass(frozen=True)
class Table:
    """Numbers of several models or data sets.

    Args:
        subject: what a column stands for, for example "model".
        columns: name of each column -> its numbers by name.
        title: a sentence above it.
        notes: sentences below it, for example what was not found.
    """

    subject: str
    columns: dict[str, dict[str, float]]
    title: str
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[str]:
        """Names of the numbers, in the order in which they first occur."""
        return list(dict.fromkeys(name for values in self.columns.values() for name in values))

    def text(self) -> str:
        """The table in Markdown; "-" where a number is missing."""
        lines = [f"{self.title}.", ""]
        lines.append("| " + " | ".join(["measure", *self.columns]) + " |")
        lines.append("|" + " --- |" * (len(self.columns) + 1))
        for row in self.rows():
            numbers = [_shown(values.get(row)) for values in self.columns.values()]
            lines.append("| " + " | ".join([row, *numbers]) + " |")
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])]) + "\n"


def write_report(
    folder: Path, name: str, table: Table, described: dict[str, Any], curves: Any = None
) -> list[Path]:
    """Write <name>.json, <name>.md and <name>.png; their paths.

    Args:
        folder: made if missing.
        name: stem of the files' names.
        table: the numbers.
        described: what was measured and how, JSON-able.
        curves: column -> list of {"shift", "gap", "loss"}, drawn in the place of bars.
    """
    data = {**described, table.subject: table.columns, "notes": table.notes}
    if curves is not None:
        data["curves"] = curves
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    write_json(paths[0], data)
    write_text(paths[1], table.text())
    figure = _bars(table) if curves is None else _curves(curves, table.title)
    write_atomically(paths[2], lambda path: figure.savefig(path, format="png", dpi=120))
    return paths


def _shown(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(table: Table) -> Any:
    rows, columns = table.rows(), list(table.columns)
    figure = _figure(7, 1.2 + 0.22 * len(rows) * max(1, len(columns)))
    axes = figure.add_subplot()
    thickness = 0.8 / max(1, len(columns))
    for i, name in enumerate(columns):
        places = [row + i * thickness for row in range(len(rows))]
        values = [table.columns[name].get(row, math.nan) for row in rows]
        axes.barh(places, values, thickness, label=name)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_title(table.title, fontsize=9)
    axes.legend(fontsize=7)
    return figure


def _curves(curves: dict[str, list[dict[str, float]]], title: str) -> Any:
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point["gap"])
        line = axes.plot([p["gap"] for p in ordered], [p["loss"] for p in ordered], label=name)
        here = min(points, key=lambda point: abs(point["shift"]))
        axes.plot(here["gap"], here["loss"], "o", color=line[0].get_color())
    axes.set_xlabel("modality gap after shifting (dot: as trained)")
    axes.set_ylabel("CLIP's loss")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    return figure
