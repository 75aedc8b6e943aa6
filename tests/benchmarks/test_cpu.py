"""The suite from end to end at tiny sizes: reports are whole and a failure stays alone."""

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cpu
from benchmarks.__main__ import main
from benchmarks.cases import AnyCase, Inputs, square_case
from benchmarks.providers import OURS, Loss, Provider, Unavailable, build_naive
from benchmarks.report import markdown, summary, timings
from benchmarks.rows import Row, from_json, to_json
from benchmarks.suite import Settings, reason_to_skip, run_case
from benchmarks.targets import GRAM, Target, targets

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(threads=1, rounds=3, seconds=0.1, timeout=60.0)


def build_raising(case: AnyCase, inputs: Inputs) -> Loss:
    raise RuntimeError("this provider is broken\nsecond line")


def build_dying(case: AnyCase, inputs: Inputs) -> Loss:
    """Dies without a word on its fourth call, when it is being timed."""
    naive, calls = build_naive(case, inputs), [0]

    def loss() -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            os._exit(3)
        return naive()

    return loss


def build_wrong(case: AnyCase, inputs: Inputs) -> Loss:
    naive = build_naive(case, inputs)
    return lambda: 1.01 * naive()


def build_unavailable(case: AnyCase, inputs: Inputs) -> Loss:
    raise Unavailable("no such compiler")


@pytest.fixture(scope="module")
def mixed() -> list[Row]:
    providers = [
        Provider(OURS, build_naive),
        Provider("raising", build_raising),
        Provider("dying", build_dying),
        Provider("wrong", build_wrong),
        Provider("unavailable", build_unavailable),
        Provider("too large", build_naive, tensors=1e12),
        Provider("another order", build_naive, groups="order 3"),
    ]
    return run_case(square_case(1, 8), providers, QUICK)


