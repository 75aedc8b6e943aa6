"""The demo's teacher: a small DINOv3 whose features `examples.cc3m.extract_dinov3` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.cc3m.data.features import FeatureReader
from examples.cc3m.extract_dinov3 import extract, parse


@dataclass(frozen=True)
class TeacherSettings:
    """A teacher, as `examples.cc3m.extract_dinov3` takes it.

    Args:
        model, options: name in timm or transformers, and arguments of its library.
        random_weights: draw the weights, so that nothing is downloaded, instead of loading them.
        dim: width of the features after PCA.
    """

    model: str = "vit_small_patch16_dinov3"
    options: dict[str, Any] = field(
        default_factory=lambda: {"depth": 2, "embed_dim": 192, "num_heads": 3}
    )
    random_weights: bool = True
    dim: int = 64


def extract_features(
    settings: TeacherSettings, shards: Sequence[str], resolution: int, *, fresh: bool
) -> Path:
    """Write features of all images of the shards into a folder beside them, and return it.

    Args:
        settings: the teacher.
        shards: image shards of one folder; what is there already stays.
        resolution: width and height of the images, as the towers see them.
        fresh: throw away features of other settings.

    Raises:
        UserError: it cannot be done, or other settings made the features that are there.
    """
    command = [*shards, "--model", settings.model, "--model-options", json.dumps(settings.options)]
    command += ["--resolution", str(resolution), "--dim", str(settings.dim)]
    command += ["--device", "cpu", "--batch-size", "128", "--workers", "2"]
    command += ["--random-weights"] * settings.random_weights + ["--fresh"] * fresh
    extract(parse(command))
    return Path(shards[0]).parent / "features"


def describe(folder: Path) -> str:
    """A sentence or two for the report: whose features, and what may be expected of them."""
    manifest = FeatureReader(folder).manifest
    options = f" {json.dumps(manifest['model_options'])}" if manifest["model_options"] else ""
    height, width = manifest["grid"]
    text = (
        f"Teacher: {manifest['model']}{options}, {height} x {width} patches of {manifest['dim']} "
        f"dimensions ({manifest['pca_explained']:.1%} of the second moment)"
    )
    if not manifest["random_weights"]:
        return f"{text}, with its trained weights."
    return (
        f"{text}, with RANDOM weights: its features carry no semantics, and nothing of its row "
        "comes from knowledge of a trained DINOv3. `--teacher NAME` takes one whose weights are "
        "at hand."
    )
