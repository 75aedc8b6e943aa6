"""Probes of a frozen teacher's features on scenes: five attribute families, new combinations.

    python -m examples.self_distillation.measure                        # the committed teacher
    python -m examples.self_distillation.measure --weights FILE --out runs/teacher

Each family is probed by a linear classifier and by neighbours, on fresh scenes of the colour-shape
pairs that the probe learnt from, and on scenes with pairs that it has never seen together. Beside
the teacher stands the same network with random weights. Prints a table; with --out also
writes teacher.json, teacher.md and teacher.png.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from examples.common.images import normalise
from examples.demo.drawing import draw
from examples.demo.scenes import ATTRIBUTES, RELATIONS, Scene, sample_scene
from examples.evaluation.probes import Labelled, knn, linear_probe
from examples.evaluation.report import Table, write_report
from examples.self_distillation.settings import MODEL, OPTIONS, TEACHER
from rankloss.fusion.teacher import IMAGENET_MEAN, IMAGENET_STD, Dinov3Teacher

TRAIN, TEST = 1000, 400
"""Scenes of a family."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=TEACHER)
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--train", type=int, default=TRAIN, help="scenes that a probe learns from")
    parser.add_argument("--test", type=int, default=TEST)
    parser.add_argument("--seeds", type=int, default=3, help="random networks to compare with")
    options = parser.parse_args(arguments)
    if not options.weights.exists():
        print(f"error: {options.weights} does not exist; train it first", file=sys.stderr)
        return 2
    teachers = {"self-distilled": build_teacher(options.weights)}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        teachers[f"random, seed {seed}"] = build_teacher(None)
    measured = measure(teachers, options.train, options.test)
    table = Table("teacher", measured, "Accuracy of probes of frozen features")
    print(table.text())
    if options.out is not None:
        write_report(options.out, "teacher", table, {"weights": str(options.weights)})
    return 0


def build_teacher(weights: Path | None) -> Dinov3Teacher:
    """The recipe's network, with these weights or with random ones."""
    options: dict[str, Any] = dict(OPTIONS)
    if weights is not None:
        options["checkpoint_path"] = str(weights)
    return Dinov3Teacher(
        MODEL, pretrained=False, input_mean=IMAGENET_MEAN, input_std=IMAGENET_STD, **options
    )


def measure(
    teachers: dict[str, Dinov3Teacher], train: int, test: int
) -> dict[str, dict[str, float]]:
    """Accuracy by teacher, then by "<family>, <pairs> pairs, <probe>"."""
    measured: dict[str, dict[str, float]] = {name: {} for name in teachers}
    for family in tqdm(FAMILIES, unit="family"):
        seen = family_scenes(family, train + test, unseen=False)
        new = family_scenes(family, test, unseen=True)
        images = [
            scene_images(scenes, f"{family}/{i}") for i, (scenes, _) in enumerate((seen, new))
        ]
        for name, teacher in teachers.items():
            known, unknown = (
                Labelled(encode(teacher, x).numpy(), np.array(labels))
                for x, (_, labels) in zip(images, (seen, new), strict=True)
            )
            learnt = Labelled(known.features[:train], known.labels[:train])
            held = Labelled(known.features[train:], known.labels[train:])
            for pairs, part in (("seen", held), ("new", unknown)):
                row = f"{family}, {pairs} pairs"
                measured[name][f"{row}, linear"] = linear_probe(learnt, part)["top1"]
                measured[name][f"{row}, k-NN"] = knn(learnt, part)
    return measured


@torch.no_grad()
def encode(teacher: Dinov3Teacher, images: Tensor) -> Tensor:
    """CLS and mean patch, each unit-norm, side by side: (N, 3, H, W) -> (N, 2 D)."""
    tokens = [teacher(x) for x in torch.split(images, 128)]
    parts = torch.cat([x.cls for x in tokens]), torch.cat([x.patches.mean(1) for x in tokens])
    return torch.cat([F.normalize(x, dim=1) for x in parts], 1)


def scene_images(scenes: list[Scene], purpose: str, size: int = 64) -> Tensor:
    """(N, 3, size, size) normalised by ImageNet's statistics."""
    return normalise(scene_pixels(scenes, purpose, size), IMAGENET_MEAN, IMAGENET_STD)


def scene_pixels(scenes: list[Scene], purpose: str, size: int) -> Tensor:
    """(N, 3, size, size) uint8."""
    pictures = [
        np.asarray(draw(scene, random.Random(f"{purpose}/{i}"), size))
        for i, scene in enumerate(scenes)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def family_scenes(family: str, count: int, *, unseen: bool) -> tuple[list[Scene], list[int]]:
    """Scenes and their classes; `unseen` ones each hold a colour-shape pair not in the others."""
    rng = random.Random(f"{family}/{unseen}")
    label, things = FAMILIES[family]
    scenes: list[Scene] = []
    labels: list[int] = []
    while len(scenes) < count:
        scene = sample_scene(rng, things, unseen=unseen)
        number = label(scene)
        if number is not None:
            scenes.append(scene)
            labels.append(number)
    return scenes, labels


def _attribute(name: str) -> Callable[[Scene], int | None]:
    return lambda scene: ATTRIBUTES[name].index(getattr(scene.things[0], name))


def _relation(scene: Scene) -> int | None:
    """Relation of the small thing to the large one; None if both are of one size."""
    first, second = scene.things
    if first.size == second.size:
        return None
    small, large = (first, second) if first.size == "small" else (second, first)
    step = (large.cell[0] - small.cell[0], large.cell[1] - small.cell[1])
    return list(RELATIONS.values()).index(step)


FAMILIES: dict[str, tuple[Callable[[Scene], int | None], int]] = {
    **{name: (_attribute(name), 1) for name in ATTRIBUTES},
    "relation": (_relation, 2),
}
"""Family -> class of a scene (None: the scene is of no use), and how many things it holds."""


if __name__ == "__main__":
    sys.exit(main())
