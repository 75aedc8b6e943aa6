"""Batches, and where in the data a run stands after them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from examples.cc3m.features import Features


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
    faults: dict[str, int] = field(default_factory=dict)
    """What was wrong with samples since the stream's last batch, by kind."""
    opened: int = 0
    """Shards the stream has begun to read in this epoch."""
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

    def pin_memory(self) -> Batch:
        """For DataLoader: in memory from which a GPU can copy while the processor goes on."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Features(*(x.pin_memory() for x in teacher))
        return replace(
            self, images=self.images.pin_memory(), texts=self.texts.pin_memory(), teacher=teacher
        )


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands; JSON-able by `dataclasses.asdict`."""

    epoch: int = 0
    consumed: tuple[int, ...] = ()
    """Of each stream; empty at the start of an epoch."""
    next_stream: int = 0
    opened: tuple[int, ...] = ()
    """Shards that each stream has begun; empty at the start of an epoch."""
    done: tuple[int, ...] = ()
    """Numbers of the shards that this epoch began before the number of processes changed."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Position:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**fields)

    def after(self, batch: Batch, streams: int) -> Position:
        return replace(
            self,
            consumed=_with(self.consumed, streams, batch.stream, batch.consumed),
            opened=_with(self.opened, streams, batch.stream, batch.opened),
            next_stream=(batch.stream + 1) % streams,
        )


def _with(values: tuple[int, ...], streams: int, stream: int, value: int) -> tuple[int, ...]:
    changed = list(values or (0,) * streams)
    changed[stream] = value
    return tuple(changed)


@dataclass(frozen=True)
class ShardOrder:
    """Who reads which shard when: a function of (seed, epoch, rank, worker)."""

    shards: int
    seed: int
    shuffle: bool

    def share(
        self, position: Position, rank: int, world_size: int, stream: int = 0, streams: int = 1
    ) -> list[int]:
        """Numbers of the shards of a process, or of one of its streams, in order."""
        numbers = list(range(self.shards))
        if self.shuffle:
            random.Random(f"{self.seed}/{position.epoch}").shuffle(numbers)
        done = set(position.done)
        left = [number for number in numbers if number not in done]
        return left[rank::world_size][stream::streams]

    def carry_over(self, positions: Sequence[Position]) -> Position:
        """Where any other number of processes goes on, given the position of each old one.

        Shards that somebody had begun are not read again in this epoch, so that no sample comes
        twice; what their readers had not yet taken from them comes again in the next epoch.
        """
        first = positions[0]
        done = set(first.done)
        for rank, position in enumerate(positions):
            for stream, opened in enumerate(position.opened):
                share = self.share(first, rank, len(positions), stream, len(position.opened))
                done |= set(share[:opened])
        if len(done) == self.shards:
            return Position(first.epoch + 1)
        return Position(first.epoch, done=tuple(sorted(done)))

    def endless(self, epoch: int, rank: int, stream: int) -> Iterator[int]:
        """Shards drawn with replacement, for epochs of a given length."""
        rng = random.Random(f"{self.seed}/{epoch}/{rank}/{stream}/resampled")
        while True:
            yield rng.randrange(self.shards)
