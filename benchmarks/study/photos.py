"""Photographs with captions and people's grades, in the format of Flickr8k's files."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from benchmarks.study.data import Batch, second_view, to_bytes
from benchmarks.study.questions import METRIC_OF
from benchmarks.study.settings import Scale
from examples.cc3m.recipe import build_tokenizer
from examples.common.files import UserError
from examples.common.images import normalise
from examples.evaluation.gap import gap_measures
from examples.evaluation.models import Pairs
from examples.evaluation.retrieval import graded_agreement, retrieval
from rankloss import DinoRankCLIP


@dataclass(frozen=True)
class PhotoFiles:
    """Files of a captioned set of photographs; they are read, never copied.

    Args:
        photos: folder of images.
        captions: lines "image,caption" under such a header; the i-th line of an image is caption
            "image#i", from 0.
        grades: lines "image <tab> image#i <tab> grade <tab> grade ...", one grade a person
            (Flickr8k's ExpertAnnotations).
    """

    photos: Path
    captions: Path
    grades: Path


@dataclass(frozen=True)
class Grade:
    """A person's grade of a caption for an image."""

    image: str
    caption: str
    value: float


def read_captions(path: Path) -> dict[str, list[str]]:
    """Return the captions of each image.

    Raises:
        UserError: the header is another one.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != ["image", "caption"]:
        raise UserError(f"{path} must begin with the header image,caption")
    found: dict[str, list[str]] = {}
    for image, *rest in lines[1:]:
        found.setdefault(image, []).append(",".join(rest))
    return found


def read_grades(path: Path, captions: dict[str, list[str]]) -> list[Grade]:
    """Return all grades of captions for images other than their own, one entry a person.

    An image's own caption is left out, as is usual for Flickr8k-Expert.

    Raises:
        UserError: a line has another form, or names a caption that is not there.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            image, reference, *grades = line.split("\t")
            owner, index = reference.rsplit("#", 1)
            text = captions[owner][int(index)]
            values = [float(x) for x in grades]
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{path}, line {number}: expected image, image#index of a known caption, and "
                f"grades, with tabs between, got {line!r}"
            ) from error
        if owner != image:
            found += [Grade(image, text, value) for value in values]
    return found


@dataclass(frozen=True, eq=False)
class PhotoData:
    """Photographs in memory: those graded are held out, the others are trained on.

    Args:
        train: (N, 3, S, S) bytes, S being the side before cropping.
        held: (M, 3, s, s) bytes, the centres of the photographs that are held out.
        texts: for each training image the tokens of its captions, (C, L).
        held_texts, image_of_text: (T, L) tokens of held-out captions, and the image of each (T,).
        graded: (G,) row of the image of each grade, (G, L) tokens of its caption, (G,) grade.
    """

    train: Tensor
    held: Tensor
    texts: list[Tensor]
    held_texts: Tensor
    image_of_text: Tensor
    graded: tuple[Tensor, Tensor, Tensor]

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Return random crops, half of them mirrored, each with one of its captions."""
        size = self.held.shape[-1]
        places = self.train.shape[-1] - size + 1
        x, y = torch.randint(0, places, (2, len(rows)), generator=generator).tolist()
        mirrored = (torch.rand(len(rows), generator=generator) < 0.5).tolist()
        drawn = torch.rand(2, len(rows), generator=generator).tolist()
        crops, texts, others = [], [], []
        for i, row in enumerate(rows.tolist()):
            crop = self.train[row, :, y[i] : y[i] + size, x[i] : x[i] + size]
            crops.append(crop.flip(-1) if mirrored[i] else crop)
            known = self.texts[row]
            texts.append(known[int(drawn[0][i] * len(known))])
            others.append(known[int(drawn[1][i] * len(known))])
        pixels = torch.stack(crops)
        other = second_view(pixels, generator)
        images, views = (normalise(p) for p in (pixels, other))
        return Batch(images, torch.stack(texts), views, torch.stack(others), rows, None)


@functools.lru_cache(maxsize=1)
def load_photos(files: PhotoFiles, scale: Scale) -> PhotoData:
    """Read the photographs; those that someone graded are held out, all others trained on.

    Raises:
        UserError: no image is graded, or none is left to train on.
    """
    captions = read_captions(files.captions)
    grades = read_grades(files.grades, captions)
    named = {grade.image for grade in grades}
    held = [name for name in captions if name in named]
    train = [name for name in captions if name not in named]
    if not held or not train:
        raise UserError(
            f"{files.captions} names {len(held)} graded images and {len(train)} others; both are "
            "needed, to measure on and to train on"
        )
    tokenize = build_tokenizer(scale.model)
    size = scale.model["vision_cfg"]["image_size"]
    side = size + scale.photo_margin
    row = {name: i for i, name in enumerate(held)}
    graded = (
        torch.tensor([row[grade.image] for grade in grades]),
        tokenize([grade.caption for grade in grades]),
        torch.tensor([grade.value for grade in grades]),
    )
    owners = [i for i, name in enumerate(held) for _ in captions[name]]
    return PhotoData(
        _pixels(files.photos, train, side),
        center_crop(_pixels(files.photos, held, side), [size, size]),
        [tokenize(captions[name]) for name in train],
        tokenize([text for name in held for text in captions[name]]),
        torch.tensor(owners),
        graded,
    )


def _pixels(folder: Path, names: Sequence[str], side: int) -> Tensor:
    """Read images, cropped to their centre square, as (N, 3, side, side) bytes."""

    def read(name: str) -> Tensor:
        with Image.open(folder / name) as image:
            least = min(image.size)
            left, top = ((length - least) // 2 for length in image.size)
            square = image.convert("RGB").crop((left, top, left + least, top + least))
            return to_bytes(square.resize((side, side), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(read, names)))


@torch.no_grad()
def measure_photos(
    towers: DinoRankCLIP, data: PhotoData
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """Measure retrieval, the gap, and agreement with grades; also return held-out pairs (N, D).

    The pairs are of each image's first caption.
    """
    pixels = normalise(data.held)
    images = torch.cat([towers.encode_image(x) for x in torch.split(pixels, 256)])
    rows, tokens, values = data.graded
    texts, graded = (
        torch.cat([towers.encode_text(x) for x in torch.split(part, 512)])
        for part in (data.held_texts, tokens)
    )
    found = {
        METRIC_OF[name]: value
        for name, value in retrieval(images, texts, data.image_of_text).items()
    }
    found |= graded_agreement((images[rows] * graded).sum(1), values)
    pairs = images, Pairs(images, texts, data.image_of_text).first_texts()
    return {**found, **gap_measures(*pairs)}, pairs
