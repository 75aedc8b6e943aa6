"""Images of samples: decoded within bounds, cropped, and normalised where they are used.

A crop says in fractions of the whole image what it shows, so that a teacher's grid of features of
the same image can be cut like it. JPEG files are decoded at the smallest of their scales (1, 1/2,
1/4, 1/8) that still has as many pixels as a random crop needs: pixels then differ slightly from
those of a full decoding, the crop does not.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from examples.common.shards import Failures, SampleError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that may run, whatever a file is called."""
SMALLEST_SIDE = 2
"""Pixels; web pages count their readers with images of one."""
MOST_PIXELS = 25_000_000
"""Pixels of an image; decoding one takes up to 12 bytes for each."""
RATIO = [3 / 4, 4 / 3]
"""Smallest and largest width / height of a random crop."""
ORIENTATION, FIRST_ON_ITS_SIDE = 0x0112, 5
"""EXIF's tag, and the first of its values that swap width and height."""

Pixels = tuple[int, int, int, int]
"""Left, top, right and bottom of a box in an image."""
Box = tuple[float, float, float, float]
"""The same as fractions of the image's width and height."""
Grid = tuple[int, int]


class View(NamedTuple):
    """A part of an image.

    Attributes:
        pixels: (3, H, W) uint8.
        box: where it is in the whole image.
    """

    pixels: Tensor
    box: Box


class Crop(Protocol):
    """Choice of a part of an image, and its size when it is shown."""

    def box(self, width: int, height: int) -> Pixels:
        """Choose a box in an image of that size; may draw from torch's generator."""

    def needed(self, box: Pixels) -> tuple[float, float] | None:
        """Return at which scales of width and height the box still fills a view; None: in full."""

    def show(self, image: Image.Image, box: Pixels) -> Tensor:
        """Return the box of an RGB image as (3, H, W) uint8."""


@dataclass(frozen=True)
class RandomCrop:
    """A random box, resized to a square: torchvision's RandomResizedCrop as open_clip has it.

    Boxes are the same for the same state of torch's generator; pixels differ by 1 of 255 at most,
    and in few places, because torch resizes integers several times faster than Pillow does.

    Args:
        size: pixels of a view's side.
        scale: smallest and largest share of the image's area.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)

    def box(self, width: int, height: int) -> Pixels:
        shape = torch.empty(1, height, width, device="meta")
        top, left, rows, columns = RandomResizedCrop.get_params(shape, list(self.scale), RATIO)
        return left, top, left + columns, top + rows

    def needed(self, box: Pixels) -> tuple[float, float] | None:
        return self.size / (box[2] - box[0]), self.size / (box[3] - box[1])

    def show(self, image: Image.Image, box: Pixels) -> Tensor:
        left, top, right, bottom = box
        part = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, top:bottom, left:right]
        size = (self.size, self.size)
        return nn.functional.interpolate(part, size=size, mode="bicubic", antialias=True)[0]


@dataclass(frozen=True)
class CentreCrop:
    """The centre square, exactly as open_clip's transform for evaluation shows it.

    Args:
        size: pixels of a view's side.
    """

    size: int

    def box(self, width: int, height: int) -> Pixels:
        side = min(width, height)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return left, top, left + side, top + side

    def needed(self, box: Pixels) -> tuple[float, float] | None:
        return None

    def show(self, image: Image.Image, box: Pixels) -> Tensor:
        resized = TF.resize(image, self.size, TF.InterpolationMode.BICUBIC)
        pixels: Tensor = TF.pil_to_tensor(TF.center_crop(resized, [self.size, self.size]))
        return pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image's centre as (3, H, W) float32, normalised."""
        return normalise(self.show(image, self.box(*image.size)))


def views(
    sample: dict[str, Any], crop: Crop, count: int = 1, failures: Failures | None = None
) -> list[View]:
    """Return so many views of a sample's image, which is decoded once.

    Raises:
        SampleError: there is no image, or it cannot be used.
    """
    image = _opened(sample)
    with _reading(sample):
        turned = image.getexif().get(ORIENTATION, 1) >= FIRST_ON_ITS_SIDE
    width, height = image.size[::-1] if turned else image.size
    boxes = [crop.box(width, height) for _ in range(count)]
    _reduce(image, [crop.needed(box) for box in boxes], turned)
    image = _decoded(image, sample, failures)
    across, down = image.width / width, image.height / height
    return [
        View(
            crop.show(image, (*_scaled(box[:2], across, down), *_scaled(box[2:], across, down))),
            (box[0] / width, box[1] / height, box[2] / width, box[3] / height),
        )
        for box in boxes
    ]


