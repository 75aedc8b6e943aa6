"""Storage of patch features: float16, or one byte a number with a scale for each token.

A token x is kept as numbers q of one byte and a float16 scale s with x = s q, s = max |x| divided
by the largest number of the type: int8 divides a token's range evenly, float8 (e4m3) keeps about
four significant bits of every number. `benchmarks.gram_fidelity` measures what either loses.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.common.files import UserError

LARGEST = {"int8": 127.0, "float8": 448.0}
DTYPES = ("float16", *LARGEST)
PATCHES, SCALE, CLS = "patches.npy", "scale.npy", "cls.npy"
"""Suffixes of an image's files."""
Array = NDArray[Any]


def pack(patches: Tensor, dtype: str) -> dict[str, Array]:
    """Return arrays by suffix that hold (h w, dim) patches.

    Args:
        patches: floating.
        dtype: one of DTYPES.

    Raises:
        UserError: a number is not finite, or too large for float16.
    """
    half = to_half(patches)
    if dtype == "float16":
        return {PATCHES: half.numpy()}
    tokens = patches.float().cpu()
    scale = (tokens.abs().amax(1, keepdim=True) / LARGEST[dtype]).half()
    scaled = tokens / scale.float().masked_fill(scale == 0, 1.0)
    scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == "int8":
        numbers = scaled.round().to(torch.int8)
    else:
        numbers = scaled.to(torch.float8_e4m3fn).view(torch.uint8)  # a type that numpy has
    return {PATCHES: numbers.numpy(), SCALE: scale[:, 0].numpy()}


def to_half(values: Tensor) -> Tensor:
    """Return float16 on the CPU.

    Raises:
        UserError: a value is too large for it, or not finite to begin with.
    """
    half = values.half().cpu()
    if not torch.isfinite(half).all():
        raise UserError(
            "features are not finite in fp16; check the weights, or use --precision float32"
        )
    return half


def unpack(arrays: Mapping[str, Array], dtype: str) -> Tensor:
    """Return (h w, dim) float16 from what `pack` gave."""
    numbers = torch.from_numpy(arrays[PATCHES])
    if dtype == "float16":
        return numbers
    if dtype == "float8":
        numbers = numbers.view(torch.float8_e4m3fn)
    return (numbers.float() * torch.from_numpy(arrays[SCALE]).float()[:, None]).half()


def suffixes(dtype: str) -> tuple[str, ...]:
    """Return the suffixes of an image's files."""
    return (PATCHES, CLS) if dtype == "float16" else (PATCHES, SCALE, CLS)


def to_npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def bytes_of_image(tokens: int, dim: int, cls_dim: int, dtype: str) -> int:
    """Return the bytes that an image takes in a tar file of features, headers included."""
    arrays = pack(torch.zeros(tokens, dim), dtype) | {CLS: np.zeros(cls_dim, np.float16)}
    return sum(512 + -(-len(to_npy(array)) // 512) * 512 for array in arrays.values())
