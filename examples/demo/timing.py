"""What one optimizer step costs, measured so that a busy machine disturbs all models alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step (forward, loss, backward, update; without reading data), in seconds."""

    median: float
    quartiles: tuple[float, float]
    cpu: float
    """Processor seconds over all threads, median."""


def time_steps(
    steps: dict[str, Callable[[], dict[str, Tensor]]], rounds: int, warmup: int = 1
) -> dict[str, StepTime]:
    """Time named steps in turns: round after round, one of each.

    Args:
        steps: each does one step and returns its "seconds" and "cpu_seconds", as Trainer.update.
        rounds: timed steps of each, at least 2.
        warmup: rounds before that.
    """
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            cost = step()
            if turn >= warmup:
                wall[name].append(float(cost["seconds"]))
                cpu[name].append(float(cost["cpu_seconds"]))
    return {name: _summary(wall[name], cpu[name]) for name in steps}


def _summary(wall: list[float], cpu: list[float]) -> StepTime:
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
    return StepTime(middle, (low, high), statistics.median(cpu))
