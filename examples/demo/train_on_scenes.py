"""Run the CC3M training script on generated scenes, which need no download.

    python -m examples.demo.train_on_scenes                    # two CPU cores, a minute
    python -m examples.demo.train_on_scenes --recipe rankclip --train.epochs 5
    torchrun --nproc_per_node 2 -m examples.demo.train_on_scenes

Scenes (and with a recipe that distils, features of the demo's teacher) are made beside the run's
folder once; every other option goes to `examples.cc3m.train`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from examples.cc3m import train
from examples.cc3m.recipe import load_recipe, model_config
from examples.common.files import UserError, replaced_directory
from examples.demo.scene_shards import SceneSettings, prepare_scenes, read_pictures, shard_range
from examples.demo.teacher import TeacherSettings, extract_features

SHORT = (
    *("--workers", "1", "--shuffle", "800", "--no-augment", "--train.epochs", "3"),
    *("--train.batch-size", "64", "--train.learning-rate", "5e-4", "--train.warmup-steps", "40"),
    *("--train.precision", "fp32", "--train.checkpoint-steps", "20", "--train.log-steps", "10"),
)
"""Options that suit so little data; the command line's own come after them and win."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the scenes, then train on them; return the training script's exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scenes", type=int, default=3200, help="training scenes to generate")
    parser.add_argument("--out", type=Path, default=Path("runs/cc3m-demo"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipe", default="highorder_r3")
    own, rest = parser.parse_known_args(arguments)
    chosen = ["--recipe", own.recipe, "--model", own.model, "--out", str(own.out)]
    try:
        data = prepare(own.scenes, own.model, own.recipe, own.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return train.main([*SHORT, *chosen, *data, *rest])


def prepare(count: int, model: str, recipe: str, out: Path) -> list[str]:
    """Make the data that are not there yet; return the script's options for them.

    One of several processes makes them, the others wait.

    Args:
        count: training scenes; an eighth of it is held out, and an eighth are single things.
        model: name of the model, which decides the images' size.
        recipe: name or file; a recipe that distils also needs features.
        out: the run's folder; data go to "<out>-data" beside it.

    Raises:
        UserError: there is no such model or recipe, or something else is in the data's folder.
    """
    folder = out.parent / f"{out.name}-data"
    size, eighth = model_config(model)["vision_cfg"]["image_size"], max(1, count // 8)
    distils = load_recipe(recipe).distillation is not None
    scenes = SceneSettings(0, size, count, heldout=eighth, probe=eighth, per_shard=eighth)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        shards = prepare_scenes(scenes, folder)
        _write_folders(shards["probe"], folder / "shapes")
        options = ["--data", shard_range(shards["train"])]
        if distils:
            made = extract_features(TeacherSettings(), shards["train"], size, fresh=False)
            options += ["--features", str(made)]
    options += ["--evaluation.pairs", shard_range(shards["heldout"])]
    return [*options, "--evaluation.images", str(folder / "shapes")]


def _write_folders(shards: list[str], folder: Path) -> None:
    """Write a folder of images for each shape, as zero-shot classification reads them."""
    if folder.exists():
        return
    with replaced_directory(folder) as fresh:
        for picture in read_pictures(shards):
            place = fresh / picture.scene.things[0].shape
            place.mkdir(exist_ok=True)
            picture.image.save(place / f"{picture.key}.png")


if __name__ == "__main__":
    sys.exit(main())
