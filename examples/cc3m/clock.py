"""Where the time of training goes: loading, model, loss; measured without stopping a GPU."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Stamp = float | torch.cuda.Event


class Clock:
    """Adds up named spans. On a GPU they are those of its stream, read when asked for.

    Args:
        device: whose time.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Stamp, Stamp]] = []
        self._waited = 0.0
        self._since = time.perf_counter()

    def stamp(self) -> Stamp:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, name: str, start: Stamp, end: Stamp) -> None:
        self._spans.append((name, start, end))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.stamp()
        yield
        self.add(name, start, self.stamp())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data: time of the processor, during which a GPU has nothing to do."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and of them in loading and in each named span."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        totals: defaultdict[str, float] = defaultdict(float, loading=self._waited)
        for name, start, end in self._spans:
            totals[name] += _seconds(start, end)
        elapsed, self._since, self._waited, self._spans = now - self._since, now, 0.0, []
        return elapsed, dict(totals)


def _seconds(start: Stamp, end: Stamp) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    if isinstance(start, float) or isinstance(end, float):
        raise TypeError("a span begins and ends on the same device")
    return float(start.elapsed_time(end)) / 1000


def peak_memory(device: torch.device) -> int:
    """Bytes: most ever allocated on the GPU, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


class CollectiveTime:
    """Seconds that collectives themselves take, from torch's profiler, in a step that asks.

    They overlap with computation, so this is not time that the others lack.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def profiled(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        self.seconds = sum(_collective_microseconds(x) for x in profile.events() or []) / 1e6


def _collective_microseconds(event: torch.autograd.profiler_util.FunctionEvent) -> float:
    if "ncclDevKernel" in event.name:
        return float(event.device_time_total)
    return float(event.cpu_time_total) if event.name.startswith("gloo:") else 0.0
