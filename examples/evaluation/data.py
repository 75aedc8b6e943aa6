"""Data to evaluate on: captioned images, images with grades of captions, classes of ImageNet."""

from __future__ import annotations

import csv
import importlib.resources
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import open_clip
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from examples.common.files import UserError
from examples.common.images import decode_image
from examples.common.shards import Failures, expand_shards, read_shard
from examples.evaluation.reading import Shared

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]
OBJECTNET = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
"""Files of ObjectNet's own `mappings` folder."""


class Captioned(Shared):
    """Images and all captions of each: (3, H, W) and (k, L) int64.

    Args:
        source: a spec of webdataset shards, whose "txt" has one caption a line; or a CSV file
            (tabs or commas) with a header, columns "filepath" and "title" (or "image" and
            "caption"), one row a caption, paths relative to the file.
        transform: PIL RGB -> (3, H, W).
        tokenize: captions -> (k, L) int64.

    Raises:
        UserError: the source cannot be read.
    """

    def __init__(self, source: str, transform: Transform, tokenize: Tokenize) -> None:
        self.transform, self.tokenize = transform, tokenize
        self.captions: dict[Path, list[str]] = {}
        self.shards: list[str] = []
        if source.endswith((".csv", ".tsv")):
            for row in read_rows(Path(source)):
                self.captions.setdefault(row.image, []).append(row.caption)
        else:
            self.shards = expand_shards(source)

    def samples(self) -> Iterator[tuple[Image.Image, list[str]]]:
        """Yield RGB images with their captions; samples of shards that are broken are left out."""
        for path in self.mine(list(self.captions)):
            yield open_image(path), self.captions[path]
        failures = Failures()
        for shard in self.mine(self.shards):
            for sample in read_shard(shard, failures):
                with failures.counting():
                    texts = sample["txt"].decode("utf-8").splitlines()
                    yield decode_image(sample), [text for text in texts if text.strip()]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, texts in self.samples():
            if texts:
                yield self.transform(image), self.tokenize(texts)


class Row(NamedTuple):
    """A line of a CSV file: an image, a caption, and how well people say it fits (or nothing)."""

    image: Path
    caption: str
    score: float | None


def read_rows(path: Path) -> list[Row]:
    """Lines of a CSV file with columns "filepath" or "image", "title" or "caption", and "score".

    Raises:
        UserError: the file or a column is missing, or a score is no number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    header = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in header else ","))
    try:
        return [
            Row(
                path.parent / (row.get("filepath") or row["image"]),
                row.get("title") or row["caption"],
                float(row["score"]) if row.get("score") else None,
            )
            for row in rows
        ]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} needs columns filepath (or image) and title (or caption), and for judgements "
            f"a score; its header is {header!r} ({error})"
        ) from error


def open_image(path: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        UserError: it is no image.
    """
    try:
        return decode_image({"__key__": str(path), "jpg": path.read_bytes()})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no image that can be read: {error}") from error


class Classification(Shared):
    """Labelled images and the names of their classes; images that cannot be read are left out.

    Args:
        images: a folder with a folder of images for each class, or a spec of shards whose samples
            have a "cls" number.
        classes: file with a class name a line, in the order of the numbers, or of the sorted
            folders; None: open_clip's names of ImageNet if there are 1000 folders, else the
            folders' names.
        transform: PIL RGB -> (3, H, W).
        names: those of the classes, in the place of `classes` and whatever the folders are called.

    Raises:
        UserError: there are no such images, or names are missing.
    """

    def __init__(
        self,
        images: str,
        classes: Path | None,
        transform: Transform,
        *,
        names: list[str] | None = None,
    ) -> None:
        self.transform = transform
        self.folder: ImageFolder | None = None
        self.shards: list[str] = []
        try:
            if Path(images).is_dir():
                self.folder = ImageFolder(images)
            else:
                self.shards = expand_shards(images)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{error}; give a folder of folders of images, or shards") from error
        self.names = self._names(classes) if names is None else names

    def _names(self, classes: Path | None) -> list[str]:
        if classes is not None:
            if not classes.exists():
                raise UserError(f"{classes} with the names of the classes does not exist")
            names = [x.strip() for x in classes.read_text(encoding="utf-8").splitlines()]
            names = [name for name in names if name]
        elif self.folder is None:
            raise UserError("shards have numbers of classes only; give a file with their names")
        elif len(self.folder.classes) == len(open_clip.IMAGENET_CLASSNAMES):
            names = list(open_clip.IMAGENET_CLASSNAMES)
        else:
            names = [name.replace("_", " ") for name in self.folder.classes]
        if self.folder is not None and len(names) != len(self.folder.classes):
            raise UserError(
                f"{classes} has {len(names)} names for {len(self.folder.classes)} folders"
            )
        return names

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        failures = Failures()
        if self.folder is not None:
            for path, label in self.mine(self.folder.samples):
                with failures.counting():
                    sample = {"__key__": path, "jpg": Path(path).read_bytes()}
                    yield self.transform(decode_image(sample)), label
            return
        for shard in self.mine(self.shards):
            for sample in read_shard(shard, failures):
                with failures.counting():
                    yield self.transform(decode_image(sample)), int(sample["cls"])


