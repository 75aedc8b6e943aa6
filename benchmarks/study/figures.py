"""Pictures of the report, drawn from the study's JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.intervals import Summary
from benchmarks.study.questions import FITTED_ORDERS, LISTS, METRICS, ORDERS, PLANTED_ORDERS, STAGES
from examples.common.reports import COLOURS, save_figure
from examples.evaluation.report import draw_gap

Rows = dict[str, Summary]


def draw_figures(told: Summary, folder: Path) -> dict[str, str]:
    """Draw what there are results for; return captions by question."""
    drawn = {}
    style: Any = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "study",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    for question, (caption, draw) in FIGURES.items():
        with matplotlib.rc_context(style):
            figure = draw(told["rows"])
            if figure is not None:
                save_figure(folder / f"{question}.svg", figure, metadata={"Date": None})
                drawn[question] = caption
    return drawn


def _figure(panels: int, width: float = 3.2, height: float = 2.8) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _whiskers(means: Sequence[dict[str, float]]) -> Any:
    """Return lengths of error bars, (2, N); 0 where there is one seed."""
    pairs = [(m["mean"] - m.get("low", m["mean"]), m.get("high", m["mean"]) - m["mean"])
             for m in means]  # fmt: skip
    return np.maximum(np.array(pairs).T, 0)


def _planted(rows: Rows) -> Figure | None:
    if not any(name.startswith("planted-") for name in rows):
        return None
    figure, panels = _figure(len(PLANTED_ORDERS))
    for planted, axes in zip(PLANTED_ORDERS, panels, strict=True):
        there = [n for n in LISTS if f"planted-{planted}-{n}" in rows]
        for order, colour in zip(FITTED_ORDERS, COLOURS, strict=False):
            means = [rows[f"planted-{planted}-{n}"]["means"][f"nll_{order}"] for n in there]
            style = {"color": colour, "marker": "o", "label": f"fitted order {order}"}
            width = 2.4 if order == planted else 1.0
            heights = [m["mean"] for m in means]
            axes.errorbar(there, heights, _whiskers(means), linewidth=width, **style)
        axes.set(xscale="log", title=f"planted order {planted}", xlabel="lists fitted to")
    panels[0].set_ylabel("held-out loss, nats a place")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def _bars(names: Sequence[str], metrics: Sequence[str]) -> Callable[[Rows], Figure | None]:
    """Return a drawing of points with intervals: a panel a metric, a line a row."""

    def draw(rows: Rows) -> Figure | None:
        there = [x for x in names if x in rows and all(m in rows[x]["means"] for m in metrics)]
        if len(there) < 2:
            return None
        figure, panels = _figure(len(metrics), height=0.8 + 0.3 * len(there))
        for key, axes in zip(metrics, panels, strict=True):
            means = [rows[name]["means"][key] for name in there]
            places, factor = np.arange(len(there))[::-1], 100 if METRICS[key].percent else 1
            values = factor * np.array([m["mean"] for m in means])
            style = {"fmt": "o", "color": COLOURS[0], "capsize": 2}
            axes.errorbar(values, places, xerr=factor * _whiskers(means), **style)
            axes.set_yticks(places, there if axes is panels[0] else [""] * len(there))
            axes.set_xlabel(METRICS[key].label)
        return figure

    return draw


def _gap(rows: Rows) -> Figure | None:
    there = [name for name in STAGES if "gap" in rows.get(name, {}).get("curves", {})]
    if not there:
        return None
    figure, (axes,) = _figure(1, 4.4, 3.0)
    axes.set_prop_cycle(color=COLOURS)
    draw_gap(axes, {name: rows[name]["curves"]["gap"] for name in there})
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=7)
    return figure


def _transitions(rows: Rows) -> Figure | None:
    curves = rows.get("order-3", {}).get("curves", {})
    if "slices" not in curves:
        return None
    figure, (left, middle, right) = _figure(3, 3.6, 3.4)
    places = curves["places"]
    left.plot(places, curves["gain"], "o-", color=COLOURS[0])
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xscale="log", xlabel="place, up to", ylabel="gain of likelihood, nats a place")
    words = curves["slices"]["words"]
    tables = ((middle, "beta", "taken last"), (right, "gamma", "taken last, after red"))
    for axes, key, label in tables:
        table = np.array(curves["slices"][key])
        table -= table.mean(1, keepdims=True)  # what all candidates get changes nothing
        most = float(np.abs(table).max()) or 1.0
        drawn = axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
        axes.set_yticks(range(len(words)), words, fontsize=6)
        axes.set(title=f"{key}, logits", ylabel=label, xlabel="candidate")
        figure.colorbar(drawn, ax=axes, shrink=0.7)
    return figure


PHOTOS = ("photos-order-0", "photos-order-1", "photos-order-3", "photos-order-1-weight-4")
FIGURES: dict[str, tuple[str, Callable[[Rows], Figure | None]]] = {
    "planted": ("Held-out loss of every fitted order, by number of lists.", _planted),
    "agreement": (
        "Orders 0, 1, 3 on scenes: means over seeds with bootstrap intervals.",
        _bars(STAGES[:3], ("correlation", "i2t_r1", "modality_gap")),
    ),
    "injection": (
        "The injection and its controls: means over seeds with bootstrap intervals.",
        _bars(
            ("order-3", "injection-no-teacher", "injection-random-teacher", "injection"),
            ("correlation", "i2t_r1", "zs_unseen"),
        ),
    ),
    "gap": (
        "CLIP's loss with the modalities moved along the line between their centroids, seed 0; "
        "a dot is the model as it is.",
        _gap,
    ),
    "transitions": (
        "A trained third-order model, seed 0: gain of likelihood by place, and slices of both "
        "transition terms over the words of the scenes (rows centred: a constant changes nothing).",
        _transitions,
    ),
    "photographs": (
        "Photographs: means over seeds with bootstrap intervals.",
        _bars(PHOTOS, ("tau_c", "i2t_r1", "modality_gap")),
    ),
    "orders": (
        "Orders 0 to 5 on scenes: means over seeds with bootstrap intervals.",
        _bars(ORDERS, ("correlation", "i2t_r1", "ranking_nll")),
    ),
}
"""Question -> caption and drawing, which returns None where results are missing."""