def test_a_failing_provider_is_reported_and_the_others_remain(mixed: list[Row]) -> None:
    found = {row.provider: row for row in mixed}
    assert {name: row.status for name, row in found.items()} == {
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
    ours = found[OURS]
    assert len(ours.step) == len(ours.forward) == len(ours.step_cpu) == len(ours.forward_cpu) == 3
    assert not found["dying"].step
    assert not found["wrong"].step
    if sys.platform == "linux":
        assert ours.peak_mb is not None
        assert ours.resident_mb is not None


def test_every_report_names_every_provider(mixed: list[Row]) -> None:
    for text in (timings(mixed), markdown({}, mixed, targets(mixed))):
        for row in mixed:
            assert row.provider in text
            assert row.detail in text


def test_rows_survive_their_file(mixed: list[Row]) -> None:
    mixed[1].value_error = float("nan")  # JSON has none
    machine, rows = from_json(to_json({"threads": 1}, mixed, targets(mixed)))
    assert machine == {"threads": 1}
    assert [row.provider for row in rows] == [row.provider for row in mixed]
    assert rows[0].step == pytest.approx(mixed[0].step, rel=1e-5)
    assert rows[1].value_error is None
    with pytest.raises(ValueError, match="version 1"):
        from_json('{"version": 1}')


def test_committed_tables_are_those_of_the_committed_samples(tmp_path: Path) -> None:
    results, names = ROOT / "benchmarks" / "results", ("cpu.md", "cpu_summary.md")
    files = [
        f"--{kind}={tmp_path / name}"
        for kind, name in zip(("markdown", "summary"), names, strict=True)
    ]
    assert cpu.main([f"--render={results / 'cpu.json'}", *files]) == 0
    for name in names:
        assert (tmp_path / name).read_text() == (results / name).read_text()


def test_a_silent_provider_is_given_up() -> None:
    settings = Settings(threads=1, rounds=1, timeout=0.0)
    (row,) = run_case(square_case(1, 8), [Provider("silent", build_naive)], settings)
    assert row.status == "failed"
    assert "no answer" in row.detail


@pytest.mark.parametrize(
    ("command", "options", "case", "measured"),
    [
        ("cpu", ["--orders", "3"], "order 3, N=K=M=16", [OURS, "naive"]),
        ("gram", ["--providers", OURS], "gram, B=2, P=32, widths 384 and 768", [OURS]),
    ],
)
def test_a_quick_run_measures_checks_and_writes(
    command: str,
    options: list[str],
    case: str,
    measured: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # not in this process
    file = tmp_path / "figures.json"
    assert main([command, "--quick", "--threads", "1", "--json", str(file), *options]) == 0
    text = capsys.readouterr().out
    machine, rows = from_json(file.read_text())
    assert machine["threads"] == 1
    assert machine["OMP_WAIT_POLICY"]
    assert {row.case for row in rows} == {case}
    assert case in text
    assert "## Targets" in text
    assert [row.provider for row in rows if row.ok] == measured
    assert {row.provider: row.status for row in rows if not row.ok} == (
        {"naive compiled": "skipped"} if command == "cpu" else {}
    )
    for row in rows[: len(measured)]:
        assert max(row.value_error or 1.0, row.gradient_error or 1.0) < 1e-5
        assert len(row.step) == len(row.forward) == 3
        assert min(row.step + row.forward) > 0
        assert row.first_call_s


def test_summary_has_a_row_for_every_case_and_the_missed_targets(mixed: list[Row]) -> None:
    machine = {"processor": "P", "threads": 1, "torch": "T", "date": "D"}
    verdicts = [("kept", True), ("broken", False), ("not measured", None)]
    text = summary(machine, mixed, [Target(name, "2x", "1x", met) for name, met in verdicts])
    (line,) = [line for line in text.splitlines() if line.startswith("| order")]
    assert line.startswith("| order 1, N=K=M=8 | ")
    assert line.count("|") == 8
    assert "1 of 2 measured targets met. Missed: broken: 1x (2x)." in text
    assert "P, 1 threads, torch T, D." in text


def test_skipping_by_size_memory_and_request() -> None:
    case, settings = square_case(3, 64), Settings(threads=1, compile=False)
    assert reason_to_skip(Provider("fits", build_naive, tensors=6), case, settings) is None
    limited = reason_to_skip(Provider("limited", build_naive, most_scores=10), case, settings)
    assert limited is not None
    assert "limited" in limited
    compiled = reason_to_skip(Provider("compiled", build_naive, compiles=True), case, settings)
    assert compiled is not None
    assert "request" in compiled


def known(order: int, size: int, times: dict[str, float], peaks: dict[str, float]) -> list[Row]:
    case = square_case(order, size)
    rows = []
    for name, time in times.items():
        row = Row(case.group, case.name, case.scores, name, peak_mb=peaks[name], resident_mb=1.0)
        row.step = row.step_cpu = [time] * 3
        rows.append(row)
    return rows


def test_targets_are_judged_by_the_stated_limits() -> None:
    def verdicts(naive: float, peak: float, growth: float, order1: float) -> list[bool | None]:
        rows = [
            *known(3, 256, {OURS: 1.0}, {OURS: 1}),
            *known(3, 512, {OURS: 1.0, "naive": naive}, {OURS: peak, "naive": 2000}),
            *known(3, 1024, {OURS: 64.0 * growth}, {OURS: 118.99 + peak / 100}),
            *known(1, 512, {OURS: order1, "list_mle": 1.0}, {OURS: 1, "list_mle": 1}),
        ]
        return [target.met for target in targets(rows)]

    assert verdicts(2.6, 100, 1.2, 1.29) == [True] * 5
    assert verdicts(2.4, 101, 1.3, 1.31) == [False] * 5
    assert [target.met for target in targets([])] == [None] * 4


def test_gram_targets() -> None:
    def verdicts(time: float, saved: float) -> list[bool | None]:
        rows = [Row("gram", GRAM, 1, name) for name in (OURS, "reference")]
        for row, ms, peak in zip(rows, (time, 1.0), (1.0, saved), strict=True):
            row.step, row.step_cpu, row.peak_mb = [ms], [ms], peak
        return [target.met for target in targets(rows)[-2:]]

    assert verdicts(1.19, 4.1) == [True, True]
    assert verdicts(1.21, 3.9) == [False, False]


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
