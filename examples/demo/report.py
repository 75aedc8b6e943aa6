"""The demo's report: a Markdown table with sentences about it, and the same numbers as JSON."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rankloss
from examples.cc3m.files import write_json, write_text
from examples.demo.results import Metric, Outcomes, difference, mean_and_spread, sentences
from examples.demo.timing import StepTime

ONE_SEED = (
    "± is two standard errors over held-out examples of one training run each; it does not "
    "include the variation between seeds (`--seeds 3` does)."
)
MORE_SEEDS = (
    "± is two standard errors over {} seeds, each compared with CLIP's run of the same seed."
)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, readable as plain text too; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def results_table(
    rows: Sequence[Metric],
    outcomes: dict[str, list[Outcomes]],
    times: dict[str, StepTime],
) -> str:
    """One column a model (keys are labels), one row a metric; ± is between seeds, if several."""
    lines = []
    for metric in rows:
        cells = [metric.label, "" if metric.chance is None else metric.show(metric.chance)]
        for seeds in outcomes.values():
            mean, spread = mean_and_spread([outcome[metric.key] for outcome in seeds])
            cells.append(
                metric.show(mean) + ("" if spread is None else f" ± {metric.show(spread)}")
            )
        lines.append(cells)
    lines.append(["seconds per step", "", *(f"{times[x].median:.3f}" for x in outcomes)])
    lines.append(["processor seconds per step", "", *(f"{times[x].cpu:.3f}" for x in outcomes)])
    return markdown_table(["held-out measure", "chance", *outcomes], lines)


def report_text(
    rows: Sequence[Metric],
    outcomes: dict[str, list[Outcomes]],
    times: dict[str, StepTime],
    notes: Sequence[str],
) -> str:
    """The table, what it says about each model against the first, and notes on how to read it."""
    (_, base), *others = outcomes.items()
    said = [sentences(label, seeds, base, list(rows)) for label, seeds in others]
    errors = ONE_SEED if len(base) == 1 else MORE_SEEDS.format(len(base))
    spread = "; ".join(
        f"{label} {t.quartiles[0]:.3f} to {t.quartiles[1]:.3f}" for label, t in times.items()
    )
    timing = f"Seconds per step: median of steps taken in turns; middle half {spread}."
    bullets = "\n".join(f"- {text}" for text in (*said, errors, timing, *notes))
    return f"{results_table(rows, outcomes, times)}\n\n{bullets}\n"


def results_json(
    rows: Sequence[Metric],
    outcomes: dict[str, list[Outcomes]],
    times: dict[str, StepTime],
    settings: dict[str, Any],
    training: dict[str, Any],
) -> dict[str, Any]:
    """Everything in the report and all that is needed to make it again."""
    (_, base), *_ = outcomes.items()
    models = {}
    for label, seeds in outcomes.items():
        measured: dict[str, Any] = {}
        for metric in rows:
            values = [outcome[metric.key] for outcome in seeds]
            mean, spread = mean_and_spread(values)
            change, error = difference(values, [outcome[metric.key] for outcome in base])
            measured[metric.key] = {
                "mean": mean,
                "by_seed": [float(value.double().mean()) for value in values],
                "std_between_seeds": spread,
                "minus_clip": change,
                "standard_error": None if error != error else error,
            }
        models[label] = {
            "metrics": measured,
            "seconds_per_step": asdict(times[label]),
            "training": training[label],
        }
    chance = {metric.key: metric.chance for metric in rows}
    return {"settings": settings, "versions": versions(), "chance": chance, "models": models}


def versions() -> dict[str, str]:
    names = ("open_clip_torch", "webdataset", "numpy", "pillow", "safetensors")
    return {
        "rankloss": rankloss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        **{name: importlib.metadata.version(name) for name in names},
    }


def write_report(directory: Path, text: str, data: dict[str, Any]) -> None:
    write_text(directory / "results.md", text)
    write_json(directory / "results.json", data)
