"""The suite from end to end at tiny sizes: reports are whole and a failure stays alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu
from benchmarks.__main__ import main
from benchmarks.cases import Case, Inputs, square_case
from benchmarks.measure import Sample
from benchmarks.providers import OURS, Loss, Provider, Unavailable, build_naive
from benchmarks.report import as_json, markdown, terminal
from benchmarks.suite import CaseResult, Result, Settings, reason_to_skip, run_case
from benchmarks.summary import summary
from benchmarks.targets import targets
from benchmarks.worker import Peaks

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(threads=1, rounds=3, seconds=0.1, timeout=60.0)


def build_raising(case: Case, inputs: Inputs) -> Loss:
    raise RuntimeError("this provider is broken\nsecond line")


def build_dying(case: Case, inputs: Inputs) -> Loss:
    """Dies without a word on its fourth call, when it is being timed."""
    naive, calls = build_naive(case, inputs), [0]

    def loss() -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            os._exit(3)
        return naive()

    return loss


def build_wrong(case: Case, inputs: Inputs) -> Loss:
    naive = build_naive(case, inputs)
    return lambda: 1.01 * naive()


def build_unavailable(case: Case, inputs: Inputs) -> Loss:
    raise Unavailable("no such compiler")


@pytest.fixture(scope="module")
def mixed() -> CaseResult:
    providers = [
        Provider(OURS, build_naive),
        Provider("raising", build_raising),
        Provider("dying", build_dying),
        Provider("wrong", build_wrong),
        Provider("unavailable", build_unavailable),
        Provider("too large", build_naive, tensors=1e12),
        Provider("another order", build_naive, lowest_order=3),
    ]
    return run_case(square_case(1, 8), providers, QUICK)


def test_a_failing_provider_is_reported_and_the_others_remain(mixed: CaseResult) -> None:
    found = {result.provider.name: result for result in mixed.results}
    assert {name: result.status for name, result in found.items()} == {
        OURS: "ok",
        "raising": "failed",
        "dying": "failed",
        "wrong": "wrong",
        "unavailable": "skipped",
        "too large": "skipped",
    }
    assert found["raising"].detail == "RuntimeError: this provider is broken"
    assert "exit code 3" in found["dying"].detail
    assert "not timed" in found["wrong"].detail
    assert "GiB" in found["too large"].detail
    assert len(found[OURS].step) == len(found[OURS].forward) == 3
    assert not found["dying"].step
    assert not found["wrong"].step
    assert found[OURS].peaks is not None


def test_every_report_names_every_provider(mixed: CaseResult) -> None:
    content = as_json({}, [mixed], targets([mixed]))
    assert len(json.loads(json.dumps(content, allow_nan=False))["cases"][0]["providers"]) == 6
    for text in (terminal(mixed), markdown({}, [mixed], targets([mixed]))):
        for result in mixed.results:
            assert result.provider.name in text
            assert result.detail in text


def test_a_silent_provider_is_given_up() -> None:
    settings = Settings(threads=1, rounds=1, timeout=0.0)
    done = run_case(square_case(1, 8), [Provider("silent", build_naive)], settings)
    assert done.results[0].status == "failed"
    assert "no answer" in done.results[0].detail


def test_quick_run_writes_json_with_all_fields(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--orders", "3", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "order 3, N=K=M=16" in done.stdout
    assert "targets" in done.stdout
    content = json.loads(file.read_text())
    assert set(content) == {"version", "machine", "cases", "targets"}
    assert content["machine"]["threads"] >= 1
    (case,) = content["cases"]
    assert (case["order"], case["n"], case["k"], case["m"], case["scores"]) == (3, 16, 16, 16, 4096)
    by_name = {entry["provider"]: entry for entry in case["providers"]}
    assert set(by_name) == {OURS, "naive", "naive compiled"}
    assert by_name["naive compiled"]["status"] == "skipped"
    for name in (OURS, "naive"):
        _assert_whole(by_name[name])


def test_summary_has_a_row_for_every_case_and_the_missed_targets(mixed: CaseResult) -> None:
    content = as_json({"processor": "P", "threads": 1, "torch": "T", "date": "D"}, [mixed], [])
    verdicts = [("kept", True), ("broken", False), ("not measured", None)]
    content["targets"] = [
        {"name": name, "measured": "1x", "required": "2x", "met": met} for name, met in verdicts
    ]
    text = summary(content)
    (row,) = [line for line in text.splitlines() if line.startswith("| order")]
    assert row.startswith("| order 1, N=K=M=8 | ")
    assert row.count("|") == 8
    assert "1 of 2 measured targets met. Missed: broken: 1x (2x)." in text
    assert "P, 1 threads, torch T, D." in text


def _assert_whole(entry: dict[str, Any]) -> None:
    assert entry["status"] == "ok", entry["detail"]
    assert entry["value_error"] < 1e-5
    assert entry["gradient_error"] < 1e-5
    for timing in (entry["forward"], entry["forward_backward"]):
        for figures in (timing["wall_ms"], timing["processor_ms"]):
            assert len(figures["samples"]) == 3
            assert figures["min"] <= figures["median"] <= max(figures["samples"])
    for figures in (entry["time_over_rankloss"], entry["processor_over_rankloss"]):
        assert figures["first_quartile"] <= figures["median"] <= figures["third_quartile"]
    for field in ("ns_per_score", "first_call_s", "peak_extra_mb", "peak_extra_resident_mb"):
        assert isinstance(entry[field], float)


def test_skipping_by_size_memory_and_request() -> None:
    case, settings = square_case(3, 64), Settings(threads=1, compile=False)
    assert reason_to_skip(Provider("fits", build_naive, tensors=6), case, settings) is None
    limited = reason_to_skip(Provider("limited", build_naive, most_scores=10), case, settings)
    assert limited is not None
    assert "limited" in limited
    compiled = reason_to_skip(Provider("compiled", build_naive, compiles=True), case, settings)
    assert compiled is not None
    assert "request" in compiled


def known(order: int, size: int, times: dict[str, float], peaks: dict[str, int]) -> CaseResult:
    results = []
    for name, seconds in times.items():
        result = Result(Provider(name, build_naive), peaks=Peaks(peaks[name], peaks[name]))
        result.step = result.forward = [Sample(seconds, seconds)] * 3
        results.append(result)
    return CaseResult(square_case(order, size), size, results, 1.0)


def test_targets_are_judged_by_the_stated_limits() -> None:
    def verdicts(naive: float, peak: int, growth: float, order1: float) -> list[bool | None]:
        done = [
            known(3, 256, {OURS: 1.0}, {OURS: 1}),
            known(3, 512, {OURS: 1.0, "naive": naive}, {OURS: peak, "naive": 2000}),
            known(3, 1024, {OURS: 64.0 * growth}, {OURS: 118_990_000 + peak * 10_000}),
            known(1, 512, {OURS: order1, "list_mle": 1.0}, {OURS: 1, "list_mle": 1}),
        ]
        return [target.met for target in targets(done)]

    assert verdicts(2.6, 100, 1.2, 1.29) == [True] * 5
    assert verdicts(2.4, 101, 1.3, 1.31) == [False] * 5
    assert [target.met for target in targets([])] == [None] * 4


def test_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["cpu", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main(["--sizes", "0"])
    assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err
    names = [provider.name for provider in cpu.chosen_providers(["naive", "reference"])]
    assert names == ["naive", "reference"]
