"""The project's promises for two cores, each with its measurement; information, not a test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.measure import Spread, spread
from benchmarks.providers import OURS
from benchmarks.rows import Row, find

CONSTANT = 1.25  # the most that "constant" time per score may grow: timing noise included
GRAM = "gram, B=64, P=1024, widths 384 and 768"


@dataclass(frozen=True)
class Target:
    """A promise; `met` is None where the case or the peer was not measured."""

    name: str
    required: str
    measured: str = "-"
    met: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "not met", None: "not measured"}[self.met]


def targets(rows: Sequence[Row]) -> list[Target]:
    """Every promise of the groups measured, and the four of the third order in any case."""
    size512, gram = "order 3, N=K=M=512", {row.case for row in rows if row.group == "gram"}
    found = [
        _speed_over(rows, size512, "naive", 2.5),
        _memory_under(rows, size512, "naive", 20),
        _memory_at_1024(rows),
        _time_per_score(rows),
    ]
    for group, peer, limit in (("order 1", "list_mle", 1.3), ("order 0", "open_clip", 1.1)):
        of_group = dict.fromkeys(row.case for row in rows if row.group == group)
        found += [_time_of_peer(rows, case, peer, limit) for case in of_group]
    if GRAM in gram:
        found.append(_time_of_peer(rows, GRAM, "reference", 1.2))
        found.append(_memory_under(rows, GRAM, "reference", 4))
    return found


def gpu_targets(rows: Sequence[Row]) -> list[Target]:
    """Promises for the two largest third-order squares with tables in bfloat16."""
    found = []
    for size in (1024, 4096):
        case = f"order 3, N=K=M={size}, bfloat16"
        ours, name = find(rows, case, OURS), f"{case}: share of the limit"
        share = None if ours is None else ours.figures.get("share of the limit")
        text, met = ("-", None) if share is None else (f"{share:.0%}", share >= 0.5)
        found.append(Target(name, "at least 50%", text, met))
        for peer, least in (("FlexAttention", 2.0), ("naive compiled", 15.0)):
            found.append(_speed_over(rows, case, peer, least))
    return found


def _ratio_text(wall: Spread, cpu: Spread) -> str:
    return (
        f"{wall.median:.2f}x [{wall.low:.2f}-{wall.high:.2f}], "
        f"CPU time {cpu.median:.2f}x [{cpu.low:.2f}-{cpu.high:.2f}]"
    )


def _speed_over(rows: Sequence[Row], case: str, peer: str, least: float) -> Target:
    promise = Target(f"{case}: {peer}'s time over ours", f"at least {least}x")
    return _ratio(promise, find(rows, case, peer), find(rows, case, OURS), lambda x: x >= least)


def _time_of_peer(rows: Sequence[Row], case: str, peer: str, most: float) -> Target:
    promise = Target(f"{case}: our time over {peer}'s", f"at most {most}x")
    return _ratio(promise, find(rows, case, OURS), find(rows, case, peer), lambda x: x <= most)


def _ratio(
    promise: Target, above: Row | None, below: Row | None, kept: Callable[[float], bool]
) -> Target:
    """Judge a promise by the ratio of two rows' times."""
    if above is None or below is None:
        return promise
    wall, cpu = above.time_over(below), above.time_over(below, "step_cpu")
    return replace(promise, measured=_ratio_text(wall, cpu), met=kept(wall.median))


def _memory_under(rows: Sequence[Row], case: str, peer: str, times: int) -> Target:
    name, required = f"{case}: our peak over {peer}'s", f"at most 1/{times}"
    ours, theirs = find(rows, case, OURS), find(rows, case, peer)
    if ours is None or theirs is None or ours.peak_mb is None or theirs.peak_mb is None:
        return Target(name, required)
    saved = theirs.peak_mb / max(ours.peak_mb, 1e-6)
    text = f"{ours.peak_mb:.1f} of {theirs.peak_mb:.0f} MB, 1/{saved:.0f}"
    return Target(name, required, text, times * ours.peak_mb <= theirs.peak_mb)


def _memory_at_1024(rows: Sequence[Row]) -> Target:
    name, required = "order 3, N=K=M=1024: our peak", "under 120 MB"
    ours = find(rows, "order 3, N=K=M=1024", OURS)
    if ours is None or ours.peak_mb is None:
        return Target(name, required)
    text = f"{ours.peak_mb:.1f} MB ({ours.resident_mb:.1f} MB with the allocator's leftovers)"
    return Target(name, required, text, ours.peak_mb < 120)


def _time_per_score(rows: Sequence[Row]) -> Target:
    """Cases run at different times, so their fastest rounds are compared: the least disturbed."""
    name = "order 3: time per score at N=K=M=1024 over that at 256"
    required = f"constant, at most {CONSTANT}x"
    small, large = (find(rows, f"order 3, N=K=M={size}", OURS) for size in (256, 1024))
    if small is None or large is None:
        return Target(name, required)
    scores = large.scores / small.scores
    wall = min(large.step) / min(small.step) / scores
    cpu = min(large.step_cpu) / min(small.step_cpu) / scores
    median = spread(large.step).median / spread(small.step).median / scores
    text = f"{wall:.2f}x of minima, {median:.2f}x of medians, CPU time {cpu:.2f}x"
    return Target(name, required, text, wall <= CONSTANT)
