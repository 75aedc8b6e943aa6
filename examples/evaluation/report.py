"""Results as JSON, as a table and as a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.common.files import write_json, write_text
from examples.common.reports import markdown_table, save_figure


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
        numbers = self.columns.values()
        cells = [[row, *(_shown(values.get(row)) for values in numbers)] for row in self.rows()]
        table = markdown_table(["measure", *self.columns], cells)
        return "\n\n".join(filter(None, [f"{self.title}.", table, "\n".join(self.notes)])) + "\n"


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
    size = (7, 1.2 + 0.22 * len(table.rows()) * len(table.columns)) if curves is None else (6, 4)
    figure = Figure(size, layout="constrained")
    axes = figure.add_subplot()
    if curves is None:
        _draw_bars(axes, table)
    else:
        draw_gap(axes, curves)
    axes.set_title(table.title, fontsize=9)
    axes.legend(fontsize=7)
    save_figure(paths[2], figure, dpi=120)
    return paths


def _shown(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _draw_bars(axes: Any, table: Table) -> None:
    rows = table.rows()
    thickness = 0.8 / len(table.columns)
    for i, (name, numbers) in enumerate(table.columns.items()):
        places = [row + i * thickness for row in range(len(rows))]
        axes.barh(places, [numbers.get(row, math.nan) for row in rows], thickness, label=name)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(rows))], rows)
    axes.invert_yaxis()


def draw_gap(axes: Any, curves: dict[str, list[dict[str, float]]]) -> None:
    """Draw CLIP's loss over the gap, a line for each entry of `gap_curve`s by name."""
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point["gap"])
        (line,) = axes.plot([p["gap"] for p in ordered], [p["loss"] for p in ordered], label=name)
        here = min(points, key=lambda point: abs(point["shift"]))
        axes.plot(here["gap"], here["loss"], "o", color=line.get_color())
    axes.set(xlabel="modality gap after shifting (dot: as trained)", ylabel="CLIP's loss")
