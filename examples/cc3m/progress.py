"""Where a run stands, in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from examples.cc3m.batches import Position, ShardOrder
from examples.cc3m.parallel import Parallel


@dataclass
class Progress:
    """Where a run stands; saved with it."""

    step: int = 0
    position: Position = field(default_factory=Position)
    evaluated: int = 0
    """Epochs after which there was an evaluation."""
    history: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Without the position, which is another one in every process."""
        return {**asdict(self), "position": None}

    def note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    def summary(self, epochs: int, entries: int) -> str:
        """A line about the last so many entries of the history."""
        loss, rates = (self.history.get(k, [])[-entries:] for k in ("loss", "images_per_second"))
        epoch = f"epoch {self.position.epoch}/{epochs}"
        if not loss:
            return epoch
        mean, rate = sum(loss) / len(loss), sum(rates) / len(rates)
        return f"{epoch}, mean loss {mean:.3f}, {rate:.0f} images/s"


def positions_of_all(mine: Position, streams: int, parallel: Parallel) -> list[Position]:
    """The position of every process, by rank."""
    empty = (0,) * streams
    row = [*(mine.consumed or empty), *(mine.opened or empty), mine.next_stream]
    rows = [each.tolist() for each in parallel.gather(torch.tensor(row))]
    return [
        Position(mine.epoch, tuple(x[:streams]), x[-1], tuple(x[streams : 2 * streams]), mine.done)
        if any(x)
        else Position(mine.epoch, done=mine.done)
        for x in rows
    ]


def states_of_all(states: dict[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """Tensors of every process as "<rank>.<name>"."""
    return {
        f"{rank}.{name}": value
        for name, mine in states.items()
        for rank, value in enumerate(parallel.gather(mine))
    }


def resumed_position(
    saved: Sequence[dict[str, Any]], streams: int, order: ShardOrder, parallel: Parallel
) -> tuple[Position, bool]:
    """Where this process goes on, and whether there are as many of them as before."""
    positions = [Position.from_json(each) for each in saved]
    before = {len(each.consumed) for each in positions} - {0}
    if len(positions) == parallel.world_size and before <= {streams}:
        return positions[parallel.rank], True
    return order.carry_over(positions), False
