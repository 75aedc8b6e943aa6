"""Batches from webdataset shards: the demo's scenes, CC3M, and the like.

The order is a function of (seed, epoch, rank, worker), augmentation of (seed, epoch, sample), and
every batch says how far it got, so that a run stopped between two batches continues exactly.
Samples that cannot be read are counted and left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.cc3m.batches import Batch, Position, ShardOrder
from examples.cc3m.features import FeatureReader, Features
from examples.cc3m.files import UserError
from examples.cc3m.shards import (
    Failures,
    SampleError,
    count_samples,
    decode,
    expand_shards,
    read_shard,
    unusable,
)

LOG = logging.getLogger(__name__)
FREE_FAILURES = 20
"""Broken samples that are never reason enough to stop."""


class ShardLoader:
    """Epochs of batches.

    Args:
        shards: a spec for `expand_shards`.
        transform: PIL RGB image -> (3, H, W) float32, for example open_clip's.
        tokenize: list of captions -> (B, L) int64, for example open_clip's tokenizer.
        batch_size: B; what is left of a stream at the end of an epoch is dropped when shuffling,
            and a smaller last batch otherwise.
        shuffle: size of the shuffle buffer in samples, of each stream; shards are shuffled too.
            0 keeps the order of the files.
        seed: of the order and of augmentation.
        workers: processes that decode; 0 decodes in this one.
        rank, world_size: this process's share of the shards.
        records: keep each sample's json.
        features: of a teacher, joined to images by shard and key; samples without any count as
            unreadable. `transform` must then show what the teacher saw: the resized image's
            centre, as open_clip's transform for evaluation does. After a random crop the
            features would be those of other patches.
        resample: draw shards with replacement, so that an epoch never ends; the caller decides how
            long it is.
        keep: keep undecoded samples in memory after the first epoch, for small data; without
            workers only.
        max_broken: share of unreadable samples above which reading stops with an error.

    Raises:
        ValueError: fewer shards than streams (world_size * max(workers, 1)), or `keep` with
            workers, which do not outlive an epoch.
        UserError: a shard has no features.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        batch_size: int,
        *,
        shuffle: int = 0,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        records: bool = False,
        features: FeatureReader | None = None,
        resample: bool = False,
        keep: bool = False,
        max_broken: float = 0.01,
    ) -> None:
        self.shards = expand_shards(shards)
        self.transform, self.tokenize, self.batch_size = transform, tokenize, batch_size
        self.shuffle, self.seed, self.workers = shuffle, seed, workers
        self.rank, self.world_size = rank, world_size
        self.records, self.max_broken, self.features = records, max_broken, features
        self.streams, self.resample = max(workers, 1), resample
        self.order = ShardOrder(len(self.shards), seed, shuffle > 0)
        self.read, self.faults = 0, Counter[str]()
        self.kept: dict[str, list[dict[str, Any]]] | None = {} if keep else None
        if keep and workers:
            raise ValueError("keep=True needs workers=0: workers do not outlive an epoch")
        if len(self.shards) < world_size * self.streams and not resample:
            raise ValueError(
                f"{len(self.shards)} shards cannot feed {world_size} processes of {self.streams} "
                "workers; use fewer workers"
            )
        if features is not None:
            features.check(self.shards)

    @property
    def broken(self) -> int:
        """Samples left out so far."""
        return unusable(self.faults)

    def epoch(self, position: Position | None = None) -> Iterator[Batch]:
        """The rest of an epoch; without end if shards are drawn with replacement.

        Raises:
            UserError: too many samples are broken, or there are none.
        """
        position = position or Position()
        loader: Iterable[Batch | _End] = DataLoader(
            _Epoch(self, position),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=False,
            worker_init_fn=_prepare_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its base seed must not move the global generator
        )
        consumed, batches = list(position.consumed or (0,) * self.streams), 0
        for item in loader:
            self.read += item.consumed - consumed[item.stream]
            consumed[item.stream] = item.consumed
            self._count(item.faults)
            if isinstance(item, Batch):
                batches += 1
                yield item
        self._check_complete(position, sum(consumed), batches)

    def own_shards(self, position: Position) -> list[str]:
        """This process's share of the shards, in the epoch's order."""
        numbers = self.order.share(position, self.rank, self.world_size)
        return [self.shards[number] for number in numbers]

    def _check_complete(self, position: Position, consumed: int, batches: int) -> None:
        shards = self.own_shards(position)
        if not batches and not position.consumed and not position.done:
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

    image: Tensor
    text: str
    record: dict[str, Any]
    key: str
    teacher: Features | None


