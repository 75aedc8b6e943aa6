"""Scenes as small pictures, drawn with PIL."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from examples.demo.scenes import Scene, Thing

INKS = {
    "red": (225, 45, 45),
    "yellow": (245, 225, 50),
    "green": (45, 170, 70),
    "cyan": (60, 205, 215),
    "blue": (50, 85, 225),
    "purple": (140, 60, 185),
}
RADII = {"small": 0.135, "large": 0.215}
"""As a share of the image's width; a cell is half the image wide."""
SUPERSAMPLE = 8


def draw(scene: Scene, rng: random.Random, image_size: int) -> Image.Image:
    """Draw a scene, (image_size, image_size) RGB.

    Things that the caption never tells vary too: background, position within the cell, shade, and a
    little of the size.
    """
    base = rng.choice((rng.randrange(25, 70), rng.randrange(190, 240)))
    paper = tuple(base + rng.randrange(-12, 13) for _ in range(3))
    image = Image.new("RGB", (image_size, image_size), paper)
    for thing in scene.things:
        _paste(image, thing, rng)
    return image


def _paste(image: Image.Image, thing: Thing, rng: random.Random) -> None:
    cell = image.width / 2
    radius = max(2, round(RADII[thing.size] * image.width * rng.uniform(0.9, 1.1)))
    slack = max(0, int(cell / 2 - radius - 1))
    x, y = (
        round(cell * (place + 0.5)) + rng.randint(-slack, slack) // 2 - radius
        for place in thing.cell
    )
    ink = tuple(max(0, min(255, value + rng.randrange(-14, 15))) for value in INKS[thing.colour])
    shade = tuple(round(value * 0.5) for value in ink)
    shape = shape_mask(thing.shape, radius)
    pattern = texture_mask(thing.texture, radius)
    image.paste(ink, (x, y), shape)
    image.paste(shade, (x, y), ImageChops.multiply(shape, pattern))


@functools.cache
def shape_mask(shape: str, radius: int) -> Image.Image:
    """Antialiased outline, (2 radius, 2 radius) 8-bit grey."""
    width = 2 * radius * SUPERSAMPLE
    mask = Image.new("L", (width, width), 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, width - 1, width - 1), fill=255)
    if shape == "ring":
        hole = 0.27 * width
        pen.ellipse((hole, hole, width - hole, width - hole), fill=0)
    if shape in _OUTLINES:
        points = [((x + 1) * width / 2, (y + 1) * width / 2) for x, y in _OUTLINES[shape]]
        pen.polygon(points, fill=255)
    return mask.resize((2 * radius, 2 * radius), Image.Resampling.BOX)


@functools.cache
def texture_mask(texture: str, radius: int) -> Image.Image:
    """The dark shade's pixels, (2 radius, 2 radius) 8-bit grey; periods are in pixels."""
    y, x = np.indices((2 * radius, 2 * radius))
    dark = {
        "plain": np.zeros_like(x, bool),
        "striped": y % 4 >= 2,
        "checkered": (x // 4 + y // 4) % 2 == 1,
        "dotted": np.isin(x % 4, (1, 2)) & np.isin(y % 4, (1, 2)),
    }[texture]
    return Image.fromarray((255 * dark).astype(np.uint8))


def _star() -> list[tuple[float, float]]:
    spokes = [(1.0 if i % 2 == 0 else 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in spokes]


_ARM = 0.34
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "star": _star(),
}  # fmt: skip
"""Corners in [-1, 1], y downwards."""
