"""Zero-shot classification with open_clip's templates, on image folders or webdataset shards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder

from examples.common.files import UserError
from examples.common.images import decode_image
from examples.common.parallel import Parallel
from examples.common.shards import Failures, expand_shards, read_shard
from examples.common.signals import prepare_worker

Item = TypeVar("Item")
ALONE = Parallel()


class Stopped(Exception):
    """A process was asked to stop before an evaluation was done."""


def in_step(
    batches: Iterator[Item], stopping: Callable[[], bool], parallel: Parallel
) -> Iterator[Item]:
    """Yield this process's batches while any process has some: none waits long for the others.

    Raises:
        Stopped: `stopping` was true in some process.
    """
    while True:
        batch = next(batches, None)
        stop, more = parallel.agree(stopping(), batch is not None)
        if stop:
            raise Stopped
        if not more:
            return
        if batch is not None:
            yield batch


class Classification(IterableDataset[tuple[Tensor, int]]):
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
        transform: Callable[[Image.Image], Tensor],
        *,
        names: list[str] | None = None,
    ) -> None:
        self.transform, self.share = transform, (0, 1)
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

    def part(self, part: int, parts: int) -> Classification:
        """Return the same data, of which only a part is read."""
        share = copy.copy(self)
        share.share = part, parts
        return share

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (B, 3, H, W) images and (B,) int64 labels, decoded in this process."""
        return iter(DataLoader(self, batch_size=size, generator=torch.Generator()))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info, (part, parts) = get_worker_info(), self.share
        if info is not None:
            part, parts = part * info.num_workers + info.id, parts * info.num_workers
        failures = Failures()
        if self.folder is not None:
            for path, label in self.folder.samples[part::parts]:
                with failures.counting():
                    sample = {"__key__": path, "jpg": Path(path).read_bytes()}
                    yield self.transform(decode_image(sample)), label
            return
        for shard in self.shards[part::parts]:
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
    stopping: Callable[[], bool] = lambda: False,
    parallel: Parallel = ALONE,
    workers: int = 0,
) -> dict[str, float]:
    """Measure top-1 and top-5 accuracy, and the mean over classes of top-1.

    Args:
        towers: with open_clip's `encode_image` and `encode_text`.
        data: labelled images; each process reads a part.
        tokenize: captions -> (B, L) int64.
        batch_size: images that a process encodes at a time.
        device: where the towers are.
        stopping: says if to stop.
        parallel: processes that take part.
        workers: processes that decode for each of them.

    Raises:
        Stopped: some process was to stop.
        UserError: no image could be read.
    """
    classifier = _classifier(towers, data.names, tokenize, device, parallel).to(device)
    batches = data.batches(batch_size)
    if workers or parallel.world_size > 1:
        mine = data.part(parallel.rank, parallel.world_size)
        options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": prepare_worker}
        batches = iter(DataLoader(mine, batch_size, generator=torch.Generator(), **options))
    hits, five, counts = torch.zeros(3, len(data.names), dtype=torch.int64).unbind()
    for images, labels in in_step(batches, stopping, parallel):
        scores = towers.encode_image(images.to(device), normalize=True).float() @ classifier
        top = scores.topk(min(5, len(data.names)), dim=1).indices.cpu()
        found = top == labels[:, None]
        hits += torch.bincount(labels[found[:, 0]], minlength=len(hits))
        five += torch.bincount(labels[found.any(1)], minlength=len(hits))
        counts += torch.bincount(labels, minlength=len(hits))
    hits, five, counts = sum(parallel.gather(torch.stack([hits, five, counts]))).unbind()
    total = int(counts.sum())
    if not total:
        raise UserError("no image for zero-shot classification could be read")
    there = counts > 0
    return {
        "zeroshot-top1": int(hits.sum()) / total,
        "zeroshot-top5": int(five.sum()) / total,
        "zeroshot-mean-class-recall": float((hits[there] / counts[there]).double().mean()),
    }


def _classifier(
    towers: Any,
    names: Sequence[str],
    tokenize: Callable[[list[str]], Tensor],
    device: torch.device,
    parallel: Parallel,
) -> Tensor:
    """Return (D, C) mean embeddings of each class's prompts, made by all processes together."""
    rank, world = parallel.rank, parallel.world_size
    mine = None
    if names[rank::world]:
        made = open_clip.build_zero_shot_classifier(
            towers,
            tokenizer=tokenize,
            classnames=names[rank::world],
            templates=open_clip.OPENAI_IMAGENET_TEMPLATES,
            num_classes_per_batch=10,
            device=device,
        )
        mine = made.float().cpu()
    shares = [share for share in parallel.gather(mine) if share is not None]
    classifier: Tensor = shares[0].new_empty(len(shares[0]), len(names))
    for place, share in enumerate(shares):
        classifier[:, place::world] = share
    return classifier