@dataclass(frozen=True)
class _End:
    """What a stream says last: faults after its last batch."""

    stream: int
    consumed: int
    faults: dict[str, int]


@dataclass
class _Reader:
    """Of one stream: what it met so far."""

    failures: Failures = field(default_factory=Failures)
    opened: int = 0


class _Epoch(IterableDataset["Batch | _End"]):
    """What one DataLoader worker iterates over."""

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
            with reader.failures.counting():
                examples.append(self._decode(sample, reader.failures))
            if len(examples) == loader.batch_size:
                yield self._batch(examples, stream, consumed, reader)
                examples = []
        if examples and not loader.shuffle:
            yield self._batch(examples, stream, consumed, reader)
        yield _End(stream, consumed, reader.failures.take())

    def _samples(self, stream: int, reader: _Reader) -> Iterator[dict[str, Any]]:
        """Undecoded samples of this stream, in this epoch's order."""
        loader, epoch = self.loader, self.position.epoch
        numbers: Iterable[int] = loader.order.share(
            self.position, loader.rank, loader.world_size, stream, loader.streams
        )
        if loader.resample:
            numbers = loader.order.endless(epoch, loader.rank, stream)
        samples = (sample for number in numbers for sample in self._shard(number, reader))
        if not loader.shuffle:
            return samples
        rng = random.Random(f"{loader.seed}/{epoch}/{loader.rank}/{stream}")
        shuffled: Iterator[dict[str, Any]] = wds.shuffle(
            loader.shuffle, initial=loader.shuffle, rng=rng
        )(samples)
        return shuffled

    def _shard(self, number: int, reader: _Reader) -> Iterable[dict[str, Any]]:
        """Undecoded samples of a tar file, in its order; from memory if they were kept."""
        shard, kept = self.loader.shards[number], self.loader.kept
        reader.opened += 1
        if kept is not None and shard in kept:
            return kept[shard]
        data = read_shard(shard, reader.failures)
        if kept is None:
            return data
        kept[shard] = list(data)
        return kept[shard]

    def _decode(self, sample: dict[str, Any], failures: Failures) -> _Example:
        loader, key = self.loader, sample["__key__"]
        image, text = decode(sample, failures)
        record = json.loads(sample["json"]) if loader.records else {}
        teacher = None if loader.features is None else _features(loader.features, sample)
        with _seeded(f"{loader.seed}/{self.position.epoch}/{key}"):
            return _Example(loader.transform(image), text, record, key, teacher)

    def _batch(
        self,
        examples: list[_Example],
        stream: int,
        consumed: int,
        reader: _Reader,
    ) -> Batch:
        teachers = [each.teacher for each in examples if each.teacher is not None]
        return Batch(
            torch.stack([each.image for each in examples]),
            self.loader.tokenize([each.text for each in examples]),
            [each.record for each in examples] if self.loader.records else [],
            stream,
            consumed,
            reader.failures.take(),
            reader.opened,
            [each.key for each in examples],
            Features(*map(torch.stack, zip(*teachers, strict=True))) if teachers else None,
        )


def _features(reader: FeatureReader, sample: dict[str, Any]) -> Features:
    try:
        return reader.of(sample)
    except KeyError as error:
        raise SampleError("no features", sample) from error


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Python's and torch's CPU generators seeded from `name`, and put back afterwards."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    python, generator = random.getstate(), torch.default_generator
    state = generator.get_state()
    random.seed(seed)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        generator.set_state(state)


def _prepare_worker(_: int) -> None:
    """Signals reach the whole process group, but the parent decides when workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
