"""The demo's report: a Markdown table with sentences about it, and the same numbers as JSON."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from examples.common.reports import markdown_table, versions
from examples.demo.measures import Metric, Outcomes, difference, mean_and_spread

ONE_SEED = (
    "One seed proves nothing: ± is two standard errors over the held-out examples of one training "
    "run each, and leaves out how much a row changes from seed to seed. `--seeds 3` measures that."
)
MORE_SEEDS = (
    "± is two standard errors over {} seeds, each compared with CLIP's run of the same seed."
)


@dataclass(frozen=True)
class TrainedRow:
    """One row of the comparison; lists have an entry for each seed."""

    label: str
    outcomes: list[Outcomes]
    cpu_seconds: list[float]
    """CPU seconds of optimizer steps, summed over threads."""
    history: list[dict[str, list[float]]]
    """Loss terms and more, by step."""
    parameters: int
    """Those that are trained."""
    flops: int
    """Operations of a step, forward and backward, of matrix products and convolutions."""


def report_text(metrics: Sequence[Metric], rows: Sequence[TrainedRow], notes: Sequence[str]) -> str:
    """The table, differences from its first model, and notes on how to read them."""
    base, *others = rows
    count = len(base.outcomes)
    said = [_differences(row, base, metrics) for row in others]
    errors = ONE_SEED if count == 1 else MORE_SEEDS.format(count)
    bullets = "\n".join(f"- {text}" for text in (errors, *said, *notes))
    return f"{results_table(metrics, rows)}\n\n{bullets}\n"


def results_table(metrics: Sequence[Metric], rows: Sequence[TrainedRow]) -> str:
    """One column a model, one line a metric; ± is the deviation between seeds, if several."""
    lines = []
    for metric in metrics:
        cells = [metric.label, "" if metric.chance is None else metric.show(metric.chance)]
        for row in rows:
            mean, spread = mean_and_spread([outcome[metric.key] for outcome in row.outcomes])
            error = "" if spread is None else f" ± {metric.show(spread)}"
            cells.append(metric.show(mean) + error)
        lines.append(cells)
    cpu = (f"{statistics.median(row.cpu_seconds):.3f}" for row in rows)
    lines.append(["CPU seconds per step", "", *cpu])
    lines.append(["GFLOP per step", "", *(f"{row.flops / 1e9:.1f}" for row in rows)])
    lines.append(["parameters (millions)", "", *(f"{row.parameters / 1e6:.2f}" for row in rows)])
    return markdown_table(["held-out measure", "chance", *(row.label for row in rows)], lines)


def _differences(row: TrainedRow, base: TrainedRow, metrics: Sequence[Metric]) -> str:
    """One sentence: how far a model is from CLIP; no verdict on what it means."""
    parts = []
    for metric in (metric for metric in metrics if metric.compared):
        ours, theirs = ([x[metric.key] for x in each.outcomes] for each in (row, base))
        told = metric.show_difference(*difference(ours, theirs))
        parts.append(f"{told} {metric.label.removesuffix(' (%)')}")
    return f"{row.label} minus {base.label}: {'; '.join(parts)}."


def results_json(
    metrics: Sequence[Metric], rows: Sequence[TrainedRow], settings: dict[str, Any]
) -> dict[str, Any]:
    """Every number of the report by seed, and all that is needed to make it again."""
    models = {
        row.label: {
            "metrics": {
                metric.key: [float(x[metric.key].double().mean()) for x in row.outcomes]
                for metric in metrics
            },
            "cpu_seconds_per_step": statistics.median(row.cpu_seconds),
            "flops_per_step": row.flops,
            "parameters": row.parameters,
            "training": row.history,
        }
        for row in rows
    }
    chance = {metric.key: metric.chance for metric in metrics}
    made_by = {
        **versions("open_clip_torch", "webdataset", "numpy", "pillow", "safetensors"),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    return {"settings": settings, "versions": made_by, "chance": chance, "models": models}
