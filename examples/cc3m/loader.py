"""Batches from webdataset shards, and where in the data a run stands after each of them.

The order is a function of (seed, epoch, rank, worker), augmentation of (seed, epoch, sample), and
every batch says how far it got: a run stopped between two batches goes on exactly, and with another
number of processes or workers it leaves out only the samples that it has trained on. Samples that
cannot be read are counted and left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.cc3m.features import FeatureReader, Features
from examples.common.files import UserError
from examples.common.shards import (
    Failures,
    SampleError,
    count_samples,
    decode,
    expand_shards,
    read_shard,
    unusable,
)
from examples.common.signals import prepare_worker

LOG = logging.getLogger(__name__)
FREE_FAILURES = 20
"""Broken samples that are never reason enough to stop."""


@dataclass(frozen=True)
class Batch:
    """A batch of B samples, and where their stream stands after them."""

    images: Tensor
    """(B, 3, H, W) float32, normalised by the transform."""
    texts: Tensor
    """(B, L) int64 tokens."""
    records: list[dict[str, Any]]
    """The json of each sample if asked for, else empty."""
    stream: int
    consumed: int
    """Samples the stream has given since the epoch began, broken ones included."""
    faults: dict[str, int] = field(default_factory=dict)
    """Faults of samples since the stream's last batch, by kind."""
    origins: list[Origin] = field(default_factory=list)
    """Shard and place of every sample the stream gave since its last batch, broken ones too."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Samples in each shard that the stream has read to its end since its last batch."""
    keys: list[str] = field(default_factory=list)
    """Keys of the samples in their shards."""
    teacher: Features | None = None
    """Patches (B, h w, dim) and cls (B, D) float16, if the loader has features."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on a device."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Features(*(x.to(device, non_blocking=True) for x in teacher))
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            texts=self.texts.to(device, non_blocking=True),
            teacher=teacher,
        )

    def pin_memory(self) -> Batch:
        """Copy it to memory from which a GPU reads while the CPU goes on; DataLoader calls this."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Features(*(x.pin_memory() for x in teacher))
        return replace(
            self, images=self.images.pin_memory(), texts=self.texts.pin_memory(), teacher=teacher
        )


Origin = tuple[int, int]
"""Number of a shard, and the place of a sample in it."""
ALL = -1
"""Bits of a shard of which every sample was taken (a negative number has all bits)."""


@dataclass(frozen=True)
class Position:
    """Place in the data where a run stands.

    Samples of a shard that were taken are the set bits of a whole number.
    """

    epoch: int = 0
    consumed: tuple[int, ...] = ()
    """Samples taken from each stream; empty at the start of an epoch."""
    next_stream: int = 0
    taken: dict[int, int] = field(default_factory=dict)
    """By shard, what this process took since the epoch began or `before` was made."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Samples of the shards of which this is known."""
    before: dict[int, int] = field(default_factory=dict)
    """By shard, what all processes took in this epoch before their number changed."""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "taken": _hex(self.taken), "before": _hex(self.before)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Position:
        return cls(
            data["epoch"],
            tuple(data["consumed"]),
            data["next_stream"],
            {int(k): int(v, 16) for k, v in data["taken"].items()},
            {int(k): v for k, v in data["sizes"].items()},
            {int(k): int(v, 16) for k, v in data["before"].items()},
        )

    def after(self, batch: Batch, streams: int) -> Position:
        """Return where the run stands once a batch was trained on."""
        consumed = list(self.consumed or (0,) * streams)
        consumed[batch.stream] = batch.consumed
        taken, sizes = dict(self.taken), {**self.sizes, **batch.sizes}
        for shard, place in batch.origins:
            taken[shard] = taken.get(shard, 0) | 1 << place
        for shard in taken.keys() & sizes.keys():
            if (taken[shard] | self.before.get(shard, 0)).bit_count() == sizes[shard]:
                taken[shard] = ALL
        return replace(
            self,
            consumed=tuple(consumed),
            next_stream=(batch.stream + 1) % streams,
            taken=taken,
            sizes=sizes,
        )


def _hex(bits: dict[int, int]) -> dict[str, str]:
    return {str(shard): hex(value) for shard, value in bits.items()}


Unit = tuple[int, int, int]
"""Shard, part, parts: those of a shard's samples whose place is `part` modulo `parts`."""
UNITS_PER_STREAM = 4
"""Least number of units that the rest of an epoch is divided into, for even shares."""


