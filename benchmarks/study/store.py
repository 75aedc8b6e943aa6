"""Results on disk: one JSON file for each run, written whole, named by a hash of its settings."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.measures import Result, run
from benchmarks.study.photos import PhotoFiles
from benchmarks.study.rows import Row
from benchmarks.study.settings import SCALES, Planted, Scale
from examples.common.files import read_json, write_json
from examples.common.reports import versions

COMPUTED_BY = ("open_clip_torch", "timm", "numpy", "scikit-learn", "scipy")
"""Packages whose versions a result tells, beside torch's and Python's."""
VERSION = 1
"""Raise it when a row's meaning changes without its settings: old results are then run anew."""


def described(row: Row, seed: int, scale: Scale) -> dict[str, Any]:
    """Return all that determines the result of a run, JSON-able; not the row's name."""
    settings = scale.limited(row.settings)
    told: dict[str, Any] = {"version": VERSION, "seed": seed}
    if isinstance(settings, Planted):
        return {**told, "planted": asdict(settings)}
    return {**told, "trained": settings.described(), "scale": asdict(scale)}


def result_file(out: Path, row: Row, seed: int, scale: Scale) -> Path:
    """Return the file of a run; rows of equal settings share it."""
    text = json.dumps(described(row, seed, scale), sort_keys=True)
    return out / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def run_and_save(row: Row, seed: int, scale: str, out: Path, photos: PhotoFiles | None) -> None:
    """Run one row at one seed and write its result, with what determined it, to its file.

    The scale is given by its name, so that data are cached.
    """
    sizes = SCALES[scale]
    result = run(row.settings, seed, sizes, (out / "data").resolve(), photos)
    told = {
        "name": row.name,
        "seed": seed,
        "settings": described(row, seed, sizes),
        "versions": versions(*COMPUTED_BY),
        **result,
    }
    write_json(result_file(out, row, seed, sizes), told)


def load(
    out: Path, rows: Iterable[Row], seeds: Iterable[int], scale: Scale
) -> dict[str, dict[int, Result]]:
    """Return the results that are there, by row and seed; rows without any are left out.

    Where a row's settings have changed since it was run, the old result stands in until it is run
    again; its "settings" tell.
    """
    files = sorted((out / "rows").glob("*.json"))
    by_file = {file: read_json(file) for file in files}
    by_name = {(each["name"], each["seed"]): each for each in by_file.values()}
    found: dict[str, dict[int, Result]] = {}
    for row in rows:
        for seed in seeds:
            file = result_file(out, row, seed, scale)
            result = by_file.get(file, by_name.get((row.name, seed)))
            if result is not None:
                found.setdefault(row.name, {})[seed] = result
    return found


def command(row: Row, seed: int, scale: Scale, photos: PhotoFiles | None) -> str:
    """Return the command that runs one row at one seed again."""
    words = ["python", "-m", "benchmarks.study", "--only", row.name, "--seed", str(seed)]
    words += [] if scale.name == "cpu" else ["--scale", scale.name]
    if photos is not None and not isinstance(row.settings, Planted) and row.settings.photos:
        for option, path in zip(
            ("photos", "captions", "grades"), asdict(photos).values(), strict=True
        ):
            words += [f"--{option}", str(path)]
    return shlex.join([*words, "--again"])
