"""Time and memory of calls on a GPU; on a CPU, for a dry run, the wall clock and no memory."""

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Call

FLUSH_BYTES = 512 << 20  # written between samples: several times any L2 cache
HEAD_START = 2_000_000  # cycles the device idles while the host queues a sample
LEAST, MOST = 5, 30  # samples


class OutOfTime(BaseException):
    """The time a measurement may take is over; no library's `except Exception` takes it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt the block after so long; between bytecodes, so not inside one device call."""

    def interrupt(*_: object) -> None:
        raise OutOfTime(f"stopped after its {seconds:.0f} s")

    if seconds <= 0:
        raise OutOfTime("no time left")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Bench:
    """Measures calls on one device, each for about `seconds`."""

    device: torch.device
    seconds: float = 0.4
    _scratch: list[torch.Tensor] = field(default_factory=list)

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize(self.device)

    def first_call(self, call: Call) -> float:
        """Seconds on the wall until a first call is done, compilation included."""
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def samples(self, call: Call) -> list[float]:
        """Seconds of the device for one call, several times, from caches that hold nothing."""
        if not self.real:
            return [self.first_call(call)]
        self.wait()
        once = self.first_call(call)
        count = max(LEAST, min(MOST, int(self.seconds / max(once, 1e-6))))
        self._flush()  # allocates
        cuda: Any = torch.cuda
        events = []
        for _ in range(count):
            self._flush()
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            cuda._sleep(HEAD_START)  # so that launches are queued when it ends
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.wait()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def wall_seconds(self, call: Call, repeats: int = 5) -> float:
        """Seconds for one of several calls in a row: with whatever the host costs."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def peak_extra_bytes(self, call: Call) -> int | None:
        if not self.real:
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        self.wait()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del result
        return peak

    def free_bytes(self) -> float:
        if not self.real:
            return float("inf")
        self.free()
        return float(torch.cuda.mem_get_info(self.device)[0])

    def free(self) -> None:
        gc.collect()
        if self.real:
            self._scratch.clear()
            torch.cuda.empty_cache()

    def _flush(self) -> None:
        if not self._scratch:
            self._scratch.append(torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device))
        self._scratch[0].zero_()


def median(samples: list[float]) -> float:
    return statistics.median(samples)


# ---------------------------------------------------------------- ceilings


def copy_rate(bench: Bench, size: int) -> float:
    """Bytes read and written by a device-to-device copy, per second."""
    source = torch.randn(size * size * 16, device=bench.device)
    target = torch.empty_like(source)
    seconds = median(bench.samples(lambda: target.copy_(source)))
    return 2 * source.numel() * source.element_size() / seconds


def matrix_rate(bench: Bench, size: int) -> float:
    """bf16 flop/s of a square matrix product of random numbers."""
    a, b = torch.randn(2, size, size, device=bench.device).bfloat16()
    return 2 * size**3 / median(bench.samples(lambda: a @ b))


def exponential_rate(bench: Bench, kernel: Callable[[torch.Tensor, int], None]) -> float:
    """exp2 per second, from the difference of many and few rounds on the same registers."""
    rounds = (64, 576) if bench.real else (2, 4)
    x = torch.rand(1 << 20 if bench.real else 1 << 10, device=bench.device)
    few, many = (median(bench.samples(partial(kernel, x, n))) for n in rounds)
    return x.numel() * (rounds[1] - rounds[0]) / max(many - few, 1e-9)
