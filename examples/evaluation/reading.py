"""Data that processes and their workers share out, and batches of it in step with each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import Self

from examples.common.parallel import Parallel
from examples.common.signals import prepare_worker

Item = TypeVar("Item")


class Stopped(Exception):
    """A process was asked to stop before an evaluation was done."""


class Shared(IterableDataset[Any]):
    """Data of which every process, and every worker of it, reads a part."""

    share = (0, 1)

    def part(self, part: int, parts: int) -> Self:
        """Return the same data, of which only a part is read."""
        mine = copy.copy(self)
        mine.share = part, parts
        return mine

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this worker's items of this process's part."""
        info, (part, parts) = get_worker_info(), self.share
        if info is not None:
            part, parts = part * info.num_workers + info.id, parts * info.num_workers
        return items[part::parts]


@dataclass(frozen=True)
class Reading:
    """Way in which data are read.

    Args:
        batch_size: items that a process encodes at a time.
        parallel: processes that take part, each with its share.
        workers: processes that decode for each of them; 0 decodes in itself.
        stopping: says if to stop.
    """

    batch_size: int = 128
    parallel: Parallel = field(default_factory=Parallel)
    workers: int = 0
    stopping: Callable[[], bool] = lambda: False

    def batches(
        self, data: Shared, collate: Callable[[list[Any]], Any] | None = None
    ) -> Iterator[Any]:
        """Yield this process's batches while any process has some: none waits long for others.

        Raises:
            Stopped: `stopping` was true in some process.
        """
        loader = DataLoader(
            data.part(self.parallel.rank, self.parallel.world_size),
            self.batch_size,
            num_workers=self.workers,
            worker_init_fn=prepare_worker,
            collate_fn=collate,
            generator=torch.Generator(),  # which draws the workers' seed: training must not notice
        )
        batches = iter(loader)
        while True:
            batch = next(batches, None)
            stop, more = self.parallel.agree(self.stopping(), batch is not None)
            if stop:
                raise Stopped
            if not more:
                return
            if batch is not None:
                yield batch
