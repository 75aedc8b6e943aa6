"""Float32 whatever the inputs: the dtype, and autocast switched off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for each in tensors:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the tensor's device; there is none on the meta device."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
