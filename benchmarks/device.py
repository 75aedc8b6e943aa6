"""A provider's answers on a GPU: device time, device memory, kernel by kernel; and its ceilings.

Dry runs on a CPU take the wall clock and measure no memory.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.cases import FEATURES, AnyCase, Case
from benchmarks.measure import Call, Sample, processor_clock
from benchmarks.providers import Build
from benchmarks.worker import Checked, Peaks, Session

FLUSH_BYTES = 512 << 20  # written between samples: several times any L2 cache
HEAD_START = 2_000_000  # cycles the device idles while the host queues a sample


@dataclass
class Device:
    """One device, with the clock that measures calls on it."""

    name: str

    @property
    def real(self) -> bool:
        return self.name == "cuda"

    @property
    def description(self) -> str:
        name = torch.cuda.get_device_name() if self.real else "CPU, interpreted"
        return f"{name}, triton {triton.__version__}"

    @property
    def lane_clocks_per_second(self) -> float:
        """Lanes that issue in a clock, 128 on every multiprocessor, times clocks a second."""
        properties = torch.cuda.get_device_properties()
        return float(properties.multi_processor_count * 128 * properties.clock_rate * 1e3)

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        self.free()
        return torch.cuda.mem_get_info()[0] if self.real else None

    def clock(self, call: Call, repeats: int = 1) -> Sample:
        """Seconds of the device for a call, the median of some, from caches that hold nothing.

        CPU seconds are the host's for queueing it. One call before them fills the allocator.
        """
        if not self.real:
            return processor_clock(call, 1)
        cuda: Any = torch.cuda
        call()
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        samples = []
        for _ in range(repeats):
            flush.zero_()
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            cuda._sleep(HEAD_START)  # so that launches are queued when it ends
            host = time.process_time()
            start.record()
            call()
            end.record()
            host = time.process_time() - host
            self.wait()
            samples.append(Sample(start.elapsed_time(end) * 1e-3, host))
        return sorted(samples, key=lambda x: x.wall)[repeats // 2]

    def peaks(self, call: Call) -> Peaks | None:
        if not self.real:
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        result = call()
        self.wait()
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        del result
        return Peaks(live=peaks[0] - before[0], resident=peaks[1] - before[1])


class DeviceSession(Session):
    """A worker's end on a GPU; see `Session`."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__(build, name)
        self._on = Device(name)

    def check(self, case: AnyCase) -> Checked:
        checked = super().check(case)  # copies the result to the host: nothing is left to wait for
        self._on.free()
        return checked

    def warm_up(self, case: AnyCase) -> None:
        self._load(case)
        self._step()
        self._on.free()

    def sample(self, name: str) -> Sample:
        sample = self._on.clock(self._calls[name], 3)
        self._on.free()  # other workers' turn
        return sample

    def peaks(self) -> Peaks | None:
        return self._on.peaks(self._step)

    def kernels(self, case: AnyCase) -> dict[str, float]:
        """Microseconds of each kernel of this library in one step, by the profiler."""
        self.warm_up(case)
        self._on.wait()
        with torch.profiler.profile() as profile:
            self._step()
            self._on.wait()
        times: dict[str, float] = {}
        for event in profile.events() or []:
            if event.name.endswith("_kernel") and event.device_type.name == "CUDA":
                times[event.name] = times.get(event.name, 0.0) + event.device_time
        return times

    def _value_and_gradients(self) -> tuple[Tensor, ...]:
        value = self._loss()
        return value.detach(), *torch.autograd.grad(value, list(self._inputs.leaves.values()))

    def repeats(self, case: AnyCase, runs: int) -> bool:
        """Say if every run gives the same bits: no result depends on the order of programs."""
        self._load(case)
        first, *others = (self._value_and_gradients() for _ in range(runs))
        return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    def replays(self, case: Case, fresh: Case) -> bool:
        """Say if a captured step, replayed on new inputs, gives an ordinary step's bits."""
        self._load(case)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._value_and_gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self._value_and_gradients()
        inputs = fresh.inputs(device=self.device)
        with torch.no_grad():
            for name, leaf in self._inputs.leaves.items():
                leaf.copy_(inputs.leaves[name])
        self._inputs.ranking().copy_(inputs.ranking())  # presorted, and K = M: the loss holds it
        graph.replay()
        self._load(fresh)
        return all(
            torch.equal(a, b) for a, b in zip(captured, self._value_and_gradients(), strict=True)
        )


# ---------------------------------------------------------------- limits


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on a device."""

    copy: float  # bytes/s, read and written
    matrix: float  # bf16 flop/s
    exponentials: float  # 1/s


def ceilings(device: Device, side: int) -> Ceilings:
    """Measure a copy, a product of square matrices and exponentials from registers."""

    def seconds(call: Callable[[], object]) -> float:
        return device.clock(call, 5).wall

    source = torch.randn(side * side * 16, device=device.name)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, side, side, device=device.name).bfloat16()
    matrix = 2 * side**3 / seconds(lambda: a @ b)
    rounds = (64, 576) if device.real else (2, 4)
    x = torch.rand(1 << 20 if device.real else 1 << 10, device=device.name)
    few, many = (seconds(partial(exponentials, x, n)) for n in rounds)
    return Ceilings(copy, matrix, x.numel() * (rounds[1] - rounds[0]) / max(many - few, 1e-9))


@triton.jit  # type: ignore[untyped-decorator]
def exponentials_kernel(x, rounds, B: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + i)
    for _ in range(rounds):
        value = tl.exp2(value - 1.0)  # stays between 0.5 and 1
    tl.store(x + i, value)


def exponentials(x: Tensor, rounds: int) -> None:
    """Take exponentials, and nothing else, from registers."""
    block = 1024
    exponentials_kernel[(x.numel() // block,)](x, rounds, B=block, num_warps=4)


def least_seconds(case: Case, ceilings: Ceilings) -> tuple[float, float]:
    """The least time of a forward pass, and of forward and backward, that does all the work.

    Order >= 2: one exponential for each remaining score, each way, or 2 (R-1) r flops forward and
    6 (R-1) r backward, whichever takes longer. Order 1: every input read and every output written
    once. Order 0: one product of features forward, and three backward.
    """
    if case.order == 0:
        product = 2 * case.n * case.m * FEATURES / ceilings.matrix
        return product, 4 * product
    if case.order == 1:
        ranked, scores = case.n * case.k, case.n * case.m
        forward = (8 * ranked + 4 * scores + 4 * ranked) / ceilings.copy
        backward = (8 * ranked + 4 * scores + 4 * ranked + 4 * scores) / ceilings.copy
        return forward, forward + backward
    scores, width = case.remaining_scores, (case.order - 1) * case.r
    taken = scores / ceilings.exponentials
    forward = max(taken, 2 * width * scores / ceilings.matrix)
    return forward, forward + max(taken, 6 * width * scores / ceilings.matrix)
