"""The Gram anchor: an early copy of a teacher, refreshed on a schedule."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class GramAnchor(nn.Module):
    """An early copy of a teacher that provides Gram targets, refreshed on a schedule.

    Source: DINOv3. After training step `step` (counted from 0) the anchor becomes a copy of the
    moving-average teacher when step + 1 >= first_update, (step + 1) is a multiple of `every`, and
    fewer than `most` refreshes have happened. The copy and the count are in `state_dict`. Every
    parameter and persistent buffer is copied, also those that the teacher's own state_dict leaves
    out, as `Dinov3Teacher`'s does.

    Args:
        teacher: module to copy now; the copy is frozen and in evaluation mode.
        first_update, every: training steps.
        most: refreshes at most, or None.

    Raises:
        ValueError: first_update < 0, every < 1, or most < 0; or the teacher has neither parameters
            nor buffers, so that there is nothing to copy.

    Example:
        >>> average = nn.Linear(4, 4)  # of the student, moving
        >>> anchor = GramAnchor(average, first_update=1000, every=500)
        >>> [step + 1 for step in range(2000) if anchor.update(step, average)]
        [1000, 1500, 2000]
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
        if not _whole_state(teacher):
            raise ValueError(
                f"GramAnchor: the teacher, a {type(teacher).__name__}, has neither parameters nor "
                "buffers to copy; pass the module that holds the weights"
            )
        self.first_update, self.every, self.most = first_update, every, most
        self.anchor = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.refreshes: Tensor
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))
        hooks: Any = self  # torch leaves it without types
        hooks.register_state_dict_post_hook(_add_anchor)

    def is_due(self, step: int) -> bool:
        """Say if `update(step, ...)` will refresh."""
        done = step + 1
        if done < self.first_update or done % self.every:
            return False  # without a look at the count, which may be on a GPU
        return self.most is None or int(self.refreshes) < self.most

    @torch.no_grad()
    def update(self, step: int, teacher: nn.Module) -> bool:
        """Refresh from `teacher` if the schedule says so; return if it did.

        Args:
            step: number of the training step that was just done, from 0.
            teacher: module like the one copied at first.

        Raises:
            RuntimeError: its tensors have other names or shapes.
        """
        if not self.is_due(step):
            return False
        self.anchor.load_state_dict(_whole_state(teacher))
        self.refreshes += 1
        return True

    def train(self, mode: bool = True) -> "GramAnchor":
        """Set the mode of this module, but leave the anchor in evaluation mode."""
        super().train(mode)
        self.anchor.eval()
        return self

    @torch.no_grad()
    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the anchor, without gradient."""
        return self.anchor(*args, **kwargs)


def _whole_state(module: nn.Module) -> dict[str, Tensor]:
    from rankloss.fusion.state import whole_state  # brings einops, which `import rankloss` does not

    return whole_state(module)


def _add_anchor(module: GramAnchor, state: dict[str, Any], prefix: str, _: object) -> None:
    """Put the copy into a state_dict, also where the copied module leaves itself out."""
    for name, value in _whole_state(module.anchor).items():
        state.setdefault(f"{prefix}anchor.{name}", value.detach())
