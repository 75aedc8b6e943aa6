"""Small image-text shards for tests, in img2dataset's layout."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from examples.common.images import Pixels

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "grey": (99,) * 3}


@dataclass(frozen=True)
class Whole:
    """A crop that shows all of an image, by a function: RGB image -> (3, H, W)."""

    function: Callable[[Image.Image], Tensor]

    def box(self, width: int, height: int) -> Pixels:
        return 0, 0, width, height

    def needed(self, box: Pixels) -> None:
        return None

    def show(self, image: Image.Image, box: Pixels) -> Tensor:
        return self.function(image)


def write_pairs(folder: Path, counts: list[int], size: int = 32, *, stats: bool = True) -> str:
    """Write a shard of so many pictures of one colour each, with captions; return their spec."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in range(count):
                word = rng.choice(list(COLOURS))
                caption = f"a {word} picture, number {number * 100 + i}"
                for suffix, data in (("jpg", jpeg(word, size)), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        if stats:
            text = json.dumps({"count": count, "successes": count})
            (folder / f"{number:05d}_stats.json").write_text(text)
    return str(folder / f"{{00000..{len(counts) - 1:05d}}}.tar")


def write_classes(folder: Path, size: int = 32, each: int = 3) -> str:
    """Write a folder of images for each colour; return it."""
    for word in COLOURS:
        (folder / word).mkdir(parents=True)
        for i in range(each):
            (folder / word / f"{i}.jpg").write_bytes(jpeg(word, size))
    return str(folder)


def jpeg(word: str, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[word]).save(buffer, "JPEG")
    return buffer.getvalue()
