"""From settings and a seed to a row's numbers."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.data import Scenes, scene_data
from benchmarks.study.learnt import gates, likelihood, slices
from benchmarks.study.photos import PhotoFiles, load_photos, measure_photos
from benchmarks.study.planted import measure_planted
from benchmarks.study.settings import Planted, Scale, Trained
from benchmarks.study.training import train, transition_heads
from examples.common.images import normalise
from examples.demo.measures import encode_splits, measure
from examples.evaluation.gap import gap_curve, gap_measures
from examples.evaluation.probes import Labelled, linear_probe
from examples.self_distillation.measure import FAMILIES, family_scenes, scene_pixels
from rankloss import DinoRankCLIP

Result = dict[str, Any]
"""A row's "measures" (name -> number), "cost" and "curves"; all JSON-able."""


def run(
    settings: Planted | Trained, seed: int, scale: Scale, folder: Path, photos: PhotoFiles | None
) -> Result:
    """Run one row at one seed.

    Args:
        settings, seed, scale: what to run.
        folder: holds generated scenes.
        photos: files of the photographs, for rows that want them.
    """
    settings = scale.limited(settings)
    if isinstance(settings, Planted):
        return {"measures": measure_planted(settings, seed), "cost": {}, "curves": {}}
    if settings.photos:
        if photos is None:
            raise ValueError(
                "this row trains on photographs: give --photos FOLDER --captions FILE --grades FILE"
            )
        pictures = load_photos(photos, scale)
        towers, cost = train(settings, scale, pictures, seed)
        found, pairs = measure_photos(towers, pictures)
        told: dict[str, Any] = {}
    else:
        scenes = scene_data(settings, scale, seed, folder)
        towers, cost = train(settings, scale, scenes.train, seed)
        found, pairs, told = _measure_scenes(towers, scenes, scale)
    heads = transition_heads(towers)
    losses, curves = likelihood(*pairs, logit_scale(towers), heads, settings.batch)
    return {"measures": found | losses, "cost": asdict(cost), "curves": {**curves, **told}}


def _measure_scenes(
    towers: DinoRankCLIP, scenes: Scenes, scale: Scale
) -> tuple[dict[str, float], tuple[Tensor, Tensor], dict[str, Any]]:
    """Return measures on held-out scenes, embeddings of the pairs (N, D), and curves."""
    features = encode_splits(towers, scenes.heldout, scenes.probe, scenes.tokenize)
    pairs = features["heldout_images"], features["heldout_texts"]
    outcomes = measure(features, scenes.heldout.scenes, scenes.probe.scenes)
    found = {name: float(x.double().mean()) for name, x in outcomes.items() if name != "gap"}
    found |= gap_measures(*pairs)
    found |= probes(towers, scale)
    found |= gates(towers, scenes.heldout.scenes, scenes.tokenize)
    told: dict[str, Any] = {"gap": gap_curve(*pairs, logit_scale(towers))}
    if heads := transition_heads(towers):
        told["slices"] = slices(features, heads[-1])
    return found, pairs, told


def logit_scale(towers: DinoRankCLIP) -> float:
    """Return the scale itself, not its logarithm."""
    model: Any = towers.model
    return float(model.logit_scale.detach().exp())


@torch.no_grad()
def probes(towers: DinoRankCLIP, scale: Scale) -> dict[str, float]:
    """Measure linear probes of the image features on five families, on colour-shape pairs new to
    both, and their mean."""
    found = {}
    for family in FAMILIES:
        parts = []
        for images, labels in _family(family, scale):
            features = [towers.encode_image(x) for x in torch.split(images, 256)]
            parts.append(Labelled(torch.cat(features).numpy(), labels))
        found[f"probe_{family}"] = linear_probe(*parts, max_iter=scale.probe_iterations)["top1"]
    return {**found, "probe_mean": float(np.mean(list(found.values())))}


@functools.lru_cache(maxsize=16)
def _family(family: str, scale: Scale) -> list[tuple[Tensor, Any]]:
    """Images and labels to learn a probe from (seen pairs), and to test it on (unseen pairs)."""
    parts = []
    for count, unseen in ((scale.probe_train, False), (scale.probe_test, True)):
        scenes, labels = family_scenes(family, count, unseen=unseen)
        pixels = scene_pixels(scenes, f"{family}/{unseen}", scale.scenes.image_size)
        parts.append((normalise(pixels), np.array(labels, np.int64)))
    return parts
