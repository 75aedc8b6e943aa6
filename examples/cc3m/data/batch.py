"""A batch of samples: what it holds, and its way to the device that trains on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from examples.cc3m.data.features import Features
from examples.cc3m.data.positions import Origin
from examples.common.images import normalise


@dataclass(frozen=True)
class Batch:
    """A batch of B samples, and where their stream stands after them."""

    images: Tensor
    """(B, 3, H, W), or (B, V, 3, H, W) of several views; uint8 as read, float32 and normalised once
    `to` has moved them."""
    texts: Tensor
    """(B, L) int64 tokens, or (B, C, L) of several captions."""
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
    cpu_seconds: float = 0.0
    """CPU seconds that its reader spent on it."""
    teacher: Features | None = None
    """Patches (B, h w, dim) of the view and cls (B, D) of the whole image, float16, if the loader
    has features."""

    def tensors(self) -> list[Tensor]:
        return [self.images, self.texts, *(self.teacher or ())]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on a device, images normalised there."""
        images, texts, *teacher = (x.to(device, non_blocking=True) for x in self.tensors())
        return self._with(normalise(images), texts, *teacher)

    def pin_memory(self) -> Batch:
        """Copy it to memory from which a GPU reads while the CPU goes on; DataLoader calls this."""
        return self._with(*(x.pin_memory() for x in self.tensors()))

    def _with(self, images: Tensor, texts: Tensor, *teacher: Tensor) -> Batch:
        features = Features(*teacher) if teacher else None
        return replace(self, images=images, texts=texts, teacher=features)


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
        for tensor in batch.tensors():
            tensor.record_stream(current)  # its memory stays until the step has used it
        upcoming = copied()
        yield batch
