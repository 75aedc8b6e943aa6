"""What to do about a loss or a gradient that is not finite: leave the step out, and count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.cc3m.batches import Batch
from examples.cc3m.files import UserError


class NotFinite(UserError):
    """Too many steps in a row whose loss or gradient is infinite or NaN."""


class Health:
    """Keeps what a bad step would spoil, counts bad steps, and names their samples.

    Args:
        module: whose buffers (running statistics) a bad step must not change.
        folder: gets skipped_<rank>.jsonl, a line a skipped step.
        rank: of this process.
        most: skipped steps in a row before giving up.
    """

    def __init__(self, module: nn.Module, folder: Path, rank: int, most: int) -> None:
        self.path, self.most = folder / f"skipped_{rank}.jsonl", most
        self.in_a_row = self.total = 0
        self._buffers = list(module.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def before_step(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def good(self) -> None:
        self.in_a_row = 0

    def bad(self, step: int, parts: Sequence[Batch], terms: dict[str, Tensor]) -> None:
        """Note a step that is left out.

        Raises:
            NotFinite: there were too many in a row.
        """
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        line = {
            "step": step,
            "terms": {name: str(float(value)) for name, value in terms.items()},
            "keys": [key for part in parts for key in part.keys],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.in_a_row > self.most:
            raise NotFinite(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row; the samples "
                f"are named in {self.path}. Weights are those before the first of these steps, and "
                "so is the last checkpoint; lower the learning rate or the loss weights"
            )
