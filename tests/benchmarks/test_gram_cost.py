"""The Gram benchmark at a tiny size: what it checks, measures and writes."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks import gram
from benchmarks.check import Outcome
from benchmarks.worker import Checked


def test_it_measures_both_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--batch", "4", "--patches", "64", "--student-width", "4", "--teacher-width", "6"]
    files = ["--json", str(tmp_path / "gram.json"), "--markdown", str(tmp_path / "gram.md")]
    assert gram.main([*sizes, *files, "--rounds", "2", "--threads", "1"]) == 0
    data = json.loads((tmp_path / "gram.json").read_text())
    assert data["case"]["patches"] == 64
    assert set(data["implementations"]) == set(gram.IMPLEMENTATIONS)
    for one in data["implementations"].values():
        assert len(one["samples"]) == 2
        assert all(sample["wall"] > 0 and sample["cpu"] > 0 for sample in one["samples"])
    assert data["ratios"]["wall"]["median"] > 0
    text = (tmp_path / "gram.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| blocked |" in text
    assert "B=4, P=64, widths 4 and 6, negatives 'keep'" in text


class Disagreeing:
    """Stands for a worker process; the blocked implementation's gradient is off."""

    asked: ClassVar[list[str]] = []

    def __init__(self, build: Any, threads: int) -> None:
        self.gradient = 1.001 if build.args[1] == "blocked" else 1.0

    def ask(self, seconds: float, request: str, *arguments: object) -> Checked:
        self.asked.append(request)
        return Checked(0.0, Outcome(2.0, {"student": np.array([self.gradient, -1.0])}))

    def stop(self) -> None:
        self.asked.append("stop")


def test_nothing_is_timed_when_the_implementations_disagree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gram, "Worker", Disagreeing)
    with pytest.raises(ValueError, match="blocked is wrong"):
        gram.measure(gram.GramCase(2, 4, 3, 3, "keep"), rounds=1, threads=1)
    assert Disagreeing.asked == ["check", "check", "stop", "stop"]