def decode_image(sample: dict[str, Any]) -> Image.Image:
    """Decode the image to RGB: transparent becomes white, 16 bits a channel become 8.

    It is turned as its EXIF says. Format and size are looked at before anything is decoded.

    Args:
        sample: one that `read_shard` gave.

    Raises:
        SampleError: there is none, or it cannot be used.
    """
    return _decoded(_opened(sample), sample)


def normalise(
    images: Tensor,
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN,
    std: tuple[float, ...] = OPENAI_DATASET_STD,
) -> Tensor:
    """Return images (..., 3, H, W) as float32 by statistics of channels; only uint8 changes."""
    if images.dtype != torch.uint8:
        return images
    shift, scale = (_channels(x, images.device) for x in (mean, std))
    return images.to(torch.float32).div_(255).sub_(shift).div_(scale)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a number a channel, copied to a device once: copying waits for it."""
    return torch.tensor(values).view(3, 1, 1).to(device)


def cut_grid(patches: Tensor, grid: Grid, box: Box, target: Grid) -> Tensor:
    """Cut a box out of a grid of features of a whole image, and resample it.

    Each target patch is the mean of bilinear samples, one for each source patch it covers along
    a side (torchvision's roi_align); beyond the outermost centres the outermost values hold.

    Args:
        patches: (h w, C) floating, in row-major order of `grid`.
        grid: (h, w) of the whole image.
        box: part of the image.
        target: (height, width) of the result.

    Returns:
        (height width, C) in the dtype given.
    """
    if box == (0, 0, 1, 1) and target == grid:
        return patches
    rows, columns = grid
    left, top, right, bottom = box
    corners = [0.0, left * columns, top * rows, right * columns, bottom * rows]
    image = patches.float().T.reshape(1, -1, rows, columns)
    cut: Tensor = roi_align(image, torch.tensor([corners]), target, aligned=True)
    return cut[0].flatten(1).T.to(patches.dtype).contiguous()


# ---------------------------------------------------------------- decoding


def _opened(sample: dict[str, Any]) -> Image.Image:
    """Read the image's header, and refuse what must not be decoded."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        raise SampleError("no image", sample)
    with _reading(sample):
        image = Image.open(io.BytesIO(sample[suffix]), formats=FORMATS)
        if min(image.size) < SMALLEST_SIDE:
            raise SampleError("image too small", sample)
        if image.width * image.height > MOST_PIXELS:
            raise SampleError("image too large", sample)
    return image


def _decoded(
    image: Image.Image, sample: dict[str, Any], failures: Failures | None = None
) -> Image.Image:
    """Decode an image of which the header was read: upright, RGB."""
    with _reading(sample):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode not in ("RGB", "L") and failures is not None:
        failures.add("colour mode", sample["__key__"])
    return _to_rgb(image)


def _reduce(image: Image.Image, needed: Sequence[tuple[float, float] | None], turned: bool) -> None:
    """Let a JPEG be decoded at the smallest scale at which all of its boxes have enough pixels."""
    scales = [scale for scale in needed if scale is not None]
    if len(scales) < len(needed):
        return
    across, down = (max(each) for each in zip(*scales, strict=True))
    if turned:
        across, down = down, across
    image.draft(None, (math.ceil(image.width * across), math.ceil(image.height * down)))


def _scaled(point: Sequence[int], across: float, down: float) -> tuple[int, int]:
    return round(point[0] * across), round(point[1] * down)


@contextlib.contextmanager
def _reading(sample: dict[str, Any]) -> Iterator[None]:
    """Whatever its bytes make a decoder raise concerns the sample."""
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SampleError("image too large", sample) from error
    except SampleError:
        raise
    except Exception as error:
        raise SampleError("broken image", sample) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
