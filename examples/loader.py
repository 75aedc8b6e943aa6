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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.features import FeatureReader, Features
from examples.shards import Failures, count_samples, decode, expand_shards, read_shard

LOG = logging.getLogger(__name__)
FREE_FAILURES = 20
"""Broken samples that are never reason enough to stop."""


@dataclass(frozen=True)
class Batch:
    """B samples, and where their stream stands after them."""

    images: Tensor
    """(B, 3, H, W) float32, normalised by the transform."""
    texts: Tensor
    """(B, L) int64 tokens."""
    records: list[dict[str, Any]]
    """The json of each sample if asked for, else empty."""
    stream: int
    consumed: int
    """Samples the stream has given since the epoch began, broken ones included."""
    broken: int
    """Of these, how many could not be read since the stream's last batch."""
    keys: list[str] = field(default_factory=list)
    """Of the samples, in their shards."""
    teacher: Features | None = None
    """Patches (B, h w, dim) and cls (B, D) float16, if the loader has features."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Features(*(x.to(device, non_blocking=True) for x in teacher))
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            texts=self.texts.to(device, non_blocking=True),
            teacher=teacher,
        )


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands; JSON-able by `dataclasses.asdict`."""

    epoch: int = 0
    consumed: tuple[int, ...] = ()
    """Of each stream; empty at the start of an epoch."""
    next_stream: int = 0

    def after(self, batch: Batch, streams: int) -> Position:
        consumed = list(self.consumed or (0,) * streams)
        consumed[batch.stream] = batch.consumed
        return replace(self, consumed=tuple(consumed), next_stream=(batch.stream + 1) % streams)


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
        keep: bool = False,
        max_broken: float = 0.01,
    ) -> None:
        self.shards = expand_shards(shards)
        self.transform, self.tokenize, self.batch_size = transform, tokenize, batch_size
        self.shuffle, self.seed, self.workers = shuffle, seed, workers
        self.rank, self.world_size = rank, world_size
        self.records, self.max_broken, self.features = records, max_broken, features
        self.streams = max(workers, 1)
        self.read = self.broken = 0
        self.kept: dict[str, list[dict[str, Any]]] | None = {} if keep else None
        if keep and workers:
            raise ValueError("keep=True needs workers=0: workers do not outlive an epoch")
        if len(self.shards) < world_size * self.streams:
            raise ValueError(
                f"{len(self.shards)} shards cannot feed {world_size} processes of {self.streams} "
                "workers; use fewer workers"
            )
        if features is not None:
            features.check(self.shards)

    def epoch(self, position: Position | None = None) -> Iterator[Batch]:
        """The rest of an epoch.

        Raises:
            RuntimeError: too many samples are broken.
        """
        position = position or Position()
        dataset = _Epoch(self, position)
        loader: Iterable[Batch] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=False,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # its base seed must not move the global generator
        )
        consumed = list(position.consumed or (0,) * self.streams)
        for batch in loader:
            self.read += batch.consumed - consumed[batch.stream]
            consumed[batch.stream] = batch.consumed
            self._count_broken(batch.broken)
            yield batch
        self._check_complete(sum(consumed), position.epoch)

    def own_shards(self, epoch: int) -> list[str]:
        """This process's share of the shards, in the epoch's order."""
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        return shards[self.rank :: self.world_size]

    def _check_complete(self, consumed: int, epoch: int) -> None:
        """A tar cut inside a header ends like a whole one; only a count can tell."""
        if not consumed:
            raise RuntimeError(
                f"no batch of {self.batch_size} came from {len(self.own_shards(epoch))} shards: "
                "they hold fewer readable samples than one batch"
            )
        try:
            promised = count_samples(self.own_shards(epoch))
        except ValueError:
            return  # no stats to compare with
        if consumed + self.streams * self.batch_size <= promised:
            LOG.warning("shards gave %d samples, their stats promise %d", consumed, promised)

    def _count_broken(self, broken: int) -> None:
        self.broken += broken
        if self.broken > FREE_FAILURES + self.max_broken * self.read:
            raise RuntimeError(
                f"{self.broken} of {self.read} samples could not be read, above the share of "
                f"{self.max_broken:g} allowed; check the shards, or raise max_broken"
            )


class _Example(NamedTuple):
    """A decoded sample."""

    image: Tensor
    text: str
    record: dict[str, Any]
    key: str
    teacher: Features | None


class _Epoch(IterableDataset[Batch]):
    """What one DataLoader worker iterates over."""

    def __init__(self, loader: ShardLoader, position: Position) -> None:
        self.loader, self.position = loader, position

    def __iter__(self) -> Iterator[Batch]:
        # DataLoader asks worker 0 first; a resumed epoch goes on with the stream that was next.
        info = get_worker_info()
        worker = 0 if info is None else info.id
        yield from self._stream((worker + self.position.next_stream) % self.loader.streams)

    def _stream(self, stream: int) -> Iterator[Batch]:
        loader = self.loader
        skip = self.position.consumed[stream] if self.position.consumed else 0
        failures = Failures()
        examples: list[_Example] = []
        consumed = 0
        for consumed, sample in enumerate(self._samples(stream, failures), 1):
            if consumed <= skip:
                failures.count = 0
                continue
            with failures.counting():
                examples.append(self._decode(sample))
            if len(examples) == loader.batch_size:
                yield self._batch(examples, stream, consumed, failures)
                examples = []
        if examples and not loader.shuffle:
            yield self._batch(examples, stream, consumed, failures)

    def _samples(self, stream: int, failures: Failures) -> Iterator[dict[str, Any]]:
        """Undecoded samples of this stream, in this epoch's order."""
        loader, epoch = self.loader, self.position.epoch
        shards = loader.own_shards(epoch)[stream :: loader.streams]
        samples = (sample for shard in shards for sample in self._shard(shard, failures))
        if not loader.shuffle:
            return samples
        rng = random.Random(f"{loader.seed}/{epoch}/{loader.rank}/{stream}")
        shuffled: Iterator[dict[str, Any]] = wds.shuffle(
            loader.shuffle, initial=loader.shuffle, rng=rng
        )(samples)
        return shuffled

    def _shard(self, shard: str, failures: Failures) -> Iterable[dict[str, Any]]:
        """Undecoded samples of a tar file, in its order; from memory if they were kept."""
        kept = self.loader.kept
        if kept is not None and shard in kept:
            return kept[shard]
        data = read_shard(shard, failures)
        if kept is None:
            return data
        kept[shard] = list(data)
        return kept[shard]

    def _decode(self, sample: dict[str, Any]) -> _Example:
        loader, key = self.loader, sample["__key__"]
        image, text = decode(sample)
        record = json.loads(sample["json"]) if loader.records else {}
        teacher = None if loader.features is None else loader.features.of(sample)
        with _seeded(f"{loader.seed}/{self.position.epoch}/{key}"):
            return _Example(loader.transform(image), text, record, key, teacher)

    def _batch(
        self,
        examples: list[_Example],
        stream: int,
        consumed: int,
        failures: Failures,
    ) -> Batch:
        teachers = [each.teacher for each in examples if each.teacher is not None]
        return Batch(
            torch.stack([each.image for each in examples]),
            self.loader.tokenize([each.text for each in examples]),
            [each.record for each in examples] if self.loader.records else [],
            stream,
            consumed,
            failures.take(),
            [each.key for each in examples],
            Features(*map(torch.stack, zip(*teachers, strict=True))) if teachers else None,
        )


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
    """Ctrl-C reaches the whole process group, but the parent decides when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
