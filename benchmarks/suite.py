"""Runs one case: who can take part, whose answer is right, then timing in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import AnyCase
from benchmarks.check import CHECK_SCORES, Outcome, errors, truth
from benchmarks.measure import Sample
from benchmarks.memory import free_bytes
from benchmarks.providers import Provider, Unavailable
from benchmarks.rows import Row
from benchmarks.worker import Checked, Peaks, Worker, WorkerFailed

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """`seconds`: about how long the timing of one case may take, after LEAST_ROUNDS rounds."""

    threads: int
    rounds: int = 15
    seconds: float = 8.0
    memory_share: float = 0.6  # of free memory one provider may be expected to need
    timeout: float = 300.0  # seconds for one answer
    compile: bool = True


@dataclass(frozen=True)
class _Contender:
    """A row and the worker that fills it; a failure ends this one only."""

    row: Row
    worker: Worker
    timeout: float

    def ask(self, request: str, *arguments: object) -> Any:
        """Return the answer, or None once the contender is out."""
        if not self.row.ok:
            return None
        try:
            return self.worker.ask(self.timeout, request, *arguments)
        except Unavailable as reason:
            self.row.give_up("skipped", str(reason))
        except WorkerFailed as reason:
            self.row.give_up("failed", str(reason))
        return None


def run_case(case: AnyCase, providers: Sequence[Provider], settings: Settings) -> list[Row]:
    rows, contenders = [], []
    checked = case.with_at_most(CHECK_SCORES)
    for provider in (p for p in providers if p.takes(case)):
        row = Row(case.group, case.name, case.scores, provider.name, checked=checked.n)
        rows.append(row)
        if reason := reason_to_skip(provider, case, settings):
            row.give_up("skipped", reason)
        else:
            worker = Worker(provider.build, settings.threads)
            contenders.append(_Contender(row, worker, settings.timeout))
    try:
        _check(contenders, checked)
        _time(contenders, case, settings)
        _measure_memory(contenders)
    finally:
        for contender in contenders:
            contender.worker.stop()
    return rows


def reason_to_skip(provider: Provider, case: AnyCase, settings: Settings) -> str | None:
    if provider.compiles and not settings.compile:
        return "compilation was left out by request"
    if provider.most_scores is not None and case.scores > provider.most_scores:
        return f"limited to {provider.most_scores:.1e} scores, this case has {case.scores:.1e}"
    need, free = provider.bytes_needed(case), free_bytes()
    if free is not None and need > settings.memory_share * free:
        return (
            f"needs about {need / 2**30:.0f} GiB, more than {settings.memory_share:.0%} of the "
            f"{free / 2**30:.0f} GiB free"
        )
    return None


def _check(contenders: Sequence[_Contender], case: AnyCase) -> None:
    expected: Outcome | None = None
    for contender in contenders:
        checked: Checked | None = contender.ask("check", case)
        if checked is None:
            continue
        expected = expected or truth(case)
        found, row = errors(checked.outcome, expected), contender.row
        row.first_call_s = checked.seconds
        row.value_error, row.gradient_error = found.value, found.gradient
        if not found.acceptable:
            text = f"value {found.value:.1e}, gradient {found.gradient:.1e}"
            row.give_up("wrong", f"relative error: {text}; not timed")


def _time(contenders: Sequence[_Contender], case: AnyCase, settings: Settings) -> None:
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


def _measure_memory(contenders: Sequence[_Contender]) -> None:
    for contender in contenders:
        peaks: Peaks | None = contender.ask("peaks")
        if peaks is not None:
            contender.row.peak_mb = peaks.live / 1e6
            contender.row.resident_mb = peaks.resident / 1e6
