"""Runs one case: who can take part, whose answer is right, then timing in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.cases import Case
from benchmarks.check import Errors, Outcome, check_case, errors, truth
from benchmarks.measure import Sample
from benchmarks.memory import free_bytes
from benchmarks.providers import Provider, Unavailable
from benchmarks.worker import Checked, Peaks, Worker, WorkerFailed

LEAST_ROUNDS = 5

Status = Literal["ok", "skipped", "failed", "wrong"]


@dataclass(frozen=True)
class Settings:
    """`seconds`: about how long the timing of one case may take, after LEAST_ROUNDS rounds."""

    threads: int
    rounds: int = 15
    seconds: float = 8.0
    memory_share: float = 0.6  # of free memory one provider may be expected to need
    timeout: float = 300.0  # seconds for one answer
    compile: bool = True


@dataclass
class Result:
    """What is known of one provider at one case; samples are paired by round across providers."""

    provider: Provider
    status: Status = "ok"
    detail: str = ""
    first_call: float | None = None  # seconds
    errors: Errors | None = None
    forward: list[Sample] = field(default_factory=list)
    step: list[Sample] = field(default_factory=list)
    peaks: Peaks | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def give_up(self, status: Status, detail: str) -> None:
        self.status, self.detail = status, detail
        self.forward, self.step, self.peaks = [], [], None


@dataclass(frozen=True)
class CaseResult:
    case: Case
    checked_anchors: int  # how many of the N anchors the check had
    results: list[Result]
    seconds: float

    def of(self, name: str) -> Result | None:
        """The named provider's result if it was measured."""
        return next((r for r in self.results if r.provider.name == name and r.ok), None)


@dataclass(frozen=True)
class _Contender:
    """A result and the worker that fills it; a failure ends this one only."""

    result: Result
    worker: Worker
    timeout: float

    def ask(self, request: str, *arguments: object) -> Any:
        """The answer, or None once the contender is out."""
        if not self.result.ok:
            return None
        try:
            return self.worker.ask(self.timeout, request, *arguments)
        except Unavailable as reason:
            self.result.give_up("skipped", str(reason))
        except WorkerFailed as reason:
            self.result.give_up("failed", str(reason))
        return None


def run_case(case: Case, providers: Sequence[Provider], settings: Settings) -> CaseResult:
    start = time.perf_counter()
    results = [Result(provider) for provider in providers if provider.takes(case)]
    for result in results:
        reason = reason_to_skip(result.provider, case, settings)
        if reason:
            result.give_up("skipped", reason)
    contenders = [
        _Contender(result, Worker(result.provider.build, settings.threads), settings.timeout)
        for result in results
        if result.ok
    ]
    checked = check_case(case)
    try:
        _check(contenders, checked)
        _time(contenders, case, settings)
        _measure_memory(contenders)
    finally:
        for contender in contenders:
            contender.worker.stop()
    return CaseResult(case, checked.n, results, time.perf_counter() - start)


def reason_to_skip(provider: Provider, case: Case, settings: Settings) -> str | None:
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


def _check(contenders: Sequence[_Contender], case: Case) -> None:
    expected: Outcome | None = None
    for contender in contenders:
        checked: Checked | None = contender.ask("check", case)
        if checked is None:
            continue
        expected = expected or truth(case)
        result = contender.result
        result.first_call = checked.seconds
        result.errors = errors(checked.outcome, expected)
        if not result.errors.acceptable:
            found = f"value {result.errors.value:.1e}, gradient {result.errors.gradient:.1e}"
            result.give_up("wrong", f"relative error: {found}; not timed")


def _time(contenders: Sequence[_Contender], case: Case, settings: Settings) -> None:
    for contender in contenders:
        contender.ask("warm_up", case)
    start, done, rounds = time.perf_counter(), 0, settings.rounds
    while done < rounds:
        for contender in _rotated(contenders, done):
            forward, step = contender.ask("sample", "forward"), contender.ask("sample", "step")
            if contender.result.ok:
                contender.result.forward.append(forward)
                contender.result.step.append(step)
        done += 1
        one_round = (time.perf_counter() - start) / done
        rounds = min(settings.rounds, max(LEAST_ROUNDS, int(settings.seconds / one_round)))


def _rotated(contenders: Sequence[_Contender], by: int) -> Sequence[_Contender]:
    """Each round another one goes first."""
    by %= max(1, len(contenders))
    return [*contenders[by:], *contenders[:by]]


def _measure_memory(contenders: Sequence[_Contender]) -> None:
    for contender in contenders:
        contender.result.peaks = contender.ask("peaks")
