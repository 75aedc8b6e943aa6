"""Views of images as open_clip makes them, JPEG decoded no larger than needed, and captions."""

import io
import json
import re
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import reading_speed
from examples.common.images import CentreCrop, Pixels, RandomCrop, View, normalise, views
from examples.common.shards import SampleError, decode_caption

SIDE = 56


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours that say where in the image they are, with some texture."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, 0.5 + 0.3 * np.sin(9 * x) * np.cos(7 * y)], axis=2) * 255
    return Image.fromarray(pixels.astype(np.uint8))


def sample(image: Image.Image, kind: str = "png", orientation: int = 1) -> dict[str, Any]:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, {"png": "PNG", "jpg": "JPEG"}[kind], exif=exif)
    return {"__key__": "a", kind: buffer.getvalue()}


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (56, 56), (40, 30)], ids=str)
def test_views_are_open_clips(size: tuple[int, int]) -> None:
    image = picture(*size)
    for train, crop in ((True, RandomCrop(SIDE)), (False, CentreCrop(SIDE))):
        torch.manual_seed(5)
        (view,) = views(sample(image), crop)
        torch.manual_seed(5)
        expected = open_clip.image_transform(SIDE, is_train=train)(image)
        assert view.pixels.dtype == torch.uint8
        if train:
            level = 1.01 / 255 / 0.26  # of 255, in the smallest of the standard deviations
            torch.testing.assert_close(normalise(view.pixels), expected, atol=level, rtol=0)
        else:
            assert torch.equal(normalise(view.pixels), expected)
    assert torch.equal(CentreCrop(SIDE)(image), expected)
    assert torch.equal(normalise(expected), expected)  # normalised before


class Noting(RandomCrop):
    """Notes the size of the image from which a view is made, and the box in it."""

    def show(self, image: Image.Image, box: Pixels) -> Tensor:
        noted.append((image.size, box))
        return super().show(image, box)


noted: list[tuple[tuple[int, int], Pixels]] = []


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.05, 0.3)], ids=str)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_fills_its_views(
    orientation: int, scale: tuple[float, float]
) -> None:
    image, crop = picture(700, 500), Noting(SIDE, scale=scale)
    for seed in range(3):
        noted.clear()
        shown = dict[str, list[View]]()
        for kind in ("png", "jpg"):
            torch.manual_seed(seed)
            shown[kind] = views(sample(image, kind, orientation), crop, 2)
        whole, reduced = noted[0][0], noted[2][0]
        assert whole == ((700, 500) if orientation == 1 else (500, 700))
        factor = round(whole[0] / reduced[0])
        assert reduced == tuple(-(-side // factor) for side in whole)
        sides = [side for _, box in noted[2:] for side in (box[2] - box[0], box[3] - box[1])]
        assert min(sides) >= SIDE - 1  # of a box rounded to whole pixels
        assert factor == 8 or min(sides) < 2 * SIDE + 2, "a smaller scale would have done"
        for png, jpg in zip(shown["png"], shown["jpg"], strict=True):
            assert png.box == jpg.box
            difference = (png.pixels.float() - jpg.pixels.float()).abs()
            assert difference.mean() < 3
    assert factor > 1 or scale[0] < 0.1


RECORD = {"raw": "a dog", "made": {"best": "the dog"}, "all": ["one", "two", "three"], "n": 3}


def test_captions_come_from_the_text_or_the_record() -> None:
    data = {"__key__": "a", "txt": b"words", "json": json.dumps(RECORD).encode()}
    assert decode_caption(data) == "words"
    assert decode_caption(data, "json.raw") == "a dog"
    assert decode_caption(data, "json.made.best") == "the dog"
    assert decode_caption(data, "json.all.1") == "two"
    assert {decode_caption(data, "json.all") for _ in range(50)} == {"one", "two", "three"}
    for source, kind in (
        ("json.none", "no caption"),
        ("json.all.3", "no caption"),
        ("json.n", "broken caption"),
        ("json.raw.deeper", "broken caption"),
        ("cls", "no caption"),
    ):
        with pytest.raises(SampleError, match=kind):
            decode_caption(data, source)


def test_the_speed_of_reading_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    samples = reading_speed.photographs(40, 3)
    assert reading_speed.ours(samples).shape == reading_speed.open_clips(samples).shape
    assert reading_speed.main(["--sides", "40", "--images", "2", "--turns", "1"]) == 0
    assert re.search(r"\| 40 \| \d+ \| \d+ \| [\d.]+ \|", capsys.readouterr().out)
