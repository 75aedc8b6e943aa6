"""The GPU command, run on the CPU: the same code on tiny shapes, in Triton's interpreter."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import square_case
from benchmarks.gpu import STAGES, promises
from benchmarks.gpu_measure import Bench, OutOfTime, at_most
from benchmarks.gpu_problems import Ceilings, least_seconds, make_problem
from benchmarks.gpu_providers import build_flex, build_naive, build_ours
from benchmarks.providers import OURS

ROOT = Path(__file__).resolve().parents[2]


def command(*options: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "benchmarks", "gpu", *options]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="the interpreter comes with Triton")
    out = tmp_path_factory.mktemp("gpu")
    done = command("--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{stage}.json").read_text())["rows"]
    return found


def test_checks_pass_and_say_what_was_not_made(folder: Path) -> None:
    found = {row["name"]: row["status"] for row in rows(folder, "checks")}
    assert [x for x in found if found[x] != "ok"] == ["CUDA graph capture and replay"]
    for words in ("repeat bit for bit", "order 1", "order 4", "order 0"):
        assert any(words in name for name in found)


def test_every_provider_is_measured_or_says_why_not(folder: Path) -> None:
    losses: dict[str, list[float]] = {}
    for row in rows(folder, "losses")[1:]:
        assert row["status"] == "ok" or row["detail"]
        if row["status"] == "ok":
            losses.setdefault(row["name"].split(":")[0], []).append(row["loss"])
    assert len(losses) == 3
    for values in losses.values():  # they all compute the same
        assert max(values) - min(values) < 1e-3 * max(1.0, abs(values[0]))
    assert {row["status"] for row in rows(folder, "kernels")} == {"ok"}


def test_stages_that_are_done_are_not_run_again(folder: Path) -> None:
    before = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in STAGES}
    (folder / "kernels.json").unlink()
    assert command("--dry-run", "--out", str(folder)).returncode == 0
    after = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in STAGES}
    assert [name for name in STAGES if after[name] != before[name]] == ["kernels"]


def test_nothing_of_a_dry_run_passes_for_a_measurement(folder: Path) -> None:
    text = (folder / "gpu.md").read_text()
    assert "Dry run on a CPU" in text
    assert all("not measured" in line for line in promises(folder))


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = command("--out", str(tmp_path))
    assert done.returncode == 1
    assert "no GPU here" in done.stdout


# ---------------------------------------------------------------- parts


def test_promises_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    case = asdict(square_case(3, 1024))
    times = {OURS: 1.0, "FlexAttention": 3.0, "naive compiled": 20.0}
    found = [
        {"name": name, "provider": name, "status": "ok", "case": case, "ms": ms}
        for name, ms in times.items()
    ]
    found[0]["share of the limit"] = 0.55
    content = {"dry_run": False, "rows": [{"name": "ceilings", "status": "ok"}, *found]}
    (tmp_path / "losses.json").write_text(json.dumps(content))
    lines = promises(tmp_path)
    assert "55% of the limit" in lines[0]
    assert "FlexAttention takes 3.0x" in lines[1]
    assert "naive compiled takes 20.0x" in lines[2]
    assert "not measured" in lines[3]


def test_limits_of_the_method() -> None:
    """METHOD: at order 3, r = 32, an H200's exponentials bound forward, its products backward."""
    case, rates = square_case(3, 1024), Ceilings(4.3e12, 7.9e14, 3.7e12)
    scores = 1024 * 1024 * 1025 / 2
    forward, both = least_seconds(case, rates)
    assert scores / forward == pytest.approx(3.7e12)
    assert scores / (both - forward) == pytest.approx(7.9e14 / 384)


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
