"""The Gram anchor: an early copy of a teacher, refreshed on a schedule."""

import copy

import torch
from torch import Tensor, nn


class GramAnchor(nn.Module):
    """An early copy of a teacher that provides Gram targets, refreshed on a schedule.

    Source: DINOv3. After training step `step` (counted from 0) the anchor becomes a copy of the
    moving-average teacher when step + 1 >= first_update, (step + 1) is a multiple of `every`, and
    fewer than `most` refreshes have happened. The copy and the count are in `state_dict`.

    Args:
        teacher: module to copy now; the copy is frozen and in evaluation mode.
        first_update, every: training steps.
        most: refreshes at most, or None.

    Raises:
        ValueError: first_update < 0, every < 1, or most < 0.
    """

    def __init__(
        self, teacher: nn.Module, first_update: int, every: int, most: int | None = None
    ) -> None:
        super().__init__()
        if first_update < 0 or every < 1 or (most is not None and most < 0):
            raise ValueError(
                "GramAnchor: need first_update >= 0, every >= 1 and most >= 0, got "
                f"{first_update}, {every} and {most}"
            )
        self.first_update, self.every, self.most = first_update, every, most
        self.anchor = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.refreshes: Tensor
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    def is_due(self, step: int) -> bool:
        """Whether `update(step, ...)` will refresh."""
        done = step + 1
        if done < self.first_update or done % self.every:
            return False  # without a look at the count, which may be on a GPU
        return self.most is None or int(self.refreshes) < self.most

    @torch.no_grad()
    def update(self, step: int, teacher: nn.Module) -> bool:
        """Refresh from `teacher` if the schedule says so; returns whether it did."""
        if not self.is_due(step):
            return False
        self.anchor.load_state_dict(teacher.state_dict())
        self.refreshes += 1
        return True

    def train(self, mode: bool = True) -> "GramAnchor":
        """Stays in evaluation mode, whatever the model around it does."""
        super().train(mode)
        self.anchor.eval()
        return self

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> object:
        """The anchor's output, without gradient."""
        return self.anchor(*args, **kwargs)
