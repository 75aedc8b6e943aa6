"""What implementations share: autocast off, the current device, places of candidates."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def places_of(ranking: Tensor, m: int) -> Tensor:
    """(N, M) int32: the place of every candidate, K where it has none."""
    n, k = ranking.shape
    place = torch.arange(k, dtype=torch.int32, device=ranking.device)
    places = torch.full((n, m), k, dtype=torch.int32, device=ranking.device)
    return places.scatter_(1, ranking, place.expand(n, k))


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device: policies here choose dtypes, eager as compiled."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
