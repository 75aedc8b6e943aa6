"""The study at toy size: from runs to the page, whose every number stands in the JSON."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.study.__main__ import main
from benchmarks.study.intervals import differs, interval, paired
from benchmarks.study.questions import METRICS
from benchmarks.study.report import verdict

ROWS = ("planted-2-64", "order-0", "order-3", "injection")
SEEDS = 2
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+\.\d+")


class Study:
    """A finished toy study: its folders, its JSON and its page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arguments = ["--scale", "toy", "--seeds", str(SEEDS), "--jobs", "1"]
        self.arguments += ["--out", str(folder / "runs"), "--page", str(folder / "docs/study.md")]
        self.arguments += ["--results", str(folder / "study.json"), "--only", *ROWS]
        assert main(self.arguments) == 0
        self.page = (folder / "docs/study.md").read_text()
        self.told: dict[str, Any] = json.loads((folder / "study.json").read_text())

    def files(self) -> dict[str, int]:
        """Modification time of every run's file."""
        rows = (self.folder / "runs/rows").glob("*.json")
        return {file.name: file.stat().st_mtime_ns for file in rows}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


def numbers(told: Any) -> set[float]:
    """All numbers in some JSON."""
    if isinstance(told, dict):
        return set().union(*map(numbers, told.values()))
    if isinstance(told, list):
        return set().union(*map(numbers, told))
    return {float(told)} if isinstance(told, int | float) else set()


def test_every_number_of_the_page_is_the_json_s(study: Study) -> None:
    shown = {
        text
        for value in numbers(study.told)
        for text in (
            *(f"{value:{sign}.4f}" for sign in ("", "+")),
            *(f"{100 * value:{sign}.2f}" for sign in ("", "+")),
            *(f"{value / unit:.3f}" for unit in (1, 1e6, 1e9)),
            str(value),
        )
    }
    page = study.page
    for fixed in (study.told["test"], *study.told["versions"].values()):
        page = page.replace(fixed, "")
    found = NUMBER.findall(page)
    assert len(found) > 200
    assert [x for x in found if x not in shown] == []


def test_tables_hold_the_means_of_their_rows(study: Study) -> None:
    """Cells by row and column, against the seeds' own files."""
    files = [json.loads(x.read_text()) for x in (study.folder / "runs/rows").glob("*.json")]
    by_label = {metric.label: metric for metric in METRICS.values()}
    checked = 0
    for part in study.page.split("Means over seeds, with bootstrap intervals.\n\n")[1:]:
        table = part.split("\n\n")[0].splitlines()
        header, _, *lines = ([x.strip() for x in line.strip("|").split("|")] for line in table)
        for name, seeds, *cells in (line for line in lines if line[0] in ROWS):
            runs = [each["measures"] for each in files if each["name"] == name]
            assert len(runs) == int(seeds) == SEEDS
            for metric, cell in zip((by_label[x] for x in header[2:]), cells, strict=True):
                if cell and all(metric.key in x for x in runs):  # shares are made of tables
                    mean = float(cell.split()[0]) / (100 if metric.percent else 1)
                    assert mean == pytest.approx(np.mean([x[metric.key] for x in runs]), abs=6e-5)
                    checked += 1
    assert checked > 50


def test_a_study_that_is_done_runs_nothing_again(study: Study) -> None:
    before = study.files()
    assert main([*study.arguments, "--no-report"]) == 0
    assert study.files() == before
    assert len(before) == len(ROWS) * SEEDS


def test_a_missing_run_is_run_and_gives_the_same_numbers(study: Study) -> None:
    before = study.files()
    files = {x: json.loads(x.read_text()) for x in (study.folder / "runs/rows").glob("*.json")}
    file = next(x for x, told in files.items() if (told["name"], told["seed"]) == ("order-3", 1))
    file.unlink()
    assert main([*study.arguments, "--no-report"]) == 0
    after = study.files()
    assert [name for name in before if before[name] != after[name]] == [file.name]
    assert json.loads(file.read_text())["measures"] == files[file]["measures"]


def test_the_printed_command_runs_that_row_alone(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*study.arguments, "--list"]
    arguments[arguments.index("--out") + 1] = str(study.folder / "elsewhere")
    assert main(arguments) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(ROWS) * SEEDS
    line = next(x for x in listed if "planted-2-64 --seed 1" in x)
    words = [*line.split()[3:], "--out", str(study.folder / "elsewhere"), "--no-report"]
    assert line.split()[:3] == ["python", "-m", "benchmarks.study"]
    assert main([*words, "--jobs", "1"]) == 0
    rows = list((study.folder / "elsewhere/rows").glob("*.json"))
    assert [x.name for x in rows] == [x for x in study.files() if x == rows[0].name]


