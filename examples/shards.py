"""Samples of webdataset shards in img2dataset's layout: finding, counting and reading them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

LOG = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """'data/{00000..00331}.tar', or a list of such, as a list of paths.

    Raises:
        ValueError: no shards, or local ones that do not exist.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    shards = [path for one in specs for path in wds.shardlists.expand_urls(one)]
    missing = [path for path in shards if ":" not in path and not Path(path).exists()]
    if not shards or missing:
        example = f", for example {missing[0]}" if missing else ""
        raise ValueError(f"{len(missing)} of {len(shards)} shards of {spec!r} are missing{example}")
    return shards


def count_samples(shards: Sequence[str]) -> int:
    """Sum of "successes" in the _stats.json that img2dataset writes beside each shard.

    Raises:
        ValueError: a shard has none.
    """
    total = 0
    for shard in shards:
        stats = Path(shard.removesuffix(".tar") + "_stats.json")
        if not stats.exists():
            raise ValueError(f"{stats} is missing, so samples cannot be counted; give their number")
        total += int(json.loads(stats.read_text())["successes"])
    return total


def read_shard(shard: str, failures: Failures) -> Iterator[dict[str, Any]]:
    """Undecoded samples of a tar file, in its order: suffix -> bytes, and "__key__".

    The stages of wds.WebDataset, which leaves files open until they are garbage.
    """
    try:
        with wds.gopen(shard) as stream:
            sources = [{"url": shard, "stream": stream}]
            files = wds.tariterators.tar_file_expander(sources, handler=failures.handle)
            yield from wds.tariterators.group_by_keys(files, handler=failures.handle)
    except OSError as error:
        failures.handle(error)


def decode(sample: dict[str, Any]) -> tuple[Image.Image, str]:
    """RGB image and caption.

    Raises:
        Exception: whatever its bytes provoke.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None or "txt" not in sample:
        raise ValueError(f"sample {sample['__key__']!r} lacks an image or a caption")
    image = Image.open(io.BytesIO(sample[suffix])).convert("RGB")
    return image, sample["txt"].decode("utf-8")


class Failures:
    """Counts what could not be read, in tar files and in samples; logs the first."""

    def __init__(self) -> None:
        self.count = 0
        self._logged = False

    def handle(self, error: Exception) -> bool:
        """A webdataset handler: count, and go on."""
        self.count += 1
        if not self._logged:
            LOG.warning("left out an unreadable sample (further ones are counted): %r", error)
        self._logged = True
        return True

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Whatever a sample's bytes make PIL, JSON or the transform raise concerns that sample."""
        try:
            yield
        except Exception as error:
            self.handle(error)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count
