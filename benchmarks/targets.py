"""The project's promises for two cores, each with what was measured; information, not a test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measure import Spread, paired_ratios, spread
from benchmarks.providers import OURS
from benchmarks.suite import CaseResult, Result

CONSTANT = 1.25  # the most that "constant" time per score may grow: timing noise included


@dataclass(frozen=True)
class Target:
    """`met` is None where the case or the peer was not measured."""

    name: str
    required: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def targets(done: Sequence[CaseResult]) -> list[Target]:
    found = [
        _speed_over_naive(_square(done, 3, 512)),
        _memory_under_naive(_square(done, 3, 512)),
        _memory_at_1024(_square(done, 3, 1024)),
        _time_per_score(_square(done, 3, 256), _square(done, 3, 1024)),
    ]
    found += [_time_of_peer(case, "list_mle", 1.3) for case in _of_order(done, 1)]
    found += [_time_of_peer(case, "open_clip", 1.1) for case in _of_order(done, 0)]
    return found


def _of_order(done: Sequence[CaseResult], order: int) -> list[CaseResult]:
    return [case for case in done if case.case.order == order]


def _square(done: Sequence[CaseResult], order: int, size: int) -> CaseResult | None:
    for result in _of_order(done, order):
        if result.case.n == result.case.k == result.case.m == size:
            return result
    return None


def _missing(name: str, required: str) -> Target:
    return Target(name, required, "-", None)


def _pair(case: CaseResult | None, peer: str) -> tuple[Result, Result] | None:
    ours, theirs = (case.of(OURS), case.of(peer)) if case else (None, None)
    return (ours, theirs) if ours and theirs else None


def _ratio(above: Result, below: Result, of: str = "wall") -> Spread:
    """Of forward+backward times, round by round; `of` is "wall" or "cpu"."""
    sides = ([getattr(sample, of) for sample in side.step] for side in (above, below))
    return spread(paired_ratios(*sides))


def _text(above: Result, below: Result) -> str:
    wall, cpu = _ratio(above, below), _ratio(above, below, "cpu")
    return (
        f"{wall.median:.2f}x [{wall.low:.2f}-{wall.high:.2f}], "
        f"processor time {cpu.median:.2f}x [{cpu.low:.2f}-{cpu.high:.2f}]"
    )


def _speed_over_naive(case: CaseResult | None) -> Target:
    name, required = "order 3, N=K=M=512: naive's time over ours", "at least 2.5x"
    pair = _pair(case, "naive")
    if pair is None:
        return _missing(name, required)
    ours, naive = pair
    return Target(name, required, _text(naive, ours), _ratio(naive, ours).median >= 2.5)


def _time_of_peer(case: CaseResult, peer: str, limit: float) -> Target:
    name, required = f"{case.case.name}: our time over {peer}'s", f"at most {limit}x"
    pair = _pair(case, peer)
    if pair is None:
        return _missing(name, required)
    ours, theirs = pair
    return Target(name, required, _text(ours, theirs), _ratio(ours, theirs).median <= limit)


def _memory_under_naive(case: CaseResult | None) -> Target:
    name, required = "order 3, N=K=M=512: our peak over naive's", "at most 1/20"
    pair = _pair(case, "naive")
    if pair is None or pair[0].peaks is None or pair[1].peaks is None:
        return _missing(name, required)
    ours, naive = pair[0].peaks.live, pair[1].peaks.live
    measured = f"{ours / 1e6:.1f} of {naive / 1e6:.0f} MB, 1/{naive / max(ours, 1):.0f}"
    return Target(name, required, measured, 20 * ours <= naive)


def _memory_at_1024(case: CaseResult | None) -> Target:
    name, required = "order 3, N=K=M=1024: our peak", "under 120 MB"
    ours = case.of(OURS) if case else None
    if ours is None or ours.peaks is None:
        return _missing(name, required)
    live, resident = ours.peaks.live / 1e6, ours.peaks.resident / 1e6
    measured = f"{live:.1f} MB ({resident:.1f} MB with the allocator's leftovers)"
    return Target(name, required, measured, live < 120)


def _time_per_score(small: CaseResult | None, large: CaseResult | None) -> Target:
    """Cases run at different times, so their fastest rounds are compared: the least disturbed."""
    name = "order 3: time per score at N=K=M=1024 over that at 256"
    required = f"constant, at most {CONSTANT}x"
    ours = [case.of(OURS) if case else None for case in (small, large)]
    if small is None or large is None or ours[0] is None or ours[1] is None:
        return _missing(name, required)

    def growth(of: Callable[[Result], float]) -> float:
        assert ours[0] is not None
        assert ours[1] is not None
        return (of(ours[1]) / large.case.scores) / (of(ours[0]) / small.case.scores)

    wall = growth(lambda result: min(sample.wall for sample in result.step))
    cpu = growth(lambda result: min(sample.cpu for sample in result.step))
    median = growth(lambda result: spread([sample.wall for sample in result.step]).median)
    measured = f"{wall:.2f}x of minima, {median:.2f}x of medians, processor time {cpu:.2f}x"
    return Target(name, required, measured, wall <= CONSTANT)
