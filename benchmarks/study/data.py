"""Batches of scenes, the same for all rows that share a seed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from torch import Tensor

from benchmarks.study.settings import Scale, Teacher, Trained
from examples.cc3m.recipe import build_tokenizer, build_transform
from examples.common.images import normalise
from examples.demo.captions import caption
from examples.demo.measures import Split, read_split
from examples.demo.scene_shards import SceneSettings, prepare_scenes, read_pictures
from examples.self_distillation.measure import build_teacher
from examples.self_distillation.settings import TEACHER
from rankloss.fusion.teacher import IMAGENET_MEAN, IMAGENET_STD

SHIFT = 4
"""Pixels at most by which a second view is shifted."""


class Batch(NamedTuple):
    """Pairs of a step, with the seconds that some objectives want.

    Attributes:
        images: (B, 3, H, W) normalised.
        texts: (B, L) tokens.
        other_images, other_texts: another view and another caption of the same pairs.
        text_ids: (B,) number of each caption, equal for equal captions.
        teacher: (B, P, D) patch tokens, or None.
    """

    images: Tensor
    texts: Tensor
    other_images: Tensor
    other_texts: Tensor
    text_ids: Tensor
    teacher: Tensor | None


class Data(Protocol):
    """Pairs to train on."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return some pairs; whatever is random comes from the generator."""


def batches(data: Data, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end, epoch after epoch, in an order that the seed alone decides."""
    order = torch.Generator().manual_seed(seed)
    within = torch.Generator().manual_seed(seed + 1_000_000)
    left = torch.empty(0, dtype=torch.long)
    while True:
        if len(left) < size:
            left = torch.randperm(len(data), generator=order)
        rows, left = left[:size], left[size:]
        yield data.batch(rows, within)


def second_view(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a few pixels and change its brightness by up to a fifth, as bytes."""
    size = pixels.shape[-1]
    padded = F.pad(pixels.float(), (SHIFT,) * 4, mode="replicate")
    x, y = torch.randint(0, 2 * SHIFT + 1, (2, len(pixels)), generator=generator).tolist()
    gain = 0.8 + 0.4 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    shifted = [p[:, b : b + size, a : a + size] for p, a, b in zip(padded, x, y, strict=True)]
    return (torch.stack(shifted) * gain).clamp(0, 255).round().byte()


@dataclass(frozen=True, eq=False)
class SceneData:
    """Training scenes in memory.

    Args:
        pixels: (N, 3, H, W) bytes.
        texts, other_texts: (N, L) tokens of two captions of each scene.
        text_ids: (N,) number of each first caption, as `numbered` gives it.
        teacher: (N, P, D) patch tokens, or None.
    """

    pixels: Tensor
    texts: Tensor
    other_texts: Tensor
    text_ids: Tensor
    teacher: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        pixels = self.pixels[rows]
        other = second_view(pixels, generator)
        images, others = (normalise(x) for x in (pixels, other))
        teacher = None if self.teacher is None else self.teacher[rows]
        return Batch(
            images, self.texts[rows], others, self.other_texts[rows], self.text_ids[rows], teacher
        )

    def shuffled(self, share: float, seed: int) -> SceneData:
        """Return the data with a share of the captions shuffled among their scenes."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self), generator=generator)[: round(share * len(self))]
        moved = torch.arange(len(self))
        moved[rows] = rows[torch.randperm(len(rows), generator=generator)]
        texts, others, ids = (x[moved] for x in (self.texts, self.other_texts, self.text_ids))
        return replace(self, texts=texts, other_texts=others, text_ids=ids)


def numbered(captions: Sequence[str]) -> Tensor:
    """Number captions (N,), equal ones alike."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[text] for text in captions])


class Scenes(NamedTuple):
    """Training data and both splits to measure on."""

    train: SceneData
    heldout: Split
    probe: Split
    tokenize: Callable[[list[str]], Tensor]


@functools.lru_cache(maxsize=2)
def load_scenes(scenes: SceneSettings, context: int, folder: Path) -> Scenes:
    """Read scenes, written to `folder` by the first process that asks."""
    config: dict[str, Any] = {
        "vision_cfg": {"image_size": scenes.image_size},
        "text_cfg": {"context_length": context},
    }
    tokenize, transform = build_tokenizer(config), build_transform(config)
    place = folder / f"scenes-{scenes.image_size}-{scenes.train}-{scenes.omit:g}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        shards = prepare_scenes(scenes, place)
    pictures = list(read_pictures(shards["train"]))
    captions = [picture.caption for picture in pictures]
    others = [
        caption(picture.scene, random.Random(f"second/{picture.key}"), scenes.omit)
        for picture in pictures
    ]
    pixels = torch.stack([to_bytes(picture.image) for picture in pictures])
    train = SceneData(pixels, tokenize(captions), tokenize(others), numbered(captions))
    heldout, probe = (read_split(shards[x], transform, tokenize) for x in ("heldout", "probe"))
    return Scenes(train, heldout, probe, tokenize)


def to_bytes(image: Image.Image) -> Tensor:
    """Return (3, H, W) bytes of an RGB image."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def scene_data(settings: Trained, scale: Scale, seed: int, folder: Path) -> Scenes:
    """Return the data of one run: its captions, its noise, its teacher's features."""
    context = scale.model["text_cfg"]["context_length"]
    loaded = load_scenes(replace(scale.scenes, omit=settings.omit), context, folder)
    train = loaded.train
    if settings.teacher != "none":
        train = replace(train, teacher=teacher_tokens(settings.teacher, train.pixels, seed))
    if settings.noise:
        train = train.shuffled(settings.noise, seed)
    return loaded._replace(train=train)


@torch.no_grad()
def teacher_tokens(teacher: Teacher, pixels: Tensor, seed: int) -> Tensor:
    """Return (N, P, D) patch tokens of a frozen teacher, its weights random by `seed` if asked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_teacher(TEACHER if teacher == "self-distilled" else None)
    parts = [normalise(x, IMAGENET_MEAN, IMAGENET_STD) for x in torch.split(pixels, 128)]
    return torch.cat([network(x).patches for x in parts])
