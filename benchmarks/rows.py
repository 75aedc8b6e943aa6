"""Rows of results: one for each provider at each case, and the file they are kept in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.measure import Spread, paired_ratios, spread
from examples.common.reports import json_text, rounded

VERSION = 2


@dataclass
class Row:
    """One provider at one case. Times are milliseconds, samples paired by round across providers.

    `scores`: how many the case has; `checked`: how many anchors the check of the answer had.
    `detail` says why where the status is not "ok".
    """

    group: str
    case: str
    scores: int
    provider: str
    status: str = "ok"  # or "skipped", "failed", "wrong"
    detail: str = ""
    checked: int = 0
    first_call_s: float | None = None
    value_error: float | None = None  # relative
    gradient_error: float | None = None
    peak_mb: float | None = None  # of tensors alive at once, beyond the inputs; 1e6 bytes
    resident_mb: float | None = None  # the same with what the allocator keeps of freed ones
    forward: list[float] = field(default_factory=list)  # on the wall
    forward_cpu: list[float] = field(default_factory=list)  # summed over all threads
    step: list[float] = field(default_factory=list)  # forward and backward
    step_cpu: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)  # on a GPU: of kernels, and of limits

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def give_up(self, status: str, detail: str) -> None:
        self.status, self.detail = status, detail
        self.forward, self.forward_cpu, self.step, self.step_cpu = [], [], [], []
        self.peak_mb = self.resident_mb = None

    def time_over(self, other: "Row", clock: str = "step") -> Spread:
        """Ratio of two providers' times at one case; `clock` is the name of a list of samples."""
        return spread(paired_ratios(getattr(self, clock), getattr(other, clock)))


def find(rows: Sequence[Row], case: str, provider: str) -> Row | None:
    """The row of that provider at that case if it was measured."""
    found = (row for row in rows if row.ok and (row.case, row.provider) == (case, provider))
    return next(found, None)


def to_json(machine: dict[str, Any], rows: Sequence[Row], targets: Sequence[Any]) -> str:
    """One line for each row, all samples in it, of six digits; empty fields are left out."""
    listed = {
        name: [_compact(asdict(item)) for item in items]
        for name, items in (("rows", rows), ("targets", targets))
    }
    return json_text({"version": VERSION, "machine": machine, **listed}, "rows", "targets")


def from_json(text: str) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows; targets are judged again from these."""
    content = json.loads(text)
    if content["version"] != VERSION:
        raise ValueError(f"results of version {content['version']}, need {VERSION}: measure again")
    return content["machine"], [Row(**row) for row in content["rows"]]


def _compact(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: rounded(x, 6) for name, x in fields.items() if x not in (None, "", [], {})}
