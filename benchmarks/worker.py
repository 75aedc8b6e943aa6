"""A provider in a fresh process of its own, answering one question at a time.

The parent keeps the workers of a case alive and asks them in turn, so that whatever else the
machine is doing hits all of them alike.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AnyCase
from benchmarks.check import Outcome, outcome
from benchmarks.measure import Sample, processor_clock, repeats_to_last
from benchmarks.memory import can_measure, peak_extra_bytes, peak_live_bytes
from benchmarks.providers import Build, Unavailable, first_line

SAMPLE_SECONDS = 0.02  # shorter calls are repeated within one sample


class WorkerFailed(Exception):
    """The provider raised, died or did not answer; the text says which."""


@dataclass(frozen=True)
class Checked:
    """First call's seconds, compilation included, and its result."""

    seconds: float
    outcome: Outcome


@dataclass(frozen=True)
class Peaks:
    """Bytes above those held before a forward+backward call.

    `live`: tensors alive at once. `resident`: with what the allocator keeps of freed ones.
    """

    live: int
    resident: int


class Worker:
    """The parent's end. Requests are names of methods of the session that `make` makes."""

    def __init__(self, make: Callable[[], "Session"], threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy the parent's memory
        self._scratch = tempfile.TemporaryDirectory(prefix="rankloss-benchmark-")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, make, threads, self._scratch.name)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that a dead worker ends the conversation

    def ask(self, timeout: float, request: str, *arguments: object) -> Any:
        """Return the answer, or raise Unavailable or WorkerFailed. `timeout` is in seconds."""
        try:
            self._connection.send((request, arguments))
            if not self._connection.poll(timeout):
                self._process.kill()
                raise WorkerFailed(f"no answer to {request!r} within {timeout:.0f} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerFailed(self._cause_of_death()) from error
        return _raised(answer)

    def stop(self) -> None:
        self._connection.close()  # an idle worker then ends by itself
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._scratch.cleanup()

    def _cause_of_death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        hint = " (killed: out of memory?)" if code == -9 else ""
        return f"its process ended with exit code {code}{hint}"


class Inline:
    """A worker without a process of its own, for dry runs: it starts at once, and cannot die."""

    def __init__(self, make: Callable[[], "Session"], threads: int) -> None:
        self._session = make()

    def ask(self, timeout: float, request: str, *arguments: object) -> Any:
        return _raised(_answer(self._session, request, arguments))

    def stop(self) -> None:
        del self._session


def _serve(
    connection: Connection, make: Callable[[], "Session"], threads: int, scratch: str
) -> None:
    tempfile.tempdir = scratch  # nothing compiled in another process is found there
    torch.set_num_threads(threads)
    session = make()
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answer(session, request, arguments))


def _answer(session: "Session", request: str, arguments: tuple[object, ...]) -> Any:
    """Return what the session answers, or the exception that the asker is to raise."""
    try:
        return getattr(session, request)(*arguments)
    except Unavailable as reason:
        return reason
    except Exception as error:
        return WorkerFailed(first_line(error))


def _raised(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


class Session:
    """The worker's end: the questions it answers."""

    def __init__(self, build: Build, device: str = "cpu") -> None:
        self._build, self.device = build, device
        self._case: AnyCase | None = None
        self._repeats = {"forward": 1, "step": 1}

    def check(self, case: AnyCase) -> Checked:
        """Build the loss of a case and answer it, timed with all that a first call compiles."""
        self._load(case)
        start = time.perf_counter()
        result = outcome(self._loss(), self._inputs.leaves)
        return Checked(time.perf_counter() - start, result)

    def warm_up(self, case: AnyCase) -> None:
        self._load(case)
        for name, call in self._calls.items():
            self._repeats[name] = repeats_to_last(SAMPLE_SECONDS, call)

    def sample(self, name: str) -> Sample:
        """One timing of "forward", recording for backward as in training, or of "step"."""
        return processor_clock(self._calls[name], self._repeats[name])

    def peaks(self) -> Peaks | None:
        if not can_measure():
            return None
        resident = peak_extra_bytes(self._step)
        return Peaks(live=peak_live_bytes(self._step), resident=resident)

    def _load(self, case: AnyCase) -> None:
        if case != self._case:
            self._inputs = case.inputs(device=self.device)
            self._loss = self._build(case, self._inputs)
            self._case = case

    @property
    def _calls(self) -> dict[str, Callable[[], object]]:
        return {"forward": self._loss, "step": self._step}

    def _step(self) -> tuple[Tensor, ...]:
        """Forward and backward, for the gradients of all leaves."""
        return torch.autograd.grad(self._loss(), list(self._inputs.leaves.values()))
