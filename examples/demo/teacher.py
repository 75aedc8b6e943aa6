"""The demo's teacher: a small DINOv3 whose features `examples.cc3m.extract_dinov3` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from examples.cc3m.data.features import FeatureReader
from examples.cc3m.extract_dinov3 import extract, parse
from examples.self_distillation.settings import MODEL, OPTIONS, TEACHER

Weights = Literal["self-distilled", "random", "published"]
FLAGS: dict[Weights, list[str]] = {
    "self-distilled": ["--weights", str(TEACHER)],
    "random": ["--random-weights"],
    "published": [],
}
FINER = 2
"""Resolution of the features as a multiple of the images'; no recipe wants a finer one."""


@dataclass(frozen=True)
class TeacherSettings:
    """A teacher, as `examples.cc3m.extract_dinov3` takes it.

    Args:
        model, options: name in timm or transformers, and arguments of its library.
        weights: the committed ones of `examples.self_distillation`, random ones, or those that
            the library has by the model's name.
        dim: width of the features after PCA.
    """

    model: str = MODEL
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))
    weights: Weights = "self-distilled"
    dim: int = 64


def extract_features(
    settings: TeacherSettings, shards: Sequence[str], image_size: int, *, fresh: bool
) -> Path:
    """Write features of all images of the shards into a folder beside them, and return it.

    Args:
        settings: the teacher.
        shards: image shards of one folder; what is there already stays.
        image_size: width and height of the images, as the towers see them.
        fresh: throw away features of other settings.

    Raises:
        UserError: it cannot be done, or other settings made the features that are there.
    """
    command = [*shards, "--model", settings.model, "--model-options", json.dumps(settings.options)]
    command += ["--resolution", str(FINER * image_size), "--dim", str(settings.dim)]
    command += ["--device", "cpu", "--batch-size", "128", "--workers", "2"]
    command += FLAGS[settings.weights] + ["--fresh"] * fresh
    extract(parse(command))
    return Path(shards[0]).parent / "features"


def describe(folder: Path) -> str:
    """A sentence or two for the report: whose features, and what may be expected of them."""
    manifest = FeatureReader(folder).manifest
    options = f" {json.dumps(manifest['model_options'])}" if manifest["model_options"] else ""
    height, width = manifest["grid"]
    text = (
        f"Teacher: {manifest['model']}{options}, {height} x {width} patches of {manifest['dim']} "
        f"dimensions ({manifest['pca_explained']:.1%} of the second moment) from images at "
        f"{manifest['resolution']} pixels"
    )
    if manifest["random_weights"]:
        return (
            f"{text}, with RANDOM weights: its features carry no semantics, and nothing of its row "
            "comes from knowledge of a trained DINOv3."
        )
    if "weights_file" in manifest:
        return (
            f"{text}, with the weights that examples/self_distillation made by DINOv3's recipe "
            "from images of the training split's scenes and others like them, without captions "
            "and without any held-out scene; they are not DINOv3's. `--teacher random` is the "
            "control, `--teacher NAME` takes a DINOv3 whose weights are at hand."
        )
    return f"{text}, with its published weights."
