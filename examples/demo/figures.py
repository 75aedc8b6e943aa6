"""The demo's picture: example scenes, and the scores of every row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.common import reports
from examples.demo.measures import Metric, mean_and_spread
from examples.demo.report import TrainedRow
from examples.demo.scene_shards import Picture

EXAMPLES = 6


def save_figure(
    path: Path, rows: Sequence[TrainedRow], metrics: Sequence[Metric], examples: Sequence[Picture]
) -> None:
    """Draw and write report.png atomically."""
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(13, 6.2), layout="constrained")
        panels: Any = figure.subfigures(2, 1, height_ratios=[2.7, 3.2])
        _draw_examples(panels[0], examples)
        _draw_scores(panels[1], rows, metrics)
        reports.save_figure(path, figure, dpi=110)


def _draw_examples(panel: Any, examples: Sequence[Picture]) -> None:
    panel.suptitle("Held-out scenes (every one has a colour-shape pair never seen in training)")
    for axes, picture in zip(panel.subplots(1, len(examples)), examples, strict=True):
        axes.imshow(np.asarray(picture.image), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title("\n".join(textwrap.wrap(picture.caption, 27)), fontsize=8, y=-0.04, va="top")


def _draw_scores(panel: Any, rows: Sequence[TrainedRow], metrics: Sequence[Metric]) -> None:
    left, right = panel.subplots(1, 2, width_ratios=[7, 6])
    retrieval = [m for m in metrics if m.key[:3] in ("i2t", "t2i") or m.key == "correlation"]
    zero_shot = [m for m in metrics if m.key.startswith("zs_") and m.key != "zs_mean"]
    _draw_bars(left, rows, retrieval, "Retrieval among held-out scenes, %")
    _draw_bars(right, rows, zero_shot, "Zero-shot accuracy on single things, %")
    left.legend(frameon=False, fontsize=7)


def _draw_bars(
    axes: Any, rows: Sequence[TrainedRow], metrics: Sequence[Metric], title: str
) -> None:
    width = 0.8 / len(rows)
    for i, (row, colour) in enumerate(zip(rows, reports.COLOURS, strict=False)):
        at = np.arange(len(metrics)) + (i - (len(rows) - 1) / 2) * width
        pairs = [mean_and_spread([x[m.key] for x in row.outcomes]) for m in metrics]
        values = [100 * mean for mean, _ in pairs]
        spread = None if pairs[0][1] is None else [100 * (std or 0.0) for _, std in pairs]
        axes.bar(at, values, width * 0.92, yerr=spread, color=colour, label=row.label)
        for x, value in zip(at, values, strict=True):
            axes.annotate(
                f"{value:.0f}", (x, max(value, 0)), ha="center", va="bottom", fontsize=6,
                xytext=(0, 1), textcoords="offset points",
            )  # fmt: skip
    for place, metric in enumerate(metrics):
        if metric.chance:
            chance = 100 * metric.chance
            axes.hlines(chance, place - 0.45, place + 0.45, "black", "dotted", linewidth=1)
    axes.set_xticks(range(len(metrics)), [_short(m.label) for m in metrics], fontsize=8)
    axes.set(
        title=f"{title} (dotted: chance)",
        ylim=(min(0, axes.get_ylim()[0]), 140),
        yticks=range(0, 101, 20),
    )


def _short(label: str) -> str:
    """A label in two lines that fits below a group of bars."""
    for long, short in (
        (" (%)", ""),
        ("zero-shot ", ""),
        ("graded rank correlation", "graded\ncorrelation\nx 100"),
        ("colour + shape, ", "colour +\nshape,\n"),
        (" pairs", ""),
        ("image to text ", "image\nto text\n"),
        ("text to image ", "text to\nimage\n"),
    ):
        label = label.replace(long, short)
    return label
