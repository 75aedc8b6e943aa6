"""Rows of the study, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.study.questions import BATCHES, LISTS, PLANTED_ORDERS, VARIANTS
from benchmarks.study.settings import Planted, Trained

WEIGHTS = ("cross_modal_weight", "in_modal_weight")


@dataclass(frozen=True)
class Row:
    """A named row; several names may share one setting, which is run once.

    Args:
        name: unique.
        settings: all that determines its result, but the seed and the scale.
        stage: rows are run stage by stage, and within a stage seed by seed.
        default: run without --all.
    """

    name: str
    settings: Planted | Trained
    stage: str
    default: bool = False


def of_order(order: int, **changes: float | int | str | None) -> Trained:
    """Return the setting of order 0 to 5, with further arguments of its loss."""
    recipe = ("clip", "rankclip", "highorder_r2")[order] if order < 3 else "highorder_r3"
    own = {"order": order} if order > 3 else {}
    overrides = tuple(f"loss.HighOrderPLLoss.{k}={v}" for k, v in {**own, **changes}.items())
    return Trained(recipe, overrides)


def weighted(order: int, factor: float) -> Trained:
    """Return the setting of an order whose ranking terms weigh `factor` times as much."""
    return of_order(order, **dict.fromkeys(WEIGHTS, factor / 16))


def planted_rows() -> Iterator[Row]:
    for lists in LISTS:
        for order in PLANTED_ORDERS:
            yield Row(
                f"planted-{order}-{lists}",
                Planted(order=order, lists=lists),
                "planted",
                default=True,
            )


def main_rows() -> Iterator[Row]:
    """Orders 0, 1, 3, the injection, and its controls."""
    injection = Trained("fusion_full", teacher="self-distilled")
    rows = {
        **{f"order-{r}": of_order(r) for r in (0, 1, 3)},
        "injection": injection,
        "injection-no-teacher": replace(
            injection, overrides=("distillation=null",), teacher="none"
        ),
        "injection-random-teacher": replace(injection, teacher="random"),
    }
    for name, settings in rows.items():
        yield Row(name, settings, "main", default=True)


def photo_rows() -> Iterator[Row]:
    rows = {f"photos-order-{r}": of_order(r) for r in (0, 1, 3)}
    rows["photos-order-1-weight-4"] = weighted(1, 4)
    for name, settings in rows.items():
        yield Row(name, replace(settings, photos=True, steps=600), "photographs", default=True)


def more_rows() -> Iterator[Row]:
    """Rows of --all, by value."""
    for order in (2, 4, 5):
        yield Row(f"order-{order}", of_order(order), "orders")
    clip = Trained(matched=True)
    for name, settings in {
        "siglip": replace(clip, recipe="siglip"),
        "cyclip": replace(clip, recipe="cyclip"),
        "clip-two-captions": replace(clip, objective="two-captions"),
        "alip": replace(clip, objective="alip"),
        "clip-two-views": replace(clip, objective="two-views"),
        "ito": replace(clip, objective="ito"),
    }.items():
        yield Row(name, settings, "baselines")
    for variant in VARIANTS:
        settings = Trained(f"fusion_{variant}", teacher="self-distilled")
        yield Row(f"fusion-{variant}", settings, "fusion")
    for order in (0, 1, 3):
        base = of_order(order)
        for name, settings in {
            "noise-40": replace(base, noise=0.4),
            "bare": replace(base, omit=0.9),
            "bare-ids": replace(base, omit=0.9, ids=True),
            "batch-16": replace(base, batch=16, steps=960),
        }.items():
            yield Row(f"{name}-order-{order}", settings, "robustness")
    yield from _settings_rows()
    for batch in BATCHES:
        for order in (0, 1, 3):
            settings = replace(of_order(order), batch=batch, steps=120)
            yield Row(f"batch-{batch}-order-{order}", settings, f"batches of {batch}")


def _settings_rows() -> Iterator[Row]:
    for width in (8, 128):
        yield Row(f"order-3-width-{width}", of_order(3, transition_dim=width), "settings")
    for order in (1, 3):
        yield Row(f"order-{order}-weight-4", weighted(order, 4), "settings")
        yield Row(f"order-{order}-top-8", of_order(order, top_k=8), "settings")
        yield Row(f"order-{order}-log", of_order(order, discount="log"), "settings")


def all_rows() -> list[Row]:
    """Return every row in the order of running."""
    return [*planted_rows(), *main_rows(), *photo_rows(), *more_rows()]


def chosen(rows: Sequence[Row], names: Sequence[str], *, everything: bool) -> list[Row]:
    """Return the rows of some names or stages, or without names the default rows, or all.

    Raises:
        ValueError: a name is neither a row's nor a stage's.
    """
    if not names:
        return [row for row in rows if everything or row.default]
    unknown = set(names) - {row.name for row in rows} - {row.stage for row in rows}
    if unknown:
        raise ValueError(
            f"there is no row or stage {', '.join(sorted(unknown))}; --list names all of them"
        )
    return [row for row in rows if row.name in names or row.stage in names]


def in_order(rows: Sequence[Row], seeds: Sequence[int]) -> list[tuple[Row, int]]:
    """Return runs stage by stage, and within a stage all rows of a seed before the next seed."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    return [(row, seed) for stage in stages for seed in seeds for row in rows if row.stage == stage]
