"""Data of a run: found, opened and planned before anything is built; the cost of reading them."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.cc3m.data.features import FeatureReader
from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.recipe import Recipe, build_tokenizer
from examples.cc3m.settings import EvaluationSettings, RunSettings
from examples.common.files import UserError
from examples.common.images import CentreCrop, RandomCrop
from examples.common.parallel import Parallel
from examples.common.shards import count_samples, expand_shards

LOG = logging.getLogger(__name__)
EXAMPLE = "--data 'folder/{00000..00331}.tar'"
VALIDATION, IMAGENET = "-val", Path("imagenet", "val")
"""End of the name of the folder with validation shards, and ImageNet's place beside it."""
SHARED_MEMORY = Path("/dev/shm")
"""Folder in which Linux keeps the batches that readers hand over."""


def open_features(
    settings: RunSettings, recipe: Recipe, config: dict[str, Any]
) -> FeatureReader | None:
    """Open a teacher's features if the recipe distils one.

    Raises:
        UserError: they are not there, or not of this model's images.
    """
    if recipe.distillation is None:
        return None
    if settings.features is None:
        raise UserError(
            f"recipe {recipe.label!r} distils a teacher: extract its features "
            "with examples.cc3m.extract_dinov3, then pass --features FOLDER"
        )
    least = math.ceil(recipe.teacher_scale * config["vision_cfg"]["image_size"])
    return FeatureReader(settings.features, least_resolution=least)


def told_features(features: FeatureReader, grid: tuple[int, int]) -> str:
    """Say whose features a run distils, and at which resolution."""
    manifest, fine = features.manifest, features.grid
    return (
        f"teacher: {manifest['model']}, {fine[0]} x {fine[1]} patches of {manifest['dim']} "
        f"dimensions from {manifest['resolution']} pixels, seen as {grid[0]} x {grid[1]}"
    )


def open_loader(
    settings: RunSettings,
    recipe: Recipe,
    config: dict[str, Any],
    features: FeatureReader | None,
    batch_size: int,
    parallel: Parallel,
) -> ShardLoader:
    """Open the training data, of which this process reads its share in batches of `batch_size`.

    Raises:
        UserError: they are not there, or too few for so many readers.
    """
    if not settings.data:
        raise UserError(f"no image-text shards to train on; pass {EXAMPLE}")
    try:
        shards = expand_shards(settings.data)
    except ValueError as error:
        raise UserError(f"{error}; pass {EXAMPLE}") from error
    size = config["vision_cfg"]["image_size"]
    try:
        return ShardLoader(
            shards,
            RandomCrop(size) if settings.augment else CentreCrop(size),
            build_tokenizer(config),
            batch_size,
            shuffle=settings.shuffle,
            seed=settings.train.seed,
            workers=settings.workers,
            rank=parallel.rank,
            world_size=parallel.world_size,
            features=features,
            views=recipe.views,
            captions=recipe.captions,
            grid=None if features is None else features.grid_at(size),
            resample=settings.resample,
            max_broken=settings.max_broken,
            prefetch=settings.prefetch,
            timeout=settings.read_timeout,
        )
    except ValueError as error:
        raise UserError(f"{error} (--workers), or --resample") from error


def plan_epochs(settings: RunSettings, loader: ShardLoader, *, warn: bool) -> list[int]:
    """Return the steps of each epoch; uneven shards make them fewer than the samples allow.

    Args:
        settings: how many samples a step takes, and how many there are if no file says.
        loader: has the shards.
        warn: tell what uneven shards leave out.

    Raises:
        UserError: an epoch would have no step.
    """
    train = settings.train
    try:
        counts = [count_samples([shard]) for shard in loader.shards]
    except ValueError as error:
        if settings.samples is None:
            raise UserError(f"{error} with --samples") from error
        counts = []
    samples = settings.samples or sum(counts)
    possible = samples // train.batch_size
    if not possible:
        raise UserError(
            f"{samples} samples are fewer than one batch of {train.batch_size}; "
            "choose a smaller --train.batch-size"
        )
    if settings.resample or settings.samples is not None or not counts:
        return [possible] * train.epochs
    sizes = (loader.batch_size, train.accumulate, loader.world_size, loader.streams)
    planned = [loader.order.steps_of(e, counts, *sizes) for e in range(train.epochs)]
    if not all(planned):
        raise UserError(
            f"some reader's shards hold fewer samples than its part of a batch ({samples} in "
            "all); use fewer --workers, a smaller --train.batch-size, or --resample"
        )
    if min(planned) < possible and warn:
        LOG.warning(
            "uneven shards: an epoch has %d of %d possible steps, and leaves out %d of %d "
            "samples; fewer workers or shards of equal sizes leave out fewer",
            min(planned),
            possible,
            samples - min(planned) * train.batch_size,
            samples,
        )
    return planned


def find_evaluation(settings: RunSettings, shards: Sequence[str]) -> EvaluationSettings:
    """Fill in what the settings do not name and lies beside the training data.

    Beside "data/cc3m/00000.tar" these are the shards in data/cc3m-val, and data/imagenet/val.
    """
    evaluation, folder = settings.evaluation, Path(shards[0]).parent
    if evaluation.pairs is None:
        found = sorted(map(str, folder.with_name(f"{folder.name}{VALIDATION}").glob("*.tar")))
        evaluation = replace(evaluation, pairs="::".join(found) or None)
    images = folder.parent / IMAGENET
    if evaluation.images is None and images.is_dir():
        evaluation = replace(evaluation, images=str(images))
    return evaluation


# ---------------------------------------------------------------- what reading takes


def told_shared_memory(loader: ShardLoader, local_processes: int) -> str:
    """Say how much shared memory the readers of this machine need, and if it has so much."""
    needed = local_processes * loader.shared_memory()
    told = (
        f"shared memory: up to {_size(needed)} for {local_processes} x {loader.workers} readers "
        f"with {loader.prefetch} batches ahead"
    )
    if not SHARED_MEMORY.exists():
        return told
    free = shutil.disk_usage(SHARED_MEMORY).free
    told += f", of {_size(free)} free in {SHARED_MEMORY}"
    if needed > free:
        told += "; that is too little: enlarge it (docker run --shm-size), or lower --prefetch"
    return told


def told_roofline(
    loader: ShardLoader, parallel: Parallel, loading_share: float, images_per_second: float
) -> str:
    """Compare the speed of training with that at which the readers' cores can decode.

    Args:
        loader: this process's, after it has read.
        parallel: the processes.
        loading_share: part of its time in which training waited for data.
        images_per_second: speed of training, of all processes.
    """
    cores = max(1.0, (os.cpu_count() or 1) / local_world_size())
    readers = min(loader.workers or 1, cores) * parallel.world_size
    rate = loader.images / max(loader.cpu_seconds, 1e-9)
    return (
        f"waited for data {loading_share:.0%} of the time at {images_per_second:.0f} images/s; "
        f"the readers decode at most {readers * rate:.0f} images/s: {readers:g} cores x {rate:.0f}"
    )


def local_world_size() -> int:
    """Return how many processes train on this machine, as torchrun or srun says."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    return int(told)


def _size(count: float) -> str:
    return f"{count / (1 << 20):.0f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.1f} GiB"
