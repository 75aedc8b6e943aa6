"""Float32 whatever the inputs: the dtype, autocast switched off; and if values can be read."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


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


def can_read(*tensors: Tensor) -> bool:
    """Say if tensors have values that Python may look at: not traced, on meta, fake or mapped."""
    return not torch.compiler.is_compiling() and not any(
        x.is_meta or isinstance(x, FakeTensor) or torch.func.debug_unwrap(x) is not x
        for x in tensors
    )