@dataclass(frozen=True)
class ShardOrder:
    """Order in which streams read shards: a function of (seed, epoch, rank, worker)."""

    shards: int
    seed: int
    shuffle: bool

    def share(
        self, position: Position, rank: int, world_size: int, stream: int = 0, streams: int = 1
    ) -> list[Unit]:
        """Return what a process, or one of its streams, reads in this epoch, in order."""
        numbers = list(range(self.shards))
        if self.shuffle:
            random.Random(f"{self.seed}/{position.epoch}").shuffle(numbers)
        left = [number for number in numbers if position.before.get(number) != ALL]
        parts = 1
        if position.before and left:
            parts = -(-UNITS_PER_STREAM * world_size * streams // len(left))
        units = [(number, part, parts) for number in left for part in range(parts)]
        return units[rank::world_size][stream::streams]

    def carry_over(self, positions: Sequence[Position]) -> Position:
        """Return where another number of processes goes on, given the position of each old one.

        No sample comes twice, and none is left out: what a reader had in its shuffle buffer, but
        gave to nobody, is read again.
        """
        before, sizes = dict(positions[0].before), dict[int, int]()
        for position in positions:
            sizes |= position.sizes
            for shard, bits in position.taken.items():
                before[shard] = before.get(shard, 0) | bits
        for shard, bits in before.items():
            if bits.bit_count() == sizes.get(shard):
                before[shard] = ALL
        epoch = positions[0].epoch
        if sum(bits == ALL for bits in before.values()) == self.shards:
            return Position(epoch + 1)
        return Position(epoch, before=before)

    def endless(self, epoch: int, rank: int, stream: int) -> Iterator[Unit]:
        """Draw shards with replacement, for epochs of a given length."""
        rng = random.Random(f"{self.seed}/{epoch}/{rank}/{stream}/resampled")
        while True:
            yield rng.randrange(self.shards), 0, 1


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
        seed: decides order and augmentation.
        workers: processes that decode; 0 decodes in this one.
        rank, world_size: this process's share of the shards.
        records: keep each sample's json.
        features: a teacher's, joined to images by shard and key; samples without any count as
            unreadable. `transform` must then show what the teacher saw: the resized image's
            centre, as open_clip's transform for evaluation does. After a random crop the
            features would be those of other patches.
        resample: draw shards with replacement, so that an epoch never ends; the caller decides how
            long it is.
        keep: keep undecoded samples in memory after the first epoch, for small data; without
            workers only.
        max_broken: share of unreadable samples above which reading stops with an error.
        prefetch: batches that each worker decodes ahead.
        timeout: seconds to wait for a batch of a worker before giving up; 0 waits for ever.

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
        prefetch: int = 2,
        timeout: float = 0.0,
    ) -> None:
        self.prefetch, self.timeout = prefetch, timeout
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
                yield item
        self._check_complete(position, sum(consumed), batches)

    def steps_of(self, epoch: int, samples: Sequence[int], parts: int) -> int:
        """Return how many steps a whole epoch has: as many as the process with least data takes.

        Args:
            epoch: number of the epoch, which decides who reads what.
            samples: in each shard.
            parts: batches of each process in a step.
        """
        position, shares = Position(epoch), []
        for rank in range(self.world_size):
            batches = 0
            for stream in range(self.streams):
                units = self.order.share(position, rank, self.world_size, stream, self.streams)
                batches += sum(samples[number] for number, _, _ in units) // self.batch_size
            shares.append(batches)
        return min(shares) // parts

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

    image: Tensor
    text: str
    record: dict[str, Any]
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

    def take(self) -> dict[str, Any]:
        """Return what a batch says of its stream, and begin anew."""
        taken = {"faults": self.failures.take(), "origins": self.origins, "sizes": self.sizes}
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
                examples = []
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
        for place, sample in enumerate(self._shard(self.loader.shards[number], reader)):
            if place % parts == part and not taken >> place & 1:
                yield {**sample, "__origin__": (number, place)}
        reader.sizes[number] = place + 1

    def _shard(self, shard: str, reader: _Reader) -> Iterable[dict[str, Any]]:
        """Read a tar file in its order, or from memory if its samples were kept."""
        kept = self.loader.kept
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
            keys=[each.key for each in examples],
            teacher=Features(*map(torch.stack, zip(*teachers, strict=True))) if teachers else None,
            **reader.take(),
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


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a device; on a GPU one ahead, in a stream of its own."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copied() -> Batch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.to(device)

    upcoming = copied()
    while upcoming is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        batch = upcoming
        for tensor in (batch.images, batch.texts, *(batch.teacher or ())):
            tensor.record_stream(current)  # its memory stays until the step has used it
        upcoming = copied()
        yield batch
