"""Position of a run in its data, and who reads what: the order of shards and of their parts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.cc3m.data.batch import Batch

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

    def steps_of(
        self,
        epoch: int,
        samples: Sequence[int],
        batch_size: int,
        parts: int,
        world_size: int,
        streams: int,
    ) -> int:
        """Return how many steps a whole epoch has: as many as the process with least data takes.

        Args:
            epoch: number of the epoch, which decides who reads what.
            samples: in each shard.
            batch_size: samples of a batch.
            parts: batches of each process in a step.
            world_size, streams: processes, and streams of each.
        """
        position = Position(epoch)

        def batches(rank: int, stream: int) -> int:
            units = self.share(position, rank, world_size, stream, streams)
            return sum(samples[number] for number, _, _ in units) // batch_size

        shares = (sum(batches(r, s) for s in range(streams)) for r in range(world_size))
        return min(shares) // parts

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
