"""RankCLIP's ramp: a factor of the ranking terms, kept through copies, casts and loading."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

START = 1.0


class RampedLoss(nn.Module):
    """A module with RankCLIP's ramp: a factor that `set_progress` sets and state dicts keep.

    The factor is held twice: in the buffer `ranking_ramp`, which compiled and captured steps read
    at the time they run, and as a Python number, which tells without waiting for a GPU when there
    is nothing to rank, and restores the buffer where its memory was left uninitialised
    (`to_empty`; a checkpoint without it, read by transformers).

    >>> loss = RampedLoss()
    >>> loss.set_progress(0.5)
    >>> loss.ranking_ramp, list(loss.state_dict())
    (tensor(1.5000), ['ranking_ramp'])
    """

    ranking_ramp: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ranking_ramp", torch.full((), START, dtype=torch.float32))
        self._set_factor(START)

    def set_progress(self, progress: float) -> None:
        """Set RankCLIP's ramp: ranking terms are multiplied by clamp(3 progress, 0, 2) from now on.

        Call it on every process. While the factor is 0, ranking terms are not computed.

        Args:
            progress: training progress in [0, 1]; RankCLIP's is (e-1)/(E-1) in epoch e of E, from
                1. Until the first call the factor is 1. It is saved with the state dict.

        Raises:
            ValueError: progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"set_progress: progress must be in [0, 1], got {progress}")
        self._set_factor(min(3 * progress, 2.0))
        self.ranking_ramp.fill_(self._factor)

    def _set_factor(self, factor: float) -> None:
        self._factor, self._ranking_off = factor, factor == 0  # compiled code sees the second alone

    def _restore_ramp(self) -> None:
        """Write the factor to the buffer, in float32 at least: a cast of the module rounds it."""
        old = self.ranking_ramp
        dtype = torch.promote_types(old.dtype, torch.float32)
        if old.dtype == dtype:  # in place: DDP and captured graphs hold on to it
            old.fill_(self._factor)
        else:
            self.ranking_ramp = torch.full((), self._factor, dtype=dtype, device=old.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore_ramp()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load; a state from before the ramp was saved puts it at its start."""
        name = prefix + "ranking_ramp"
        given = state_dict.setdefault(name, torch.full((), START, device=self.ranking_ramp.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not given.is_meta:
            self._set_factor(float(given))
            self._restore_ramp()

    @property
    def _is_hf_initialized(self) -> bool:
        """Answer transformers, which asks it of every module once a checkpoint is loaded.

        It has then replaced the buffer, by the checkpoint's value, marked by an attribute of this
        name, or by uninitialised memory.
        """
        if getattr(self.ranking_ramp, "_is_hf_initialized", False):
            self._set_factor(float(self.ranking_ramp))
        self._restore_ramp()
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Ignore what transformers notes down."""
