"""The same rows at CC3M size: commands of the training script, printed or run in turn."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.study.measures import Result
from benchmarks.study.questions import METRIC_OF
from benchmarks.study.rows import Row, all_rows
from benchmarks.study.settings import Trained
from examples.cc3m.recipe import load_recipe

SEEDS = 5
PROCESSES = 8
EXAMPLE = "cc3m/{00000..00331}.tar"
NAMES = {
    **METRIC_OF,
    **{name: name for name in ("modality_gap", "alignment", "uniformity")},
    "zeroshot-top1": "zs_mean",
}
"""Measures of the training script -> metrics of the study."""


def commands(data: str, features: Path | None, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of every run that the training script can do, seed by seed.

    Rows that change the data (noise, bare captions), that want a second caption or view, that have
    no teacher's features, or whose batches are the row are left out; all others keep their recipe
    and its overrides, at the script's own batch, steps and augmentation.
    """
    for seed in range(SEEDS):
        for row in all_rows():
            settings = row.settings
            if not isinstance(settings, Trained) or not _possible(settings, features):
                continue
            words = ["torchrun", "--nproc_per_node", str(PROCESSES), "-m", "examples.cc3m.train"]
            words += ["--data", data, "--recipe", settings.recipe, "--train.seed", str(seed)]
            words += ["--out", str(_folder(out, row, seed))]
            if load_recipe(settings.recipe, settings.overrides).distillation is not None:
                words += ["--features", str(features)]
            words += ["--override", *settings.overrides] if settings.overrides else []
            yield f"{row.name}, seed {seed}", words


def _possible(settings: Trained, features: Path | None) -> bool:
    recipe = load_recipe(settings.recipe, settings.overrides)
    as_script_does = Trained(
        settings.recipe, settings.overrides, teacher=settings.teacher, matched=settings.matched
    )
    taught = recipe.distillation is None or (
        features is not None and settings.teacher == "self-distilled"
    )
    return settings == as_script_does and taught


def results(out: Path) -> dict[str, dict[int, Result]]:
    """Return what the script measured last in each run under `out`, by row and seed."""
    found: dict[str, dict[int, Result]] = {}
    for row in all_rows():
        for seed in range(SEEDS):
            file = _folder(out, row, seed) / "results.jsonl"
            if file.exists():
                told = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
                measures = {NAMES[name]: told[name] for name in NAMES if name in told}
                result = {"measures": measures, "cost": {}, "curves": {}}
                found.setdefault(row.name, {})[seed] = result
    return found


def _folder(out: Path, row: Row, seed: int) -> Path:
    return out / "cc3m" / row.name / f"seed{seed}"


def main(
    data: str | None, features: Path | None, out: Path, extra: Sequence[str], *, launch: bool
) -> int:
    """Print the commands, or with `launch` run them in turn; return the first failure's code.

    Args:
        data, features: CC3M's shards, and the teacher's features of them.
        out: holds a folder for each run.
        extra: further options of the training script, such as what it evaluates on.
        launch: run the commands.

    Training scripts resume: a launch that was stopped goes on with the same command.
    """
    for name, words in commands(data or EXAMPLE, features, out):
        words += extra
        print(f"# {name}\n{shlex.join(words)}", flush=True)
        if launch:
            code = subprocess.run(words, check=False).returncode
            if code:
                return code
    return 0