def test_rows_of_a_seed_share_their_towers_and_seeds_differ(study: Study) -> None:
    told = study.told["rows"]
    for row in ("order-0", "order-3", "injection"):
        values = told[row]["measures"]["alignment"]
        assert values[0] != values[1]
    assert told["injection"]["cost"]["flops"] > told["order-0"]["cost"]["flops"]
    assert told["injection"]["cost"]["parameters"] > told["order-3"]["cost"]["parameters"]
    assert told["order-3"]["cost"]["parameters"] > told["order-0"]["cost"]["parameters"]


def test_pictures_are_there_and_small(study: Study) -> None:
    named = re.findall(r"\]\((pictures/[\w/.-]+)\)", study.page)
    assert {Path(x).stem for x in named} >= {"planted", "agreement", "gap", "transitions"}
    for name in named:
        assert (study.folder / "docs" / name).stat().st_size < 100_000


# ---------------------------------------------------------------- statistics


VALUES = [0.021, 0.034, -0.002, 0.015, 0.027]


def test_intervals_are_those_of_all_resamples_and_of_student() -> None:
    """Every one of the 5^5 resamples, and the paired t test of scipy."""
    found = interval(VALUES)
    means = np.array([np.mean(x) for x in itertools.product(VALUES, repeat=5)])
    low, high = np.quantile(means, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=5e-4)
    assert found["high"] == pytest.approx(high, abs=5e-4)
    student = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert (found["t_low"], found["t_high"]) == pytest.approx(student, rel=1e-5)
    assert found["mean"] == pytest.approx(np.mean(VALUES))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([0.1, 0.11, 0.12, 0.1, 0.09], "better"),
        ([-0.1, -0.11, -0.12, -0.1, -0.09], "worse"),
        ([0.1, -0.1, 0.05, -0.04, 0.01], "no difference shown"),
        ([0.001, 0.3, 0.002, 0.001, 0.003], "no difference shown"),  # the bootstrap alone says yes
        ([0.1], "too few seeds"),
        ([0.1, 0.11, 0.12, 0.1], "too few seeds"),
    ],
)
def test_a_difference_needs_both_intervals(values: list[float], word: str) -> None:
    found = interval(values)
    told: dict[str, Any] = {**found, "differs": differs(found)}
    assert verdict(METRICS["correlation"], told) == word


def test_differences_are_paired_by_seed() -> None:
    rows = {
        "a": {"seeds": [0, 1, 2], "measures": {"x": [1.0, 2.0, 4.0]}},
        "b": {"seeds": [1, 2, 3], "measures": {"x": [1.5, 3.0, 9.0]}},
    }
    assert paired(rows, "a", "b", "x") == [0.5, 1.0]
    assert paired(rows, "a", "", "x") == [1.0, 2.0, 4.0]
    assert paired(rows, "a", "c", "x") == []


def test_cc3m_commands_are_ones_that_the_script_takes(tmp_path: Path) -> None:
    from benchmarks.study.cc3m import commands
    from examples.cc3m.settings import parse

    found = list(commands("data/{00000..00003}.tar", tmp_path, tmp_path))
    assert len({name for name, _ in found}) == len(found)
    names = {name.split(",")[0] for name, _ in found}
    assert {"order-0", "order-1", "order-3", "order-5", "injection", "siglip"} <= names
    assert not names & {"alip", "noise-40-order-1", "photos-order-1", "planted-1-64"}
    for _, words in found[:: len(found) // 12]:
        settings = parse(words[words.index("examples.cc3m.train") + 1 :])
        assert settings.train.seed in range(5)


def test_measures_of_the_training_script_make_the_same_report(tmp_path: Path) -> None:
    for row, found in (("order-0", [0.21, 0.23]), ("order-1", [0.25, 0.26])):
        for seed, value in enumerate(found):
            folder = tmp_path / "runs/cc3m" / row / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [{"epoch": e, "image_to_text_R@1": value * e} for e in (0.5, 1)]
            (folder / "results.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    arguments = ["--scale", "cc3m", "--report", "--out", str(tmp_path / "runs")]
    page, file = tmp_path / "docs/cc3m.md", tmp_path / "study.json"
    assert main([*arguments, "--page", str(page), "--results", str(file)]) == 0
    told = json.loads(file.read_text())
    (question,) = (x for x in told["questions"] if x["key"] == "agreement")
    (found,) = (x for x in question["comparisons"] if x["base"] == "order-0")
    assert (found["metric"], found["mean"]) == ("i2t_r1", 0.035)
    text = page.read_text()
    assert "agreement, by image to text R@1 (%): order-1 minus order-0: +3.50 [" in text
    assert "Best means, whatever their intervals: image to text R@1 (%): order-1." in text


def test_a_bad_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "order-9", "--list"]) == 2
    told = capsys.readouterr().err
    assert "there is no row or stage order-9; --list names all of them" in told
