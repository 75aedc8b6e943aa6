"""Images that a CPU core reads in a second, beside open_clip's transform of the whole image.

    python -m benchmarks.reading_speed --sides 256 500 1024

Two photographs (scikit-learn's) as JPEG of quality 90, their shorter side as told, become a batch:
of float32 by open_clip's transform for training, and of uint8 as the script's loader makes it.
Both take turns; what is printed are medians of CPU time, and of the turns' ratios.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from examples.common.images import RandomCrop, decode_image, views

SIZE = 224
"""Pixels of a view's side."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 500, 1024])
    parser.add_argument("--images", type=int, default=32, help="images of a turn")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| shorter side | open_clip's transform | here | ratio |\n|---|---|---|---|")
    for side in options.sides:
        samples = photographs(side, options.images)
        before, now = zip(
            *((rate(open_clips, samples), rate(ours, samples)) for _ in range(options.turns)),
            strict=True,
        )
        ratio = statistics.median(b / a for a, b in zip(before, now, strict=True))
        rates = f"{statistics.median(before):.0f} | {statistics.median(now):.0f}"
        print(f"| {side} | {rates} | {ratio:.1f} |", flush=True)
    return 0


def photographs(side: int, count: int) -> list[dict[str, Any]]:
    """Return so many samples with a JPEG, two photographs in turns."""
    samples = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        scale, buffer = side / min(image.size), io.BytesIO()
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        image.save(buffer, "JPEG", quality=90)
        samples.append({"__key__": "a", "jpg": buffer.getvalue()})
    return [samples[i % len(samples)] for i in range(count)]


def open_clips(samples: list[dict[str, Any]]) -> Tensor:
    transform = open_clip.image_transform(SIZE, is_train=True)
    return torch.stack([transform(decode_image(sample)) for sample in samples])


def ours(samples: list[dict[str, Any]]) -> Tensor:
    crop = RandomCrop(SIZE)
    return torch.stack([views(sample, crop)[0].pixels for sample in samples])


def rate(make: Callable[[list[dict[str, Any]]], Tensor], samples: list[dict[str, Any]]) -> float:
    """Return images a second of CPU time."""
    started = time.process_time()
    make(samples)
    return len(samples) / max(time.process_time() - started, 1e-9)


if __name__ == "__main__":
    sys.exit(main())
