"""The next batch is copied to the GPU while the current one is computed with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from examples.cc3m.batches import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device; one ahead on a GPU, copied in a stream of its own."""
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
        for tensor in (batch.images, batch.texts, *(batch.teacher or ())):
            tensor.record_stream(current)  # its memory stays until the step has used it
        upcoming = copied()
        yield batch
