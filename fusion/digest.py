"""What identifies a set of tensors: a hash of their names, types, shapes and values."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal, the same on every device and in whatever order tensors come."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(values.view(torch.uint8).numpy().data)
    return sha.hexdigest()
