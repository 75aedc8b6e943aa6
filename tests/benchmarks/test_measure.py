"""Clocks, medians and peak memory, on calls whose figures are known."""

import sys
import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from benchmarks.cases import AnyCase, Inputs, square_case
from benchmarks.measure import (
    Sample,
    Spread,
    paired_ratios,
    processor_clock,
    repeats_to_last,
    spread,
)
from benchmarks.memory import peak_extra_bytes
from benchmarks.providers import Loss
from benchmarks.worker import Peaks, Session, Worker

BIG = 50_000_000  # float32 elements: 200 MB
SMALLER = 5_000_000  # 20 MB

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_spread_of_known_values() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0, least=1.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one round"):
        spread([])


def test_ratios_are_taken_round_by_round() -> None:
    """Both sides disturbed tenfold in one round: the ratio does not notice."""
    assert paired_ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios([1.0, 2.0], [1.0])


def test_the_clock_divides_by_the_repeats_and_tells_waiting_from_working() -> None:
    calls: list[float] = []

    def wait() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.01)

    sample = processor_clock(wait, 4)
    assert len(calls) == 4
    assert min(b - a for a, b in pairwise(calls)) >= 0.01
    assert sample.wall >= 0.01
    assert sample.cpu < sample.wall


def test_short_calls_are_repeated_and_long_ones_are_not() -> None:
    def clock_of(seconds: float) -> int:
        return repeats_to_last(0.02, lambda: None, lambda call, n: Sample(seconds, seconds))

    assert clock_of(0.001) == 20
    assert clock_of(5.0) == 1
    assert clock_of(0.0) == 1000


@on_linux
def test_peak_sees_a_temporary_and_not_what_was_freed_before() -> None:
    assert 195e6 < peak_extra_bytes(lambda: torch.ones(BIG).sum()) < 230e6
    torch.ones(BIG)
    assert peak_extra_bytes(lambda: None) < 10e6


def build_one_after_another(case: AnyCase, inputs: Inputs) -> Loss:
    """Ten temporaries of 20 MB, each freed before the next."""

    def loss() -> torch.Tensor:
        for _ in range(10):
            torch.ones(SMALLER)
        return inputs.leaves["scores"].sum()

    return loss


@on_linux
def test_live_peak_leaves_out_what_the_allocator_keeps() -> None:
    worker = Worker(partial(Session, build_one_after_another), threads=1)
    try:
        worker.ask(60, "warm_up", square_case(1, 8))
        peaks = worker.ask(60, "peaks")
    finally:
        worker.stop()
    assert isinstance(peaks, Peaks)
    assert 15e6 < peaks.live < 35e6
    assert peaks.resident > 15e6
