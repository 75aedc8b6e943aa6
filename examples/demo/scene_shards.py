"""The demo's data set: scenes written once as webdataset shards, in img2dataset's layout.

    data/manifest.json           settings, and how many samples each split has
    data/<split>/00000.tar       000000000.jpg, 000000000.json, 000000000.txt, 000000001.jpg, ...
    data/<split>/00000_stats.json

Splits: `train` (colour-shape pairs all seen); `heldout` (several things, every scene with an
unseen pair; families of near neighbours, so that the nearest caption is not an easy guess);
`probe` (single things, half of them with an unseen pair, for zero-shot classification).
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import webdataset as wds
from PIL import Image

from examples.common.files import UserError, read_json, replaced_directory, write_json
from examples.common.images import decode_image
from examples.common.ranges import check_least
from examples.common.shards import Failures, read_shard
from examples.demo.captions import caption
from examples.demo.drawing import draw
from examples.demo.scenes import UNSEEN_PAIRS, Scene, edit_scene, sample_scene

GENERATOR = 3
"""Raise it whenever scenes, captions or drawings change: old data are then made anew."""
TRAIN_THINGS = (1, 2, 2, 2, 3)
"""Numbers of things, equally likely."""
HELDOUT_THINGS = (2, 2, 3)


@dataclass(frozen=True)
class SceneSettings:
    """Data to generate.

    Args:
        seed: decides everything.
        image_size: width and height in pixels.
        train, heldout, probe: samples in each split.
        per_shard: samples in a tar, at most 10000 (four digits of the key).
        omit: probability of leaving an attribute out of a training caption; the others are full.
    """

    seed: int = 0
    image_size: int = 64
    train: int = 5120
    heldout: int = 1024
    probe: int = 512
    per_shard: int = 1600
    omit: float = 0.4

    def __post_init__(self) -> None:
        check_least(self, 1, "train", "heldout", "probe", "per_shard")
        check_least(self, 32, "image_size")  # else things cannot be told apart
        if self.per_shard > 10_000:
            raise ValueError(f"per_shard must be at most 10000, got {self.per_shard}")


def prepare_scenes(settings: SceneSettings, directory: Path) -> dict[str, list[str]]:
    """Generate the data unless `directory` already holds them; return the shards of each split.

    Raises:
        UserError: `directory` exists and was not made by this function, so it is left alone.
    """
    manifest = directory / "manifest.json"
    wanted = {"generator": GENERATOR, **asdict(settings)}
    if directory.exists() and any(directory.iterdir()) and not manifest.exists():
        raise UserError(f"{directory} holds other files; choose an empty folder for the scenes")
    if not manifest.exists() or read_json(manifest)["settings"] != wanted:
        with replaced_directory(directory) as fresh:
            counts = {split: _write_split(fresh / split, split, settings) for split in _SPLITS}
            write_json(fresh / "manifest.json", {"settings": wanted, "samples": counts})
    return {
        split: [str(tar) for tar in sorted((directory / split).glob("*.tar"))] for split in _SPLITS
    }


def shard_range(shards: Sequence[str]) -> str:
    """Name consecutive shards as the training script takes them: "folder/{00000..00003}.tar"."""
    first, last = Path(shards[0]), Path(shards[-1])
    return str(first.with_name(f"{{{first.stem}..{last.stem}}}.tar"))


class Picture(NamedTuple):
    """One sample of the data."""

    key: str
    image: Image.Image
    caption: str
    scene: Scene


def read_pictures(shards: Sequence[str]) -> Iterator[Picture]:
    """All samples of some shards, in their order."""
    for shard in shards:
        for sample in read_shard(shard, Failures()):
            scene = Scene.from_json(json.loads(sample["json"])["scene"])
            yield Picture(sample["__key__"], decode_image(sample), sample["txt"].decode(), scene)


# ---------------------------------------------------------------- scenes of each split


def train_scenes(settings: SceneSettings) -> Iterator[Scene]:
    for index in range(settings.train):
        rng = _rng(settings, "train", index)
        yield sample_scene(rng, rng.choice(TRAIN_THINGS), unseen=False)


def heldout_scenes(settings: SceneSettings) -> Iterator[Scene]:
    """Distinct scenes in families: one, and copies of it in which 1, 2 and 3 facts differ."""
    told: set[object] = set()
    for index in itertools.count():
        rng = _rng(settings, "heldout", index)
        first = sample_scene(rng, rng.choice(HELDOUT_THINGS), unseen=True)
        for scene in (first, *(edit_scene(first, rng, facts) for facts in (1, 2, 3))):
            if scene.attributes() in told or not has_unseen_pair(scene):
                continue
            told.add(scene.attributes())
            yield scene
            if len(told) == settings.heldout:
                return


def probe_scenes(settings: SceneSettings) -> Iterator[Scene]:
    for index in range(settings.probe):
        yield sample_scene(_rng(settings, "probe", index), 1, unseen=index % 2 == 0)


def has_unseen_pair(scene: Scene) -> bool:
    return any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in scene.things)


_SPLITS = {"train": train_scenes, "heldout": heldout_scenes, "probe": probe_scenes}


def _rng(settings: SceneSettings, *purpose: object) -> random.Random:
    """Python seeds from a string by SHA-512: the same numbers on every platform."""
    return random.Random("/".join(map(str, (settings.seed, *purpose))))


# ---------------------------------------------------------------- writing


def _write_split(directory: Path, split: str, settings: SceneSettings) -> int:
    """Write a split's shards and their statistics; return the number of samples."""
    directory.mkdir()
    scenes = list(_SPLITS[split](settings))
    omit = settings.omit if split == "train" else 0.0
    for shard, start in enumerate(range(0, len(scenes), settings.per_shard)):
        chunk = scenes[start : start + settings.per_shard]
        stem = directory / f"{shard:05d}"
        with (
            open(f"{stem}.tar", "wb") as file,
            wds.TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for row, scene in enumerate(chunk):
                rng = _rng(settings, split, "picture", start + row)
                key = f"{shard:05d}{row:04d}"
                tar.write(_sample(scene, key, rng, omit, settings.image_size))
        write_json(Path(f"{stem}_stats.json"), {"count": len(chunk), "successes": len(chunk)})
    return len(scenes)


def _sample(scene: Scene, key: str, rng: random.Random, omit: float, size: int) -> dict[str, Any]:
    text = caption(scene, rng, omit)
    picture = io.BytesIO()
    # at full colour resolution: small things would lose theirs to chroma subsampling
    draw(scene, rng, size).save(picture, "JPEG", quality=92, subsampling=0)
    record = {
        "caption": text,
        "synthetic_caption": caption(scene, random.Random(f"{key}/synthetic")),  # nothing left out
        "key": key,
        "status": "success",
        "width": size,
        "height": size,
        "scene": scene.to_json(),
    }
    return {
        "__key__": key,
        "jpg": picture.getvalue(),
        "txt": text.encode(),
        "json": json.dumps(record).encode(),
    }
