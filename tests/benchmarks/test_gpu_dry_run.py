"""The GPU command, run on the CPU: the same code on tiny shapes, in Triton's interpreter."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import square_case
from benchmarks.gpu_measure import Bench, OutOfTime, at_most
from benchmarks.gpu_problems import REAL, Ceilings, least_seconds, make_problem
from benchmarks.gpu_providers import build_flex, build_naive, build_ours
from benchmarks.gpu_report import CaseRecord, Measured, Record, targets, write
from benchmarks.providers import OURS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="the interpreter comes with Triton")
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--tune", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def test_checks_pass_and_say_what_was_not_made(content: dict[str, Any]) -> None:
    verdicts = {check["name"]: check["passed"] for check in content["checks"]}
    assert False not in verdicts.values()
    not_made = [name for name, passed in verdicts.items() if passed is None]
    assert not_made == ["CUDA graph capture and replay", "all of these in bfloat16"]
    for words in ("peaked scores", "repeat bit for bit", "order 1", "order 4", "order 0"):
        assert any(words in name for name in verdicts)


def test_every_provider_is_measured_or_says_why_not(content: dict[str, Any]) -> None:
    seen: dict[str, set[str]] = {}
    for case in content["cases"]:
        for measured in case["measured"]:
            seen.setdefault(measured["provider"], set()).add(measured["status"])
            assert measured["detail"] or measured["step"]
            assert measured["status"] != "ok" or measured["loss"] is not None
    for provider in (OURS, "rankloss dense", "naive", "naive compiled", "list_mle"):
        assert seen[provider] == {"ok"}
    assert {"FlexAttention", "open_clip", "linear_cross_entropy"} <= set(seen)
    assert {case["case"]["order"] for case in content["cases"]} == {0, 1, 2, 3}


def test_losses_of_all_providers_agree(content: dict[str, Any]) -> None:
    for case in content["cases"]:
        losses = [m["loss"] for m in case["measured"] if m["loss"] is not None]
        assert max(losses) - min(losses) < 1e-3 * max(1.0, abs(losses[0]))


def test_nothing_of_a_dry_run_passes_for_a_measurement(
    content: dict[str, Any], folder: Path
) -> None:
    assert content["dry_run"] is True
    assert content["targets"]
    for target in content["targets"]:
        assert target["met"] is None
        assert "dry run" in target["measured"]
    text = (folder / "gpu.md").read_text()
    assert "Dry run on a CPU" in text
    assert content["tuning"]
    assert content["machine"]["date"]
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.md"]


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", "unused"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU here" in done.stdout


# ---------------------------------------------------------------- parts


def known(order: int, size: int, seconds: dict[str, float], *, peaked: bool = False) -> CaseRecord:
    done = CaseRecord(square_case(order, size), peaked)
    for name, step in seconds.items():
        peak = 6 * size * size * 4
        done.measured.append(Measured(name, forward=[step / 2], step=[step], peak=peak))
    return done


def test_targets_are_judged_by_the_stated_limits() -> None:
    rates = Ceilings(copy=1e12, matrix=1e15, exponentials=1e12)

    def verdicts(share: float) -> list[bool | None]:
        record = Record({}, dry_run=False, ceilings=rates)
        for size in REAL.targets:
            full = least_seconds(square_case(3, size), rates)[1]
            ours = full / share
            times = {"naive": 40.4, "naive compiled": 15.2, "FlexAttention": 4}
            peers = {name: x * ours for name, x in times.items()}
            record.cases.append(known(3, size, {OURS: ours, **peers}))
            record.cases.append(known(3, size, {OURS: full / (2 * share)}, peaked=True))
        first = least_seconds(square_case(1, 4096), rates)[1]
        record.cases.append(known(1, 4096, {OURS: first / share * 0.7}))
        record.cases.append(known(0, 65536, {OURS: share, "open_clip": 0.6}))
        return [target.met for target in targets(record, REAL)]

    high_order = [True, True, True, True, True, True]
    assert verdicts(0.51) == [*high_order, *high_order, True, True, False]
    assert verdicts(0.49)[0] is False
    assert all(met is None for met in (t.met for t in targets(Record({}, False), REAL)))


def test_limits_of_the_method() -> None:
    """METHOD: at order 3, r = 32, an H200's exponentials bound forward, its products backward."""
    case, rates = square_case(3, 1024), Ceilings(4.3e12, 7.9e14, 3.7e12)
    scores = 1024 * 1024 * 1025 / 2
    forward, both = least_seconds(case, rates)
    assert scores / forward == pytest.approx(3.7e12)
    assert scores / (both - forward) == pytest.approx(7.9e14 / 384)


def test_written_results_are_whole_and_replace_older_ones(tmp_path: Path) -> None:
    record = Record({}, dry_run=False)
    record.cases.append(known(3, 1024, {OURS: float("nan")}))
    for seconds in (1.0, 2.0):
        record.seconds = seconds
        write(record, REAL, tmp_path)
        assert json.loads((tmp_path / "gpu.json").read_text())["seconds"] == seconds
    assert len(list(tmp_path.iterdir())) == 2


def test_a_measurement_stops_when_its_time_is_up() -> None:
    with pytest.raises(OutOfTime, match="no time left"), at_most(0):
        pass
    with pytest.raises(OutOfTime, match="stopped after"), at_most(0.05):
        time.sleep(60)


def test_flex_attention_computes_the_same_likelihood() -> None:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    for case in (square_case(3, 20), replace(square_case(4, 24), n=3, k=5)):
        problem = make_problem(case, torch.device("cpu"), torch.float32)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it should be compiled, said once
            flex = build_flex(problem, compiles=False)()
        torch.testing.assert_close(flex, build_naive(problem)().detach())
        torch.testing.assert_close(flex, build_ours(problem, "blocked")().detach())


def test_the_wall_clock_stands_in_for_events_without_a_gpu() -> None:
    bench = Bench(torch.device("cpu"))
    assert bench.peak_extra_bytes(lambda: None) is None
    assert len(bench.samples(lambda: None)) == 1
