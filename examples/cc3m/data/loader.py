"""Batches from webdataset shards.

The order is a function of (seed, epoch, rank, worker), augmentation of (seed, epoch, sample), and
every batch says how far it got: a run stopped between two batches goes on exactly, and with another
number of processes or workers it leaves out only the samples that it has trained on. Neither
depends on what is done with the samples: all recipes see the same crops in the same order. Samples
that cannot be read are counted and left out.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.cc3m.data.batch import Batch
from examples.cc3m.data.features import FeatureReader, Features
from examples.cc3m.data.positions import Origin, Position, ShardOrder, Unit
from examples.common.files import UserError
from examples.common.images import Box, Crop, Grid, cut_grid, views
from examples.common.parallel import seeded
from examples.common.shards import (
    Failures,
    SampleError,
    count_samples,
    decode_caption,
    expand_shards,
    read_shard,
    unusable,
)
from examples.common.signals import prepare_worker

LOG = logging.getLogger(__name__)
FREE_FAILURES = 20
"""Broken samples that are never reason enough to stop."""


@dataclass(eq=False)
class ShardLoader:
    """Epochs of batches.

    Args:
        spec: shards, as `expand_shards` takes them.
        crop: chooses and shows a part of each image, for example `images.RandomCrop(224)`.
        tokenize: list of captions -> (B, L) int64, for example open_clip's tokenizer.
        batch_size: B; what is left of a stream at the end of an epoch is dropped when shuffling,
            and a smaller last batch otherwise.
        views: V, crops of each image, chosen one after the other.
        captions: where each of the C captions of a sample comes from, as in `decode_caption`.
        shuffle: size of the shuffle buffer in samples, of each stream; shards are shuffled too.
            0 keeps the order of the files.
        seed: decides order and augmentation.
        workers: processes that decode; 0 decodes in this one.
        rank, world_size: this process's share of the shards.
        features: a teacher's, joined to images by shard and key, and cut as the image is; samples
            without any count as unreadable.
        grid: (height, width) in patches to which features are resampled; None keeps theirs.
        resample: draw shards with replacement, so that an epoch never ends; the caller decides how
            long it is.
        max_broken: share of unreadable samples above which reading stops with an error.
        prefetch: batches that each worker decodes ahead.
        timeout: seconds to wait for a batch of a worker before giving up; 0 waits for ever.

    Raises:
        ValueError: fewer shards than streams (world_size * max(workers, 1)), no views or captions,
            or features of several views.
        UserError: a shard has no features.
    """

    spec: InitVar[str | Sequence[str]]
    crop: Crop
    tokenize: Callable[[list[str]], Tensor]
    batch_size: int
    _: KW_ONLY
    views: int = 1
    captions: Sequence[str] = ("txt",)
    shuffle: int = 0
    seed: int = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    features: FeatureReader | None = None
    grid: Grid | None = None
    resample: bool = False
    max_broken: float = 0.01
    prefetch: int = 2
    timeout: float = 0.0

    def __post_init__(self, spec: str | Sequence[str]) -> None:
        self.shards = expand_shards(spec)
        self.streams = max(self.workers, 1)
        self.order = ShardOrder(len(self.shards), self.seed, self.shuffle > 0)
        self.read, self.faults = 0, Counter[str]()
        self.images, self.cpu_seconds = 0, 0.0
        if len(self.shards) < self.world_size * self.streams and not self.resample:
            raise ValueError(
                f"{len(self.shards)} shards cannot feed {self.world_size} processes of "
                f"{self.streams} workers; use fewer workers"
            )
        if self.views < 1 or not self.captions:
            raise ValueError(
                f"a sample has a view and a caption at least, got {self.views}, {self.captions}"
            )
        if self.features is not None:
            if self.views > 1:
                raise ValueError(
                    f"features are cut like one view of an image, got {self.views} views"
                )
            self.grid = self.grid or self.features.grid
            self.features.check(self.shards)

    @property
    def broken(self) -> int:
        """Samples left out so far."""
        return unusable(self.faults)

    def epoch(self, position: Position | None = None) -> Iterator[Batch]:
        """Yield the rest of an epoch; without end if shards are drawn with replacement.

        Raises:
            UserError: too many samples are broken, or there are none.
        """
        position = position or Position()
        loader: Iterable[Batch | _End] = DataLoader(
            _Epoch(self, position),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=False,
            worker_init_fn=prepare_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its base seed must not move the global generator
            timeout=self.timeout if self.workers else 0,
            prefetch_factor=self.prefetch if self.workers else None,
        )
        consumed, batches = list(position.consumed or (0,) * self.streams), 0
        for item in loader:
            self.read += item.consumed - consumed[item.stream]
            consumed[item.stream] = item.consumed
            self._count(item.faults)
            if isinstance(item, Batch):
                batches += 1
                self.images += len(item.keys)
                self.cpu_seconds += item.cpu_seconds
                yield item
        self._check_complete(position, sum(consumed), batches)

    def shared_memory(self) -> int:
        """Return the bytes of shared memory that its workers need at most, 0 without workers.

        Each has `prefetch` batches under way; one more is in use, and one is on its way to it.
        """
        if not self.workers:
            return 0
        view = self.crop.show(Image.new("RGB", (2, 2)), (0, 0, 2, 2))
        texts = self.tokenize([""] * len(self.captions))
        sample = self.views * view.nbytes + texts.nbytes
        if self.features is not None and self.grid is not None:
            sample += self.features.nbytes(self.grid)
        return (self.workers * self.prefetch + 2) * self.batch_size * sample

    def _check_complete(self, position: Position, consumed: int, batches: int) -> None:
        units = self.order.share(position, self.rank, self.world_size)
        shards = [self.shards[number] for number, _, _ in units]
        if position.before:
            return  # the rest of an epoch
        if not batches and not position.consumed:
            raise UserError(
                f"no batch of {self.batch_size} came from {len(shards)} shards: they hold fewer "
                f"readable samples than one batch{self._told()}"
            )
        try:
            promised = count_samples(shards)
        except ValueError:
            return  # no stats to compare with
        if consumed < promised:
            LOG.warning("shards gave %d samples, their stats promise %d", consumed, promised)

    def _count(self, faults: dict[str, int]) -> None:
        self.faults.update(faults)
        if self.broken > FREE_FAILURES + self.max_broken * self.read:
            raise UserError(
                f"{self.broken} of {self.read} samples could not be used{self._told()}, above the "
                f"share of {self.max_broken:g} allowed; check the shards, or raise max_broken"
            )

    def _told(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.faults.most_common())
        return f" ({kinds})" if kinds else ""


class _Example(NamedTuple):
    """A decoded sample."""

    images: list[Tensor]
    texts: list[str]
    key: str
    teacher: Features | None


@dataclass(frozen=True)
class _End:
    """Last word of a stream: faults after its last batch."""

    stream: int
    consumed: int
    faults: dict[str, int]


@dataclass
class _Reader:
    """State of one stream: what it met since its last batch."""

    failures: Failures = field(default_factory=Failures)
    origins: list[Origin] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    since: float = field(default_factory=time.process_time)
    """CPU seconds of this process when it began to read the next batch."""

    def take(self) -> dict[str, Any]:
        """Return what a batch says of its stream, and begin anew."""
        taken = {
            "faults": self.failures.take(),
            "origins": self.origins,
            "sizes": self.sizes,
            "cpu_seconds": time.process_time() - self.since,
        }
        self.origins, self.sizes = [], {}
        return taken


class _Epoch(IterableDataset["Batch | _End"]):
    """Data of one DataLoader worker."""

    def __init__(self, loader: ShardLoader, position: Position) -> None:
        self.loader, self.position = loader, position

    def __iter__(self) -> Iterator[Batch | _End]:
        # DataLoader asks worker 0 first; a resumed epoch goes on with the stream that was next.
        info = get_worker_info()
        worker = 0 if info is None else info.id
        yield from self._stream((worker + self.position.next_stream) % self.loader.streams)

    def _stream(self, stream: int) -> Iterator[Batch | _End]:
        loader, reader = self.loader, _Reader()
        skip = self.position.consumed[stream] if self.position.consumed else 0
        examples: list[_Example] = []
        consumed = 0
        for consumed, sample in enumerate(self._samples(stream, reader), 1):
            if consumed <= skip:
                reader.failures.take()
                continue
            if not loader.resample:
                reader.origins.append(sample["__origin__"])
            with reader.failures.counting():
                examples.append(self._decode(sample, reader.failures))
            if len(examples) == loader.batch_size:
                yield self._batch(examples, stream, consumed, reader)
                examples, reader.since = [], time.process_time()
        if examples and not loader.shuffle:
            yield self._batch(examples, stream, consumed, reader)
        yield _End(stream, consumed, reader.failures.take())

    def _samples(self, stream: int, reader: _Reader) -> Iterator[dict[str, Any]]:
        """Yield undecoded samples of this stream, in this epoch's order."""
        loader, epoch = self.loader, self.position.epoch
        units: Iterable[Unit] = loader.order.share(
            self.position, loader.rank, loader.world_size, stream, loader.streams
        )
        if loader.resample:
            units = loader.order.endless(epoch, loader.rank, stream)
        samples = (sample for unit in units for sample in self._unit(unit, reader))
        if not loader.shuffle:
            return samples
        rng = random.Random(f"{loader.seed}/{epoch}/{loader.rank}/{stream}")
        shuffled: Iterator[dict[str, Any]] = wds.shuffle(
            loader.shuffle, initial=loader.shuffle, rng=rng
        )(samples)
        return shuffled

    def _unit(self, unit: Unit, reader: _Reader) -> Iterator[dict[str, Any]]:
        """Yield samples of a shard, or of a part of it, that nobody has taken yet."""
        number, part, parts = unit
        taken = self.position.before.get(number, 0)
        place = -1
        for place, sample in enumerate(read_shard(self.loader.shards[number], reader.failures)):
            if place % parts == part and not taken >> place & 1:
                yield {**sample, "__origin__": (number, place)}
        reader.sizes[number] = place + 1

    def _decode(self, sample: dict[str, Any], failures: Failures) -> _Example:
        loader, key = self.loader, sample["__key__"]
        with seeded(f"{loader.seed}/{self.position.epoch}/{key}"):
            shown = views(sample, loader.crop, loader.views, failures)
            texts = [decode_caption(sample, source) for source in loader.captions]
        teacher = None
        if loader.features is not None and loader.grid is not None:
            teacher = _cut_features(loader.features, sample, shown[0].box, loader.grid)
        return _Example([view.pixels for view in shown], texts, key, teacher)

    def _batch(
        self, examples: list[_Example], stream: int, consumed: int, reader: _Reader
    ) -> Batch:
        views, captions = self.loader.views, len(self.loader.captions)
        images = torch.stack([image for each in examples for image in each.images])
        texts = self.loader.tokenize([text for each in examples for text in each.texts])
        teachers = [each.teacher for each in examples if each.teacher is not None]
        return Batch(
            images if views == 1 else images.view(-1, views, *images.shape[1:]),
            texts if captions == 1 else texts.view(-1, captions, *texts.shape[1:]),
            stream,
            consumed,
            keys=[each.key for each in examples],
            teacher=Features(*map(torch.stack, zip(*teachers, strict=True))) if teachers else None,
            **reader.take(),
        )


def _cut_features(reader: FeatureReader, sample: dict[str, Any], box: Box, grid: Grid) -> Features:
    """Return the features of a part of a sample's image, as a grid of that size."""
    try:
        patches, cls = reader.of(sample)
    except KeyError as error:
        raise SampleError("no features", sample) from error
    return Features(cut_grid(patches, reader.grid, box, grid), cls)
