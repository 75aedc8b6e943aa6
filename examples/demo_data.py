"""Generated scenes in the place of CC3M, for `examples/train_cc3m.py --demo`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from examples.demo_teacher import TeacherSettings, extract_features
from examples.files import replaced_directory
from examples.models import model_config
from examples.parallel import Parallel
from examples.run_settings import RunSettings
from examples.scene_shards import SceneSettings, prepare_scenes
from examples.scenes import Scene
from examples.shards import Failures, decode_image, read_shard


def prepare_demo(settings: RunSettings, parallel: Parallel) -> RunSettings:
    """With --demo, make the scenes and point the settings to them; else change nothing."""
    if not settings.demo:
        return settings
    folder = settings.out.parent / f"{settings.out.name}-data"
    size = model_config(settings.model)["vision_cfg"]["image_size"]
    eighth = max(1, settings.scenes // 8)
    scenes = SceneSettings(
        image_size=size, train=settings.scenes, heldout=eighth, probe=eighth, per_shard=eighth
    )
    if parallel.first:
        shards = prepare_scenes(scenes, folder)
        _write_folders(shards["probe"], folder / "shapes")
        if settings.recipe.distillation is not None:
            extract_features(TeacherSettings(), shards["train"], size, fresh=False)
    parallel.agree(False)  # the others read what the first has made
    shards = prepare_scenes(scenes, folder)
    evaluation = replace(
        settings.evaluation,
        pairs=settings.evaluation.pairs or _spec(shards["heldout"]),
        images=settings.evaluation.images or str(folder / "shapes"),
    )
    features = folder / "train" / "features"
    return replace(
        settings,
        data=_spec(shards["train"]),
        features=features if settings.recipe.distillation is not None else None,
        evaluation=evaluation,
    )


def _spec(shards: list[str]) -> str:
    first, last = Path(shards[0]), Path(shards[-1])
    return str(first.with_name(f"{{{first.stem}..{last.stem}}}.tar"))


def _write_folders(shards: list[str], folder: Path) -> None:
    """A folder of images for each shape, as zero-shot classification reads them."""
    if folder.exists():
        return
    with replaced_directory(folder) as fresh:
        for shard in shards:
            for sample in read_shard(shard, Failures()):
                scene = Scene.from_json(json.loads(sample["json"])["scene"])
                place = fresh / scene.things[0].shape
                place.mkdir(exist_ok=True)
                decode_image(sample).save(place / f"{sample['__key__']}.png")
