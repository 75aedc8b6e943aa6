"""Zero-shot classification with open_clip's templates, on image folders or webdataset shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from examples.cc3m.files import UserError
from examples.cc3m.shards import Failures, decode_image, expand_shards, read_shard

Labelled = Iterator[tuple[Tensor, int]]


class Classification:
    """Labelled images and the names of their classes.

    Args:
        images: a folder with a folder of images for each class, or a spec of shards whose samples
            have a "cls" number.
        classes: file with a class name a line, in the order of the numbers, or of the sorted
            folders; None: the folders' names.
        transform: PIL RGB -> (3, H, W).
        names: of the classes, in the place of `classes` and whatever the folders are called.

    Raises:
        UserError: there are no such images, or names are missing.
    """

    def __init__(
        self,
        images: str,
        classes: Path | None,
        transform: Callable[[Image.Image], Tensor],
        *,
        names: list[str] | None = None,
    ) -> None:
        self.transform, self.folder = transform, None
        self.shards: list[str] = []
        if Path(images).is_dir():
            self.folder = _image_folder(images)
        else:
            try:
                self.shards = expand_shards(images)
            except ValueError as error:
                raise UserError(f"{error}; give a folder of images or shards") from error
        self.names = self._names(classes) if names is None else names

    def _names(self, classes: Path | None) -> list[str]:
        if classes is not None:
            if not classes.exists():
                raise UserError(f"{classes} with the names of the classes does not exist")
            names = [x.strip() for x in classes.read_text(encoding="utf-8").splitlines()]
            names = [name for name in names if name]
        elif self.folder is not None:
            names = [name.replace("_", " ") for name in self.folder.classes]
        else:
            raise UserError("shards have numbers of classes only; give a file with their names")
        if self.folder is not None and len(names) != len(self.folder.classes):
            raise UserError(
                f"{classes} has {len(names)} names for {len(self.folder.classes)} folders"
            )
        return names

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, 3, H, W) images and (B,) int64 labels; images that cannot be read are left out."""
        images, labels = [], []
        for image, label in self._samples():
            images.append(image)
            labels.append(label)
            if len(images) == size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)

    def _samples(self) -> Labelled:
        failures = Failures()
        if self.folder is not None:
            for path, label in self.folder.samples:
                with failures.counting():
                    sample = {"__key__": path, "jpg": Path(path).read_bytes()}
                    yield self.transform(decode_image(sample)), label
            return
        for shard in self.shards:
            for sample in read_shard(shard, failures):
                with failures.counting():
                    yield self.transform(decode_image(sample)), int(sample["cls"])


@torch.no_grad()
def zero_shot(
    towers: Any,
    data: Classification,
    tokenize: Callable[[list[str]], Tensor],
    batch_size: int,
    device: torch.device,
    stopping: Callable[[], bool],
) -> dict[str, float] | None:
    """Top-1 and top-5 accuracy, and the mean over classes of top-1.

    None if `stopping` became true meanwhile.
    """
    classifier = open_clip.build_zero_shot_classifier(
        towers,
        tokenizer=tokenize,
        classnames=data.names,
        templates=open_clip.OPENAI_IMAGENET_TEMPLATES,
        num_classes_per_batch=10,
        device=device,
    )
    hits, counts = torch.zeros(2, len(data.names), dtype=torch.int64).unbind()
    best_five = 0
    for images, labels in data.batches(batch_size):
        if stopping():
            return None
        scores = towers.encode_image(images.to(device), normalize=True) @ classifier
        top = scores.topk(min(5, len(data.names)), dim=1).indices.cpu()
        hits += torch.bincount(labels[top[:, 0] == labels], minlength=len(hits))
        counts += torch.bincount(labels, minlength=len(counts))
        best_five += int((top == labels[:, None]).sum())
    total = int(counts.sum())
    if not total:
        raise UserError("no image for zero-shot classification could be read")
    there = counts > 0
    return {
        "zeroshot-top1": int(hits.sum()) / total,
        "zeroshot-top5": best_five / total,
        "zeroshot-mean-class-recall": float((hits[there] / counts[there]).double().mean()),
    }


def _image_folder(path: str) -> ImageFolder:
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a folder of folders of images: {error}") from error
