"""The commands: each measures one model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from examples.common.files import UserError
from examples.evaluation.data import (
    Captioned,
    Classification,
    classification,
    open_image,
    read_rows,
)
from examples.evaluation.gap import gap_curve, gap_measures
from examples.evaluation.models import Model, Pairs, encode_pairs
from examples.evaluation.probes import Labelled, knn, linear_probe
from examples.evaluation.reading import Reading
from examples.evaluation.retrieval import graded_agreement, retrieval
from examples.evaluation.zero_shot import zero_shot


@dataclass(frozen=True)
class Result:
    """Numbers of one model by name, a curve if there is one, and what was not found."""

    numbers: dict[str, float]
    curve: list[dict[str, float]] | None = None
    notes: list[str] = field(default_factory=list)


def measure_retrieval(model: Model, options: argparse.Namespace) -> Result:
    pairs = _encoded(model, options)
    numbers = retrieval(pairs.images, pairs.texts, pairs.image_of_text)
    return Result(numbers, notes=[f"{len(pairs.images)} images, {len(pairs.texts)} captions."])


def measure_gap(model: Model, options: argparse.Namespace) -> Result:
    pairs = _encoded(model, options)
    images, texts = pairs.images, pairs.first_texts()
    curve = gap_curve(images, texts, model.logit_scale)
    return Result(gap_measures(images, texts), curve, [f"{len(images)} images."])


def _encoded(model: Model, options: argparse.Namespace) -> Pairs:
    data = Captioned(options.pairs, model.transform, model.tokenize)
    return encode_pairs(model, data, _reading(options))


def _reading(options: argparse.Namespace) -> Reading:
    return Reading(options.batch_size, workers=options.workers)


def measure_zero_shot(model: Model, options: argparse.Namespace) -> Result:
    """Sets that are not there are told in the notes; at least one must be."""
    numbers: dict[str, float] = {}
    notes: list[str] = []
    for name, images in _named(options.data):
        if Path(images).suffix != ".tar" and not Path(images).is_dir():
            notes.append(f"{name}: not found at {images}.")
            continue
        data = classification(name, images, model.transform)
        for measure, value in zero_shot(model, data, _reading(options)).items():
            numbers[f"{name} {measure.removeprefix('zeroshot-')}"] = value
    if not numbers:
        raise UserError(f"none of the data sets is there: {' '.join(notes)}")
    return Result(numbers, notes=notes)


def measure_probe(model: Model, options: argparse.Namespace) -> Result:
    numbers: dict[str, float] = {}
    for name, folder in _named(options.data):
        parts = [_features(model, f"{folder}/{x}", options) for x in ("train", "test")]
        train, test = parts
        numbers |= {f"{name} linear {k}": v for k, v in linear_probe(train, test).items()}
        numbers[f"{name} knn top1"] = knn(train, test)
    return Result(numbers)


def measure_agreement(model: Model, options: argparse.Namespace) -> Result:
    rows = [row for row in read_rows(options.judgements) if row.score is not None]
    if not rows:
        raise UserError(f"{options.judgements} has no rows with a score")
    cosines = []
    for start in tqdm(range(0, len(rows), options.batch_size), desc=model.label, unit="batch"):
        batch = rows[start : start + options.batch_size]
        images = torch.stack([model.transform(open_image(row.image)) for row in batch])
        texts = model.tokenize([row.caption for row in batch])
        cosines.append((model.images(images) * model.texts(texts)).sum(1))
    scores = torch.tensor([row.score for row in rows if row.score is not None])
    numbers = graded_agreement(torch.cat(cosines), scores)
    return Result(numbers, notes=[f"{len(rows)} judgements."])


def _features(model: Model, folder: str, options: argparse.Namespace) -> Labelled:
    data = Classification(folder, None, model.transform)
    batches = tqdm(_reading(options).batches(data), desc=folder, unit="batch")
    encoded = [(model.images(images), labels) for images, labels in batches]
    if not encoded:
        raise UserError(f"no image in {folder} could be read")
    features, labels = (torch.cat(x).numpy() for x in zip(*encoded, strict=True))
    return Labelled(features, labels.astype(np.int64))


def _named(specs: list[str]) -> list[tuple[str, str]]:
    """Pairs of "name=path".

    Raises:
        UserError: a name or a path is missing.
    """
    named = [tuple(spec.partition("=")[::2]) for spec in specs]
    for spec, (name, path) in zip(specs, named, strict=True):
        if not (name and path):
            raise UserError(f"give data sets as name=path, got {spec!r}")
    return [(name, path) for name, path in named]


COMMANDS: dict[str, tuple[str, Callable[[Model, argparse.Namespace], Result]]] = {
    "retrieval": ("Retrieval, R@1, R@5 and R@10", measure_retrieval),
    "gap": ("Modality gap", measure_gap),
    "zero_shot": ("Zero-shot classification", measure_zero_shot),
    "probe": ("Probes of frozen image features", measure_probe),
    "agreement": ("Agreement with graded human judgements, Kendall's tau", measure_agreement),
}
"""Title of each command, and what measures a model."""