# ---------------------------------------------------------------- ImageNet and its relatives


def classification(name: str, images: str, transform: Transform) -> Classification:
    """Labelled images of a data set, with the classes that it has.

    Args:
        name: "imagenet-1k", "imagenet-sketch" (1000 classes, folders named by synset),
            "imagenet-v2" (1000 folders named by number), "imagenet-r", "imagenet-a" (200 classes
            each, folders named by synset), "objectnet" (its folder with `images` and `mappings`;
            the classes shared with ImageNet count), or anything else: folders named by class, and
            for shards a file "classnames.txt" beside them.
        images: a folder, or a spec of shards with a "cls" number in the order of the classes.
        transform: PIL RGB -> (3, H, W).

    Raises:
        UserError: the data are not there, or are not those of this data set.
    """
    if name == "objectnet":
        return _objectnet(Path(images), transform)
    if (numbers := numbers_of(name)) is not None:
        names = [open_clip.IMAGENET_CLASSNAMES[i] for i in numbers]
        folders = [str(i) for i in numbers] if name == "imagenet-v2" else synsets(numbers)
    elif Path(images).is_dir():
        return Classification(images, None, transform)
    else:
        return Classification(
            images, Path(expand_shards(images)[0]).parent / "classnames.txt", transform
        )
    return _with_classes(images, names, {x: i for i, x in enumerate(folders)}, transform, name)


def numbers_of(data_set: str) -> list[int] | None:
    """ImageNet-1k numbers of a data set's classes, in the order of its own; None: of others."""
    if data_set in ("imagenet-1k", "imagenet-v2", "imagenet-sketch"):
        return list(range(1000))
    if data_set in ("imagenet-r", "imagenet-a"):
        return [int(x) for x in _timm_list(f"imagenet_{data_set[-1]}_indices.txt")]
    return None


def synsets(numbers: list[int]) -> list[str]:
    """WordNet identifiers of ImageNet-1k classes, as timm lists them."""
    every = _timm_list("imagenet_synsets.txt")
    return [every[i] for i in numbers]


def _objectnet(root: Path, transform: Transform) -> Classification:
    mappings = root / "mappings"
    missing = [name for name in OBJECTNET if not (mappings / name).exists()]
    if missing:
        raise UserError(f"{mappings} lacks {missing[0]}; give ObjectNet's folder as published")
    folder_names, shared = (
        json.loads((mappings / name).read_text(encoding="utf-8")) for name in OBJECTNET
    )
    folders = sorted(folder for folder, label in folder_names.items() if label in shared)
    names = [folder_names[folder].lower() for folder in folders]
    numbers = {folder: i for i, folder in enumerate(folders)}
    return _with_classes(str(root / "images"), names, numbers, transform, "objectnet", partly=True)


def _with_classes(
    images: str,
    names: list[str],
    folders: dict[str, int],
    transform: Transform,
    data_set: str,
    *,
    partly: bool = False,
) -> Classification:
    """Images whose folders have these numbers; with `partly`, other folders are left out."""
    data = Classification(images, None, transform, names=names)
    if data.folder is None:
        return data
    unknown = [name for name in data.folder.classes if name not in folders]
    if (unknown and not partly) or len(unknown) == len(data.folder.classes):
        raise UserError(
            f"{images} is not {data_set}: it has a folder {unknown[0]!r}, and {data_set}'s are "
            f"named like {next(iter(folders))!r}"
        )
    named = [(path, data.folder.classes[label]) for path, label in data.folder.samples]
    data.folder.samples = [(path, folders[name]) for path, name in named if name in folders]
    return data


def _timm_list(name: str) -> list[str]:
    text = (importlib.resources.files("timm.data._info") / name).read_text(encoding="utf-8")
    return text.split()
