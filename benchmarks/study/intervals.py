"""Means, paired differences and their intervals, by the test that `questions.TEST` states."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.study.learnt import offset_share
from benchmarks.study.measures import Result
from benchmarks.study.questions import FEWEST, METRICS, QUESTIONS, TEST, Question
from benchmarks.study.rows import Row
from benchmarks.study.settings import Scale, Trained
from benchmarks.study.store import COMPUTED_BY, described
from examples.common.reports import rounded, versions

RESAMPLES, LEVEL = 10_000, 0.95
DIGITS = 6
"""Significant digits of numbers in the JSON."""
Summary = dict[str, Any]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return "mean", and for two values or more the ends of both intervals.

    "low" and "high" are the percentile bootstrap's, "t_low" and "t_high" those of the mean's t
    distribution.
    """
    mean = float(np.mean(values))
    found = {"mean": mean}
    if len(values) > 1:
        drawn = stats.bootstrap(
            (np.asarray(values),),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        found |= {"low": float(drawn.low), "high": float(drawn.high)}
        wide = stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
        found |= {"t_low": mean - float(wide), "t_high": mean + float(wide)}
    return {"n": len(values), **rounded(found, DIGITS)}


def differs(found: dict[str, float]) -> bool:
    """Say if both intervals exclude 0, and there are enough seeds."""
    if found["n"] < FEWEST:
        return False
    ends = [(found["low"], found["high"]), (found["t_low"], found["t_high"])]
    return all(low > 0 for low, _ in ends) or all(high < 0 for _, high in ends)


def summarise(
    results: dict[str, dict[int, Result]], rows: Sequence[Row], scale: Scale | None
) -> Summary:
    """Return all that the report says, JSON-able.

    Args:
        results: by row and seed.
        rows: the study's.
        scale: at which they were run; None: by the training script, on CC3M.
    """
    told = {row.name: _row(results[row.name], row, scale) for row in rows if row.name in results}
    questions = [_question(question, told) for question in QUESTIONS]
    stale = sorted(
        f"{row.name}, seed {seed}"
        for row in rows
        for seed, result in results.get(row.name, {}).items()
        if scale is not None and result["settings"] != _as_json(described(row, seed, scale))
    )
    return {
        "test": TEST,
        "scale": None if scale is None else _as_json(asdict(scale)),
        "versions": versions(*COMPUTED_BY),
        "rows": told,
        "questions": questions,
        "stale": stale,
        "missing": [row.name for row in rows if row.name not in results],
    }


def _as_json(told: Any) -> Any:
    return json.loads(json.dumps(told))


def _row(results: dict[int, Result], row: Row, scale: Scale | None) -> Summary:
    """Collect a row's measures seed by seed, its cost, and the curves of its first seed."""
    results = {seed: {**x, "measures": _with_offsets(x)} for seed, x in results.items()}
    seeds = sorted(results)
    first = results[seeds[0]]
    by_seed = [results[seed]["measures"] for seed in seeds]
    found = {x: [each.get(x, math.nan) for each in by_seed] for x in first["measures"]}
    measures = {
        x: rounded(values, DIGITS) for x, values in found.items() if np.isfinite(values).all()
    }
    cost = {
        name: rounded(float(np.median([results[s]["cost"][name] for s in seeds])), DIGITS)
        for name in first["cost"]
    }
    told: Summary = {"seeds": seeds, "measures": measures, "cost": cost}
    told["means"] = {x: interval(values) for x, values in measures.items() if x in METRICS}
    settings = row.settings if scale is None else scale.limited(row.settings)
    if isinstance(settings, Trained):
        told["batch"] = settings.batch
    curves = first["curves"]
    if row.stage not in ("main", "photographs"):
        curves = {}
    return {**told, "curves": rounded(curves, 4)}


def _with_offsets(result: Result) -> dict[str, float]:
    """Return the measures of a run and, of its transitions, the shares that are offsets."""
    tables = result["curves"].get("slices", {})
    shares = {
        f"{name}_offset": offset_share(tables[name]) for name in ("beta", "gamma") if name in tables
    }
    return {**result["measures"], **shares}


def _question(question: Question, rows: dict[str, Summary]) -> Summary:
    """Compare the rows of a question that are there."""
    comparisons = []
    for ours, base in question.contrasts:
        for metric in question.metrics:
            values = paired(rows, ours, base, metric)
            if values:
                found = interval(values)
                told = {"ours": ours, "base": base, "metric": metric, **found}
                comparisons.append({**told, "differs": differs(found)})
    return {"key": question.key, "comparisons": comparisons}


def paired(rows: dict[str, Summary], ours: str, base: str, metric: str) -> list[float]:
    """Return the differences of the seeds that both rows have, or without base the values."""
    ours_by_seed, base_by_seed = (_by_seed(rows, name, metric) for name in (ours, base))
    if not base:
        return list(ours_by_seed.values())
    return [value - base_by_seed[s] for s, value in ours_by_seed.items() if s in base_by_seed]


def _by_seed(rows: dict[str, Summary], name: str, metric: str) -> dict[int, float]:
    """Return a metric of a row for each seed; {} where it was not measured."""
    row = rows.get(name, {"seeds": [], "measures": {}})
    return dict(zip(row["seeds"], row["measures"].get(metric, []), strict=False))
