"""Random views of a batch of images: DINO's global and local crops, in tensor operations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GLOBAL_AREA, LOCAL_AREA = (0.5, 1.0), (0.15, 0.5)
"""Least and largest share of the image that a crop covers."""
JITTER = 0.4
"""Change of contrast, as a share; brightness: twice that, in standard deviations."""


class Views(NamedTuple):
    """Crops of B images.

    Attributes:
        globals: (2, B, 3, S, S), most of the image each.
        high: (2, B, 3, 2 S, 2 S), the same regions at twice the resolution; or None.
        locals: (V, B, 3, S', S'), small parts.
    """

    globals: Tensor
    high: Tensor | None
    locals: Tensor


def sample_views(
    images: Tensor,
    *,
    global_size: int,
    local_size: int,
    locals_: int,
    with_high: bool = False,
) -> Views:
    """Draw views by torch's global generator.

    Hues and directions are what scenes are about and stay. Brightness and contrast vary, so that
    the shade of the background does not tell which crops are of one image.

    Args:
        images: (B, 3, H, W) floating, normalised.
        global_size, local_size: side of the crops in pixels.
        locals_: V, local crops of each image.
        with_high: whether global crops are wanted at twice the resolution too.
    """
    large, high, small = [], [], []
    for _ in range(2):
        region = sample_regions(len(images), GLOBAL_AREA)
        brightness, contrast = _sample_jitter(len(images))
        large.append(recolour(crop(images, region, global_size), brightness, contrast))
        if with_high:
            high.append(recolour(crop(images, region, 2 * global_size), brightness, contrast))
    for _ in range(locals_):
        cropped = crop(images, sample_regions(len(images), LOCAL_AREA), local_size)
        small.append(recolour(cropped, *_sample_jitter(len(images))))
    return Views(torch.stack(large), torch.stack(high) if with_high else None, torch.stack(small))


def sample_regions(count: int, area: tuple[float, float]) -> Tensor:
    """(count, 4) boxes inside the image: centre x, centre y, half width, half height, in [-1, 1].

    Their area is uniform in `area`, their aspect ratio log-uniform in [3/4, 4/3].
    """
    share = torch.empty(count).uniform_(*area)
    ratio = torch.empty(count).uniform_(-math.log(4 / 3), math.log(4 / 3)).exp().sqrt()
    half = torch.stack([share.sqrt() * ratio, share.sqrt() / ratio], 1).clamp(max=1.0)
    centre = (2 * torch.rand(count, 2) - 1) * (1 - half)
    return torch.cat([centre, half], 1)


def crop(images: Tensor, regions: Tensor, size: int) -> Tensor:
    """(B, 3, size, size): each image's own region, by bilinear interpolation."""
    x, y, half_width, half_height = regions.unbind(1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, 1) for row in ((half_width, zero, x), (zero, half_height, y))]
    grid = F.affine_grid(torch.stack(rows, 1), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def recolour(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Scale (B, 3, H, W) images about their mean, and shift them; both (B,)."""
    mean = images.mean((1, 2, 3), keepdim=True)
    shifted = mean + brightness[:, None, None, None]
    return shifted + (images - mean) * contrast[:, None, None, None]


def _sample_jitter(count: int) -> tuple[Tensor, Tensor]:
    brightness = torch.empty(count).uniform_(-2 * JITTER, 2 * JITTER)
    return brightness, torch.empty(count).uniform_(1 - JITTER, 1 + JITTER)
