"""Runs one case: who can take part, whose answer is right, then timing in turn."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cases import AnyCase
from benchmarks.check import CHECK_SCORES, Outcome, errors, truth
from benchmarks.measure import Sample
from benchmarks.memory import free_bytes
from benchmarks.providers import OURS, Build, Provider, Unavailable
from benchmarks.rows import Row
from benchmarks.worker import Checked, Inline, Peaks, Session, Worker, WorkerFailed

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """Limits of a run, and where it runs.

    `seconds`: about how long the timing of one case may take, after LEAST_ROUNDS rounds.
    `deadline`: on the monotonic clock; nothing is asked after it. `session` answers for a provider,
    `worker` is where it lives, `free_bytes` says what memory is left there.
    """

    threads: int
    rounds: int = 15
    seconds: float = 8.0
    memory_share: float = 0.6  # of free memory one provider may be expected to need
    timeout: float = 300.0  # seconds for one answer
    deadline: float = math.inf
    compile: bool = True
    device: str = "cpu"
    session: Callable[[Build, str], Session] = Session
    worker: type[Worker] | type[Inline] = Worker
    free_bytes: Callable[[], int | None] = free_bytes


class Contender:
    """A row and the worker that fills it; a failure ends this one only."""

    def __init__(self, row: Row, provider: Provider, settings: Settings) -> None:
        self.row, self.settings = row, settings
        make = partial(settings.session, provider.build, settings.device)
        self.worker = settings.worker(make, settings.threads)

    def ask(self, request: str, *arguments: object) -> Any:
        """Return the answer, or None once the contender is out."""
        if not self.row.ok:
            return None
        left = self.settings.deadline - time.monotonic()
        if left <= 0:
            self.row.give_up("skipped", f"no time left for {request!r}")
            return None
        try:
            return self.worker.ask(min(self.settings.timeout, left), request, *arguments)
        except Unavailable as reason:
            self.row.give_up("skipped", str(reason))
        except WorkerFailed as reason:
            late = time.monotonic() >= self.settings.deadline
            self.row.give_up("skipped" if late else "failed", str(reason))
        return None


def run_case(case: AnyCase, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    """Check, time and measure every provider that takes part in the case."""
    rows, contenders = contend(case, providers, settings)
    try:
        check(contenders, case.with_at_most(CHECK_SCORES))
        _time(contenders, case, settings)
        _measure_memory(contenders)
    finally:
        for contender in contenders:
            contender.worker.stop()
    return rows


def contend(
    case: AnyCase, providers: Sequence[Provider], settings: Settings
) -> tuple[list[Row], list[Contender]]:
    """Rows of all providers, and contenders for those that need not be skipped."""
    rows, contenders = [], []
    for provider in (p for p in providers if p.takes(case)):
        row = Row(case.group, case.name, case.scores, provider.name)
        rows.append(row)
        if reason := reason_to_skip(provider, case, settings):
            row.give_up("skipped", reason)
        else:
            contenders.append(Contender(row, provider, settings))
    return rows, contenders


def reason_to_skip(provider: Provider, case: AnyCase, settings: Settings) -> str | None:
    if provider.compiles and not settings.compile:
        return "compilation was left out by request"
    if provider.most_scores is not None and case.scores > provider.most_scores:
        return f"limited to {provider.most_scores:.1e} scores, this case has {case.scores:.1e}"
    need, free = provider.bytes_needed(case), settings.free_bytes()
    if free is not None and need > settings.memory_share * free:
        return (
            f"needs about {need / 2**30:.0f} GiB, more than {settings.memory_share:.0%} of the "
            f"{free / 2**30:.0f} GiB free"
        )
    return None


def check(contenders: Sequence[Contender], case: AnyCase) -> None:
    """Compare answers with float64's; whoever is wrong is out."""
    expected: Outcome | None = None
    for contender in contenders:
        checked: Checked | None = contender.ask("check", case)
        if checked is None:
            continue
        expected = expected or truth(case, contender.settings.device)
        found, row = errors(checked.outcome, expected), contender.row
        row.checked, row.first_call_s = case.n, checked.seconds
        row.value_error, row.gradient_error = found.value, found.gradient
        if not found.acceptable(case.dtype, peer=row.provider != OURS):
            text = f"value {found.value:.1e}, gradient {found.gradient:.1e}"
            row.give_up("wrong", f"relative error: {text}; not timed")


def _time(contenders: Sequence[Contender], case: AnyCase, settings: Settings) -> None:
    for contender in contenders:
        contender.ask("warm_up", case)
    start, done, rounds = time.perf_counter(), 0, settings.rounds
    while done < rounds:
        first = done % max(1, len(contenders))  # each round another one goes first
        for contender in (*contenders[first:], *contenders[:first]):
            forward, step = contender.ask("sample", "forward"), contender.ask("sample", "step")
            if contender.row.ok:
                _append(contender.row, forward, step)
        done += 1
        one_round = (time.perf_counter() - start) / done
        rounds = min(settings.rounds, max(LEAST_ROUNDS, int(settings.seconds / one_round)))


def _append(row: Row, forward: Sample, step: Sample) -> None:
    row.forward.append(1e3 * forward.wall)
    row.forward_cpu.append(1e3 * forward.cpu)
    row.step.append(1e3 * step.wall)
    row.step_cpu.append(1e3 * step.cpu)


def _measure_memory(contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        peaks: Peaks | None = contender.ask("peaks")
        if peaks is not None:
            contender.row.peak_mb = peaks.live / 1e6
            contender.row.resident_mb = peaks.resident / 1e6
