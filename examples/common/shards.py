"""Samples of webdataset shards in img2dataset's layout: finding, counting and reading them."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds

from examples.common.files import UserError

LOG = logging.getLogger(__name__)
MOST_BYTES = 1 << 26
"""Bytes of a file in a tar."""
REPAIRED = frozenset({"colour mode", "file too large"})
"""Kinds of faults that cost no sample by themselves."""


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """'data/{00000..00331}.tar', or a list of such, as a list of paths.

    Raises:
        UserError: no shards, or local ones that do not exist.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    shards = [path for one in specs for path in wds.shardlists.expand_urls(one)]
    missing = [path for path in shards if ":" not in path and not Path(path).exists()]
    if not shards or missing:
        example = f", for example {missing[0]}" if missing else ""
        raise UserError(f"{len(missing)} of {len(shards)} shards of {spec!r} are missing{example}")
    return shards


def count_samples(shards: Sequence[str]) -> int:
    """Sum of "successes" in the _stats.json that img2dataset writes beside each shard.

    Raises:
        UserError: a shard has none.
    """
    total = 0
    for shard in shards:
        stats = Path(re.sub(r"\.tar(\.\w+)?$", "", shard) + "_stats.json")
        if not stats.exists():
            raise UserError(f"{stats} is missing, so samples cannot be counted; give their number")
        total += int(json.loads(stats.read_text())["successes"])
    return total


def read_shard(shard: str, failures: Failures) -> Iterator[dict[str, Any]]:
    """Yield undecoded samples of a tar file, in its order: suffix -> bytes, "__key__", "__url__".

    A key is all of a file's name before its last dot. Of samples with the same key the first is
    given. A tar that was cut off gives the samples before the cut; each that its stats promise and
    it lacks is counted. A compressed tar (.tar.gz) is read like any other.
    """
    given, seen, errors = 0, set[str](), list[Exception]()
    for sample in _grouped(_members(shard, failures, errors), failures):
        key = sample["__key__"]
        if key in seen:
            failures.add("duplicate key", key)
            continue
        seen.add(key)
        given += 1
        yield {**sample, "__url__": shard}
    if errors or _lacks_end(shard):
        failures.add("truncated tar", shard, max(1, _promised(shard) - given))


def _members(
    shard: str, failures: Failures, errors: list[Exception]
) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, suffix and bytes of each file that can belong to a sample; note what ended it."""
    try:
        with wds.gopen(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else all of them are kept
                stem, _, suffix = member.name.rpartition(".")
                if not member.isfile() or not stem or "/" in suffix:
                    continue
                if member.size > MOST_BYTES:  # known before anything is allocated
                    failures.add("file too large", member.name)
                    continue
                file = tar.extractfile(member)
                if file is not None:
                    yield stem, suffix.lower(), file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        errors.append(error)


def _grouped(
    files: Iterator[tuple[str, str, bytes]], failures: Failures
) -> Iterator[dict[str, Any]]:
    """Join neighbouring files of one key; of files with the same name the first counts."""
    for key, group in itertools.groupby(files, key=lambda file: file[0]):
        sample: dict[str, Any] = {"__key__": key}
        repeated = False
        for _, suffix, data in group:
            repeated |= suffix in sample
            sample.setdefault(suffix, data)
        if repeated:
            failures.add("duplicate key", key)
        yield sample


def _lacks_end(shard: str) -> bool:
    """Say if a local tar does not end in the two empty blocks that every whole one ends in."""
    if not shard.endswith(".tar"):
        return False  # a compressed one has its own end mark
    if not os.path.exists(shard) or os.path.getsize(shard) < 1024:
        return os.path.exists(shard)
    with open(shard, "rb") as file:
        file.seek(-1024, os.SEEK_END)
        return any(file.read())


def _promised(shard: str) -> int:
    """Samples that a shard should have, 0 if nothing says so."""
    try:
        return count_samples([shard])
    except UserError:
        return 0


def decode_caption(sample: dict[str, Any], source: str = "txt") -> str:
    """Return a caption of a sample.

    Args:
        sample: one that `read_shard` gave.
        source: "txt", the sample's text; or "json" and the names and places that lead to the
            caption in the sample's record, e.g. "json.synthetic" or "json.captions.0". Of a list
            one is drawn, by Python's generator.

    Raises:
        SampleError: there is none, or it is empty or no text.
    """
    suffix, *path = source.split(".")
    if suffix not in sample:
        raise SampleError("no caption", sample)
    try:
        text: Any = sample[suffix].decode("utf-8")
        text = _found(json.loads(text), path) if path else text
    except (KeyError, IndexError) as error:
        raise SampleError("no caption", sample) from error
    except (ValueError, TypeError) as error:  # no UTF-8, no JSON, or something else than a record
        raise SampleError("broken caption", sample) from error
    if not isinstance(text, str):
        raise SampleError("no caption" if text is None else "broken caption", sample)
    if not text.strip():
        raise SampleError("empty caption", sample)
    return text


def _found(record: Any, path: Sequence[str]) -> Any:
    """Follow names and places into a record, and draw one of a list at the end."""
    for name in path:
        record = record[int(name)] if isinstance(record, list) else record[name]
    return random.choice(record) if isinstance(record, list) else record


class SampleError(ValueError):
    """A sample that cannot be used, and the kind of fault."""

    def __init__(self, kind: str, sample: dict[str, Any]) -> None:
        super().__init__(f"sample {sample['__key__']!r}: {kind}")
        self.kind, self.key = kind, str(sample["__key__"])


class Failures:
    """Counts what is wrong with tar files and samples, by kind; logs the first of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: set[str] = set()

    @property
    def count(self) -> int:
        """Samples that could not be used."""
        return unusable(self.counts)

    def add(self, kind: str, where: str, count: int = 1) -> None:
        self.counts[kind] += count
        if kind not in self._logged:
            LOG.warning("%s: %r (further ones are counted)", kind, where)
        self._logged.add(kind)

    def handle(self, error: Exception) -> bool:
        """A webdataset handler: count, and go on."""
        if isinstance(error, SampleError):
            self.add(error.kind, error.key)
        else:
            self.add("unreadable sample", str(error))
        return True

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Whatever a sample's bytes make PIL, JSON or the transform raise concerns that sample."""
        try:
            yield
        except Exception as error:
            self.handle(error)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        taken, self.counts = dict(self.counts), Counter()
        return taken


def unusable(counts: dict[str, int]) -> int:
    """Number of these faults that cost a sample."""
    return sum(count for kind, count in counts.items() if kind not in REPAIRED)
