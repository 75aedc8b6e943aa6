"""A frozen teacher: how it is loaded, images through it in batches, a PCA fitted to its tokens."""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from examples.common.files import UserError
from examples.common.images import decode_image
from examples.common.shards import Failures, read_shard
from rankloss.fusion.pca import TokenPCA
from rankloss.fusion.teacher import Dinov3Teacher, TeacherFeatures

PCA_SHARDS = 16
"""Shards at most from which the PCA's images are drawn."""
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}

Sample = dict[str, Any]


class Extractor:
    """Images to features, a batch at a time, while threads decode the next one.

    Args:
        teacher: on its device.
        resolution: side of the square that whole images are resized to.
        batch_size: images in a batch; batches do not span shards, so that a run that is resumed
            computes exactly what one that was not would have.
        workers: threads that decode.
        precision: a key of PRECISIONS.
    """

    def __init__(
        self,
        teacher: Dinov3Teacher,
        resolution: int,
        batch_size: int,
        workers: int,
        precision: str,
    ) -> None:
        self.teacher, self.batch_size = teacher, batch_size
        self.autocast = PRECISIONS[precision]
        self.device = next(teacher.parameters()).device
        self.transform = open_clip.image_transform(resolution, is_train=False, resize_mode="squash")
        self.pool = ThreadPoolExecutor(workers)

    def batches(
        self, samples: Iterable[Sample], failures: Failures
    ) -> Iterator[tuple[list[str], TeacherFeatures]]:
        """Keys and features of the samples that can be read, on the teacher's device, float32."""
        for group in self._decoded(samples):
            good = [(key, image) for key, image in group if isinstance(image, Tensor)]
            for _, error in group:
                if isinstance(error, Exception):
                    failures.handle(error)
            if good:
                keys, images = zip(*good, strict=True)
                yield list(keys), self.features(torch.stack(images))

    def features(self, images: Tensor) -> TeacherFeatures:
        images = images.to(self.device, non_blocking=True)
        kind = self.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            patches, cls, grid = self.teacher(images)
        return TeacherFeatures(patches.float(), cls.float(), grid)

    def _decoded(self, samples: Iterable[Sample]) -> Iterator[list[tuple[str, Tensor | Exception]]]:
        """Groups of batch_size; the one after the current is being decoded meanwhile."""
        samples = iter(samples)
        upcoming = None
        while True:
            group = list(itertools.islice(samples, self.batch_size))
            current, upcoming = upcoming, self.pool.map(self._load, group) if group else None
            if current is not None:
                yield list(current)
            if upcoming is None:
                return

    def _load(self, sample: Sample) -> tuple[str, Tensor | Exception]:
        """The image, or what its bytes made PIL raise. It may lack a caption."""
        key: str = sample["__key__"]
        try:
            image = decode_image(sample)
            return key, self.transform(image)
        except Exception as error:
            return key, error


def fit_pca(
    extractor: Extractor,
    shards: list[str],
    dim: int,
    *,
    centre: bool = False,
    images: int = 2000,
    max_tokens: int = 50_000,
    seed: int = 0,
) -> TokenPCA:
    """Fit to random tokens of random images; the result depends on the seed alone.

    Args:
        extractor: makes the tokens.
        shards: where images are.
        dim, centre: width of the PCA, and whether it subtracts the mean.
        images, max_tokens: size of the sample.
        seed: decides the sample.

    Raises:
        UserError: there are too few tokens, or dimensions, for `dim` components.
    """
    samples = sample_images(shards, images, seed)
    per_image = math.ceil(max_tokens / max(1, len(samples)))
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.empty(0, extractor.teacher.dim)]
    with tqdm(total=len(samples), unit="img", desc="PCA", disable=None) as bar:
        for keys, (patches, _, _) in extractor.batches(samples, Failures()):
            for row in patches.cpu():
                tokens.append(row[torch.randperm(len(row), generator=generator)[:per_image]])
            bar.update(len(keys))
    try:
        return TokenPCA.fit(torch.cat(tokens), dim, centre=centre, max_tokens=max_tokens, seed=seed)
    except ValueError as error:
        raise UserError(f"{error}; choose a smaller --dim, or 0 to keep all dimensions") from error


def sample_images(shards: list[str], count: int, seed: int) -> list[Sample]:
    """About `count` undecoded samples, evenly from a few random shards, drawn at random in each."""
    rng = random.Random(seed)
    chosen = rng.sample(shards, min(PCA_SHARDS, count, len(shards)))
    quota = math.ceil(count / len(chosen))
    drawn: list[Sample] = []
    for shard in chosen:
        reservoir: list[Sample] = []
        for i, sample in enumerate(read_shard(shard, Failures())):
            if i < quota:
                reservoir.append(sample)
            elif (place := rng.randrange(i + 1)) < quota:
                reservoir[place] = sample
        drawn += reservoir
    return drawn


def load_teacher(options: argparse.Namespace, device: torch.device) -> Dinov3Teacher:
    """Build the teacher of a command line.

    Raises:
        UserError: its weights cannot be loaded, or sizes do not fit.
    """
    torch.manual_seed(options.seed)
    pretrained, chosen = not options.random_weights, dict(options.model_options)
    if options.weights is not None:
        if "/" in options.model:
            raise UserError(
                f"--weights is a file for a model of timm; {options.model} is one of transformers, "
                "whose folder of weights is given as --model"
            )
        pretrained, chosen = False, {**chosen, "checkpoint_path": str(options.weights)}
    try:
        teacher = Dinov3Teacher(options.model, pretrained=pretrained, **chosen)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        remedy = "; --random-weights runs without any" if pretrained else ""
        raise UserError(f"cannot load {options.model} ({error}){remedy}") from error
    if options.resolution < 1 or options.resolution % teacher.patch_size:
        raise UserError(
            f"--resolution {options.resolution} is not a multiple of the patch size "
            f"{teacher.patch_size}"
        )
    if options.dim > teacher.dim and not options.pca:
        raise UserError(
            f"--dim {options.dim} exceeds the model's {teacher.dim} dimensions; choose a smaller "
            "one, or 0 to keep all"
        )
    return teacher.to(device)


def load_pca(path: Path, teacher: Dinov3Teacher) -> TokenPCA:
    """Read a projection of this teacher's tokens.

    Raises:
        UserError: it is another one's, or none.
    """
    try:
        pca = TokenPCA.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}; --pca takes the pca.safetensors of a first run") from error
    if pca.in_dim != teacher.dim:
        raise UserError(f"{path} is for {pca.in_dim} dimensions, the model has {teacher.dim}")
    return pca
