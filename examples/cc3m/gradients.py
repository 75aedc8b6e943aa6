"""Gradient of a step: of one batch, or of a large one in parts, exactly (`rankloss.grad_cache`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from examples.cc3m.batch import Batch
from examples.cc3m.monitor import Clock, Stamp
from examples.cc3m.settings import DTYPES, Precision
from examples.common.parallel import Parallel, Sharding, distribute
from rankloss import DinoRankCLIP
from rankloss.grad_cache import GradCache


class Encoder(nn.Module):
    """Encode a batch: the only call that DDP and FSDP2 watch, with all that is trained inside."""

    def __init__(self, towers: DinoRankCLIP) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.towers.encode(batch.images, batch.texts)


class Gradients:
    """Computes the gradient of a step.

    Args:
        towers: what is trained; FSDP2 shards it in place.
        parallel, sharding: processes that share the gradient, and how.
        precision: that of the model under autocast; the loss computes in float32 whatever it is.
        scaler: multiplies the loss before the backward pass, for float16.
        clock: told the time of the model and of the loss.
        teacher_grid: (height, width) of the teacher's patches, for recipes that distil.
    """

    def __init__(
        self,
        towers: DinoRankCLIP,
        parallel: Parallel,
        sharding: Sharding,
        precision: Precision,
        scaler: torch.amp.GradScaler,
        clock: Clock,
        teacher_grid: tuple[int, int] | None = None,
    ) -> None:
        self.towers, self.device, self.clock = towers, parallel.device, clock
        self.precision, self.teacher_grid = precision, teacher_grid
        self.module = distribute(Encoder(towers), parallel, sharding)
        self.cached = GradCache(
            self.module,
            self._objective,
            modules=[self.module],
            autocast=self._autocast,
            scaler=scaler,
        )
        self._loss: tuple[Stamp, Stamp] | None = None

    def __call__(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Leave the gradient in the parameters; return the loss's terms, detached."""
        teachers = [part.teacher for part in parts if part.teacher is not None]
        teacher = [torch.cat(x) for x in zip(*teachers, strict=True)] if teachers else None
        start = self.clock.stamp()
        terms: Any = self.cached(parts, teacher=teacher)
        if self._loss is not None:
            begin, done = self._loss
            self.clock.add("model", start, begin)
            self.clock.add("loss", begin, done)
            self.clock.add("model", done, self.clock.stamp())
        return dict(terms)

    def _objective(self, teacher: Sequence[Tensor] | None, **outputs: Tensor) -> dict[str, Tensor]:
        begin = self.clock.stamp()

        def note(_: Tensor) -> None:
            self._loss = begin, self.clock.stamp()

        for name in ("image_features", "text_features"):
            if outputs[name].requires_grad:
                outputs[name].register_hook(note)  # type: ignore[no-untyped-call]
        return self.towers.objective(outputs, *(teacher or ()), teacher_grid=self.teacher_grid)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
