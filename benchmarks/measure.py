"""Time of one call, and medians, quartiles and paired ratios of several.

A clock turns (call, repeats) into a Sample; another device's clock can stand beside this one.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Seconds for one call: on the wall, and of CPU time summed over all threads."""

    wall: float
    cpu: float


Clock = Callable[[Call, int], Sample]


def processor_clock(call: Call, repeats: int) -> Sample:
    """Seconds per call, averaged over `repeats` calls in a row."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Sample(wall / repeats, cpu / repeats)


def repeats_to_last(seconds: float, call: Call, clock: Clock = processor_clock) -> int:
    """Number of calls in a row that last about that long; short ones cannot be timed alone."""
    once = clock(call, 1).wall
    if once < seconds:
        once = clock(call, 3).wall  # the first may have been slow to start
    return max(1, min(1000, math.ceil(seconds / max(once, 1e-9))))


@dataclass(frozen=True)
class Spread:
    median: float
    low: float  # first quartile
    high: float  # third quartile
    least: float


def spread(values: Sequence[float]) -> Spread:
    if not values:
        raise ValueError("spread of no values: measure at least one round")
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, min(values))


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratio of the two sides round by round: a disturbed round disturbs both."""
    return [a / b for a, b in zip(above, below, strict=True)]
