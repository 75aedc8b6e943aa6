"""The demo's teacher: a small DINOv3 whose features examples/cc3m/extract_dinov3.py writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.cc3m.extract_dinov3 import extract, parse
from examples.cc3m.features import FeatureReader


@dataclass(frozen=True)
class TeacherSettings:
    """Which teacher, as examples/cc3m/extract_dinov3.py takes it.

    Args:
        model, options: name in timm or transformers, and arguments of its library.
        random_weights: of that architecture, so that nothing is downloaded; else its own.
        dim: of the PCA.
    """

    model: str = "vit_small_patch16_dinov3"
    options: dict[str, Any] = field(
        default_factory=lambda: {"depth": 2, "embed_dim": 192, "num_heads": 3}
    )
    random_weights: bool = True
    dim: int = 64


def extract_features(
    settings: TeacherSettings, shards: Sequence[str], resolution: int, *, fresh: bool
) -> FeatureReader:
    """Features of all images of the shards, beside them; what is there already stays.

    Args:
        settings: the teacher.
        shards: image shards of one folder.
        resolution: of the images, as the towers see them.
        fresh: throw away features of other settings.

    Raises:
        UserError: it cannot be done, or other settings made the features that are there.
    """
    command = [*shards, "--model", settings.model, "--model-options", json.dumps(settings.options)]
    command += ["--resolution", str(resolution), "--dim", str(settings.dim)]
    command += ["--device", "cpu", "--batch-size", "128", "--workers", "2"]
    command += ["--random-weights"] * settings.random_weights + ["--fresh"] * fresh
    extract(parse(command))
    return FeatureReader(Path(shards[0]).parent / "features", resolution=resolution)


def describe(manifest: dict[str, Any]) -> str:
    """A sentence or two for the report: whose features, and what may be expected of them."""
    options = f" {json.dumps(manifest['model_options'])}" if manifest["model_options"] else ""
    height, width = manifest["grid"]
    text = (
        f"Teacher: {manifest['model']}{options}, {height} x {width} patches of {manifest['dim']} "
        f"dimensions ({manifest['pca_explained']:.1%} of the second moment)"
    )
    if not manifest["random_weights"]:
        return f"{text}, with its trained weights."
    return (
        f"{text}, with RANDOM weights: its features carry no semantics. What its row gains comes "
        "from the student itself, a second small network in each tower, not from what a trained "
        "DINOv3 knows. `--teacher NAME` takes one whose weights are at hand."
    )
