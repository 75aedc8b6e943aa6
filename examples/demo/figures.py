"""The demo's picture: example scenes, loss curves, scores, and the modality gap."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from examples.cc3m.files import write_atomically
from examples.demo.results import Metric, Outcomes, mean_and_spread

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which colour-blind readers can tell apart; one a model."""
DASHES = ("solid", "dashed", "dotted", "dashdot", "solid", "dashed")
"""Of lines that may lie on each other; one a model."""
DISTILLATION = {
    "gram_loss": "Gram",
    "distance_loss": "relational distance",
    "angle_loss": "relational angle",
    "gate_loss": "gate",
}
"""Terms of the loss that come with a teacher and an injection."""
EXAMPLES = 6
SHOWN_PAIRS = 250
"""Image-text pairs in a picture of the gap."""


@dataclass(frozen=True)
class ModelFigures:
    """What the picture shows of one model."""

    label: str
    history: dict[str, list[float]]
    outcomes: list[Outcomes]
    features: dict[str, Tensor]


def save_figure(
    path: Path,
    models: Sequence[ModelFigures],
    rows: Sequence[Metric],
    examples: Sequence[tuple[Image.Image, str]],
) -> None:
    """Draw and write report.png atomically."""
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(13, 12.5), layout="constrained")
        panels: Any = figure.subfigures(4, 1, height_ratios=[2.7, 3, 3.2, 3.6])
        top, middle, bars, bottom = panels
        _draw_examples(top, examples)
        _draw_losses(middle, models)
        _draw_scores(bars, models, rows)
        _draw_gaps(bottom, models)
        write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def _draw_examples(panel: Any, examples: Sequence[tuple[Image.Image, str]]) -> None:
    panel.suptitle("Held-out scenes (every one has a colour-shape pair never seen in training)")
    for axes, (image, text) in zip(panel.subplots(1, len(examples)), examples, strict=True):
        axes.imshow(np.asarray(image), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title("\n".join(textwrap.wrap(text, 27)), fontsize=8, y=-0.04, va="top")


def _draw_losses(panel: Any, models: Sequence[ModelFigures]) -> None:
    panel.suptitle("Training")
    distilled = [model for model in models if DISTILLATION.keys() & model.history.keys()]
    charts = panel.subplots(1, 4 if distilled else 3)
    titles = {
        "contrastive_loss": "contrastive loss (nats)",
        "ranking_loss": "ranking loss, weighted (nats)",
        "scale": "logit scale",
    }
    for axes, (key, title) in zip(charts, titles.items(), strict=False):
        for model, colour, dashes in zip(models, COLOURS, DASHES, strict=False):
            _draw_curve(axes, model, key, color=colour, linestyle=dashes, label=model.label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.25)
    charts[0].legend(frameon=False, fontsize=7)
    if distilled:
        _draw_distillation(charts[-1], distilled)


def _draw_distillation(axes: Any, models: Sequence[ModelFigures]) -> None:
    """All terms that a teacher adds, of the first model that has them."""
    for (key, name), colour, dashes in zip(DISTILLATION.items(), COLOURS, DASHES, strict=False):
        _draw_curve(axes, models[0], key, color=colour, linestyle=dashes, label=name)
    title = "\n".join(textwrap.wrap(models[0].label, 28))
    axes.set(title=f"{title}\nother terms, weighted", xlabel="step", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)


def _draw_curve(axes: Any, model: ModelFigures, key: str, **style: Any) -> None:
    if key in model.history:
        axes.plot(model.history["step"], _smooth(model.history[key]), **style)


def _smooth(values: Sequence[float], window: int = 10) -> NDArray[np.float64]:
    """Mean of the last `window` values, or of as many as there are."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    means: NDArray[np.float64] = (sums[stop] - sums[start]) / (stop - start)
    return means


def _draw_scores(panel: Any, models: Sequence[ModelFigures], rows: Sequence[Metric]) -> None:
    left, right = panel.subplots(1, 2, width_ratios=[7, 6])
    retrieval = [row for row in rows if row.key[:3] in ("i2t", "t2i") or row.key == "correlation"]
    zero_shot = [row for row in rows if row.key.startswith("zs_") and row.key != "zs_mean"]
    _draw_bars(left, models, retrieval, "Retrieval among held-out scenes, %")
    _draw_bars(right, models, zero_shot, "Zero-shot accuracy on single things, %")


def _draw_bars(
    axes: Any, models: Sequence[ModelFigures], rows: Sequence[Metric], title: str
) -> None:
    width = 0.8 / len(models)
    for i, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        at = np.arange(len(rows)) + (i - (len(models) - 1) / 2) * width
        pairs = [mean_and_spread([x[row.key] for x in model.outcomes]) for row in rows]
        values = [100 * mean for mean, _ in pairs]
        spread = None if pairs[0][1] is None else [100 * (std or 0.0) for _, std in pairs]
        axes.bar(at, values, width * 0.92, yerr=spread, color=colour, label=model.label)
        for x, value in zip(at, values, strict=True):
            axes.annotate(
                f"{value:.0f}", (x, max(value, 0)), ha="center", va="bottom", fontsize=7,
                xytext=(0, 1), textcoords="offset points",
            )  # fmt: skip
    for place, row in enumerate(rows):
        if row.chance:
            axes.hlines(
                100 * row.chance, place - 0.45, place + 0.45, "black", "dotted", linewidth=1
            )
    axes.set_xticks(range(len(rows)), [_short(row.label) for row in rows], fontsize=8)
    axes.set(title=f"{title} (dotted: chance)", ylim=(min(0, axes.get_ylim()[0]), 108))


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


def _draw_gaps(panel: Any, models: Sequence[ModelFigures]) -> None:
    panel.suptitle(
        f"Modality gap, up to {SHOWN_PAIRS} held-out pairs; horizontal: between the centroids, "
        "vertical: largest remaining variance"
    )
    charts = panel.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
    for axes, model in zip(charts, models, strict=True):
        images, texts = _project(model.features["heldout_images"], model.features["heldout_texts"])
        for a, b in zip(images, texts, strict=True):
            axes.plot(*zip(a, b, strict=True), color="0.8", linewidth=0.4, zorder=1)
        axes.scatter(*images.T, s=9, color="#0072B2", label="images", zorder=2)
        axes.scatter(*texts.T, s=9, color="#D55E00", label="captions", zorder=2)
        gap, _ = mean_and_spread([outcome["gap"] for outcome in model.outcomes])
        axes.set_title("\n".join(textwrap.wrap(f"{model.label}: gap {gap:.3f}", 36)))
        axes.grid(alpha=0.25)
    charts[0].margins(y=0.14)  # room for the legend
    charts[0].legend(loc="upper center", ncols=2, edgecolor="none", framealpha=0.9)


def _project(images: Tensor, texts: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two coordinates of (N, D) features: along the gap, and the main one orthogonal to it."""
    gap = images.mean(0) - texts.mean(0)
    across = gap / gap.norm().clamp(min=1e-12)
    both = torch.cat([images, texts])
    centred = both - both.mean(0)
    rest = centred - (centred @ across)[:, None] * across
    main = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    main = main * main[main.abs().argmax()].sign()
    points = torch.stack([centred @ across, rest @ main], dim=1).numpy()
    shown = min(SHOWN_PAIRS, len(images))
    return points[:shown], points[len(images) : len(images) + shown]
