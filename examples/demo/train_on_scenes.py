"""Run the CC3M training script on generated scenes, which need no download.

    python -m examples.demo.train_on_scenes                    # two CPU cores, a minute
    python -m examples.demo.train_on_scenes --recipe rankclip --train.epochs 5
    torchrun --nproc_per_node 2 -m examples.demo.train_on_scenes

Scenes (and with a recipe that distils, features of a small teacher with random weights) are made
beside the run's folder once; every other option goes to `examples.cc3m.train`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from examples.cc3m import train
from examples.cc3m.files import UserError, replaced_directory
from examples.cc3m.models import model_config
from examples.cc3m.recipe import load_recipe
from examples.cc3m.shards import Failures, decode_image, read_shard
from examples.demo.scene_shards import SceneSettings, prepare_scenes
from examples.demo.scenes import Scene
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
    """Make what is not there yet, in one process of several; the script's options for it.

    Args:
        count: training scenes; an eighth of it is held out, and an eighth are single things.
        model: name of the model, which decides the images' size.
        recipe: name or file; a recipe that distils also needs features.
        out: the run's folder; data go to "<out>-data" beside it.

    Raises:
        UserError: there is no such model or recipe, or something else is in the data's folder.
    """
    folder = out.parent / f"{out.name}-data"
    size = model_config(model)["vision_cfg"]["image_size"]
    distils = load_recipe(recipe).distillation is not None
    eighth = max(1, count // 8)
    scenes = SceneSettings(
        image_size=size, train=count, heldout=eighth, probe=eighth, per_shard=eighth
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        shards = prepare_scenes(scenes, folder)
        _write_folders(shards["probe"], folder / "shapes")
        if distils:
            extract_features(TeacherSettings(), shards["train"], size, fresh=False)
    options = ["--data", _spec(shards["train"]), "--evaluation.pairs", _spec(shards["heldout"])]
    options += ["--evaluation.images", str(folder / "shapes")]
    return options + ["--features", str(folder / "train" / "features")] * distils


def _spec(shards: list[str]) -> str:
    first, last = Path(shards[0]), Path(shards[-1])
    return str(first.with_name(f"{{{first.stem}..{last.stem}}}.tar"))


def _write_folders(shards: list[str], folder: Path) -> None:
    """Write a folder of images for each shape, as zero-shot classification reads them."""
    if folder.exists():
        return
    with replaced_directory(folder) as fresh:
        for shard in shards:
            for sample in read_shard(shard, Failures()):
                scene = Scene.from_json(json.loads(sample["json"])["scene"])
                place = fresh / scene.things[0].shape
                place.mkdir(exist_ok=True)
                decode_image(sample).save(place / f"{sample['__key__']}.png")


if __name__ == "__main__":
    sys.exit(main())
