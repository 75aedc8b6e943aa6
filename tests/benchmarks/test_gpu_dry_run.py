"""The GPU command, run on the CPU: the same code on tiny shapes, in Triton's interpreter."""

import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import square_case
from benchmarks.device import Ceilings, Device, least_seconds
from benchmarks.gpu import STAGES, counted_slots, markdown
from benchmarks.providers import NAIVE, OURS, Provider, build_flex, build_naive, build_ours
from benchmarks.rows import Row, from_json, to_json
from benchmarks.suite import run_case
from benchmarks.targets import gpu_targets
from benchmarks.worker import Inline
from tests.benchmarks.test_cpu import QUICK

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


def rows(folder: Path, stage: str) -> list[Row]:
    return from_json((folder / f"{stage}.json").read_text())[1]


def test_checks_pass_and_say_what_was_not_made(folder: Path) -> None:
    found = {row.case: row.status for row in rows(folder, "checks")}
    (unmade,) = [x for x in found if found[x] != "ok"]
    assert "CUDA graph capture and replay" in unmade
    for words in ("repeat bit for bit", "order 1", "order 4", "order 0"):
        assert any(words in name for name in found)
    errors = [row.gradient_error for row in rows(folder, "checks") if row.gradient_error]
    assert len(errors) == 4
    assert max(errors) < 1e-4


def test_every_provider_is_measured_or_says_why_not(folder: Path) -> None:
    ceilings, *found = rows(folder, "losses")
    assert min(ceilings.figures[name] for name in ("copy", "matrix", "exponentials")) > 0
    assert all(row.ok or row.detail for row in found)
    measured = {row.provider for row in found if row.ok}
    assert {OURS, "naive", "list_mle"} <= measured
    assert len({row.case for row in found if row.ok and row.provider == OURS}) == 3
    for row in found:
        assert not row.ok or (row.step and row.value_error is not None)  # judged, then timed
    assert {row.status for row in rows(folder, "kernels")} == {"ok"}


def test_stages_that_are_done_are_not_run_again(folder: Path) -> None:
    before = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in STAGES}
    (folder / "kernels.json").unlink()
    assert command("--dry-run", "--out", str(folder)).returncode == 0
    after = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in STAGES}
    assert [name for name in STAGES if after[name] != before[name]] == ["kernels"]


def test_nothing_of_a_dry_run_passes_for_a_measurement(folder: Path) -> None:
    text = (folder / "gpu.md").read_text()
    assert text == markdown(folder)
    assert "Dry run on a CPU" in text
    assert text.count("| not measured |") == 6
    assert not any(f"| {verdict} |" in text for verdict in ("met", "not met"))


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = command("--out", str(tmp_path))
    assert done.returncode == 1
    assert "no GPU here" in done.stdout


# ---------------------------------------------------------------- parts


def test_promises_are_judged_by_what_was_measured() -> None:
    times = {OURS: 1.0, "FlexAttention": 3.0, "naive compiled": 14.0}
    case = "order 3, N=K=M=1024, bfloat16"
    found = [
        Row("order 3", case, 1024**3, name, step=[ms], step_cpu=[ms]) for name, ms in times.items()
    ]
    found[0].figures = {"share of the limit": 0.55}
    share, flex, compiled, *larger = gpu_targets(from_json(to_json({}, found, ()))[1])
    assert (share.verdict, share.measured) == ("met", "55%")
    assert flex.verdict == "met"
    assert "3.00x" in flex.measured
    assert compiled.verdict == "not met"
    assert {target.verdict for target in larger} == {"not measured"}


def test_limits_of_the_method() -> None:
    """METHOD: at order 3, r = 32, an H200's exponentials bound forward, its products backward."""
    case, rates = square_case(3, 1024), Ceilings(4.3e12, 7.9e14, 3.7e12)
    scores = 1024 * 1024 * 1025 / 2
    forward, both = least_seconds(case, rates)
    assert scores / forward == pytest.approx(3.7e12)
    assert scores / (both - forward) == pytest.approx(7.9e14 / 384)


def test_nothing_is_asked_after_the_deadline() -> None:
    settings = replace(QUICK, deadline=time.monotonic(), worker=Inline)
    (row,) = run_case(square_case(1, 8), [Provider(OURS, build_naive)], settings)
    assert (row.status, row.step) == ("skipped", [])
    assert "no time left" in row.detail


def test_flex_attention_computes_the_same_likelihood() -> None:
    """Forward only: FlexAttention has no backward pass on the CPU."""
    for case in (square_case(3, 20), replace(square_case(4, 24), n=3, k=5)):
        inputs = replace(case, presorted=True).inputs()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it should be compiled, said once
            flex = build_flex(case, inputs)()
        torch.testing.assert_close(flex, build_naive(case, inputs)().detach())
        torch.testing.assert_close(flex, build_ours(case, inputs, "blocked")().detach())


def test_a_replay_can_write_the_ranking_that_the_loss_holds() -> None:
    """The given ranking is not copied if K = M: a captured step reads what is written to it."""
    case = replace(square_case(3, 8), presorted=True)
    inputs, fresh = case.inputs(), replace(case, seed=1).inputs()
    loss = build_ours(case, inputs, "blocked")
    with torch.no_grad():
        for name, leaf in inputs.leaves.items():
            leaf.copy_(fresh.leaves[name])
    inputs.ranking().copy_(fresh.ranking())
    torch.testing.assert_close(loss(), build_ours(case, fresh, "blocked")())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_judged_by_its_own_rounding(dtype: torch.dtype) -> None:
    """Peers take part in half precision too, and this library is right there."""
    case = replace(square_case(3, 24), dtype=dtype)
    settings = replace(QUICK, rounds=1, worker=Inline)
    for row in run_case(case, [Provider(OURS, build_ours), NAIVE], settings):
        assert row.ok, row.detail
        assert row.case.endswith(str(dtype).removeprefix("torch."))
        assert 1e-6 < (row.gradient_error or 0.0) < 3e-2  # half precision was indeed used


def test_slots_are_counted_or_it_is_said_why_not() -> None:
    """In the interpreter there is nothing to compile; `test_aot` counts in another process."""
    assert set(counted_slots(square_case(3, 64), "sm_90")) == {"none"}


def test_the_wall_clock_stands_in_for_events_without_a_gpu() -> None:
    device = Device("cpu")
    assert device.peaks(lambda: None) is None
    assert device.free_bytes() is None
    assert device.clock(lambda: time.sleep(0.01), 1).wall >= 0.01
