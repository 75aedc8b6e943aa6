"""Teacher features in shards beside the image shards, and how a training loader finds them by key.

<folder of the images>/features/manifest.json      what made them: model, weights, size, PCA
<folder of the images>/features/pca.safetensors    the projection, unless there is none
<folder of the images>/features/00000.tar          of the images' 00000.tar, same order and keys:
    000000000.cls.npy, 000000000.patches.npy, ...  (D,) float16, and (h w, dim); with
    000000000.scale.npy                            (h w,) float16 where patches have one byte each
<folder of the images>/features/00000_stats.json   how many, and from what
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import tarfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from examples.cc3m.data.quantised import CLS, Array, pack, suffixes, to_half, to_npy, unpack
from examples.common.files import UserError, read_json, write_atomically, write_json

FORMAT = 2
"""Raise it whenever features of the same settings change."""
MANIFEST = "manifest.json"
OPEN_SHARDS = 8
"""Shards that a reader keeps open."""


class Features(NamedTuple):
    """Features of one image, or of a batch with one more dimension in front; float16.

    Attributes:
        patches: (h w, dim) projected patch tokens, in row-major order of the manifest's grid.
        cls: (D,), not projected.
    """

    patches: Tensor
    cls: Tensor


@dataclass(frozen=True)
class FeatureFolder:
    """Folder with the features of a set of image shards."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def pca(self) -> Path:
        return self.path / "pca.safetensors"

    def shard(self, images: str) -> Path:
        return self.path / Path(images).name

    def stats(self, images: str) -> Path:
        """In img2dataset's layout, so that `count_samples` counts these shards too."""
        return self.path / (Path(images).name.removesuffix(".tar") + "_stats.json")

    def claim(self, manifest: dict[str, Any]) -> str:
        """Write the manifest, or check the one that is there; its hash.

        Raises:
            UserError: there are features that something else made.
        """
        if not self.manifest.exists():
            write_json(self.manifest, manifest)
        there = read_json(self.manifest)
        wanted = json.loads(json.dumps(manifest))
        if there != wanted:
            changed = ", ".join(k for k in wanted if there.get(k) != wanted[k])
            raise UserError(
                f"{self.manifest} describes other features (different {changed}); choose another "
                f"--out, or remove {self.path} to start over"
            )
        return manifest_hash(there)

    def is_done(self, images: str, made_by: str) -> bool:
        """Say if the features of an image shard are there.

        Raises:
            UserError: something else made them, or the image shard has changed since.
        """
        if not (self.shard(images).exists() and self.stats(images).exists()):
            return False
        stats = read_json(self.stats(images))
        changed = ["other settings made it"] * (stats["manifest"] != made_by)
        changed += ["the images have changed"] * (stats["source"] != source_id(images))
        if changed:
            raise UserError(
                f"{self.shard(images)} does not belong here ({', '.join(changed)}); remove it and "
                "run examples.cc3m.extract_dinov3 to make it anew"
            )
        return True

    def write(
        self, images: str, rows: Iterable[tuple[str, Tensor, Tensor]], made_by: str
    ) -> dict[str, Any]:
        """Write the features of one image shard, atomically, as the manifest says; its stats.

        Args:
            images: the image shard.
            rows: key, patches (h w, dim) and cls (D,) of each image.
            made_by: the manifest's hash.

        Raises:
            UserError: as `quantised.pack`.
        """
        count, dtype = 0, read_json(self.manifest)["dtype"]

        def write(temporary: Path) -> None:
            nonlocal count
            with (
                open(temporary, "wb") as file,
                # no times and no users: the same features are the same bytes
                wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
            ):
                for key, patches, cls in rows:
                    arrays = pack(patches, dtype) | {CLS: to_half(cls).numpy()}
                    tar.write({"__key__": key, **{k: to_npy(x) for k, x in arrays.items()}})
                    count += 1

        write_atomically(self.shard(images), write)
        return {"successes": count, "source": source_id(images), "manifest": made_by}


class FeatureReader:
    """Features by image shard and key, from anywhere in a shard, in any process.

    A training loader looks up `reader.of(sample)` for a sample of `read_shard`, after shuffling.
    Features are those of the whole image: what is cropped from it is cut from their grid by
    `examples.common.images.cut_grid`.

    Args:
        directory: a folder of features.
        least_resolution: pixels that the teacher saw of an image's side, at least: the model's, or
            as many times more as the recipe says.

    Raises:
        UserError: there are none, or of smaller images.
    """

    def __init__(self, directory: Path, *, least_resolution: int = 0) -> None:
        self.folder = FeatureFolder(directory)
        if not self.folder.manifest.exists():
            raise UserError(f"{directory} has no {MANIFEST}; run examples.cc3m.extract_dinov3")
        self.manifest: dict[str, Any] = read_json(self.folder.manifest)
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"features in {directory} are of an older format, which shows the centre of images "
                "only; run examples.cc3m.extract_dinov3 with --fresh"
            )
        if self.manifest["resolution"] < least_resolution:
            raise UserError(
                f"features in {directory} are of images at {self.manifest['resolution']} pixels, "
                f"fewer than the {least_resolution} that the recipe needs for this model; extract "
                f"them with --resolution {least_resolution} or more"
            )
        self.grid: tuple[int, int] = tuple(self.manifest["grid"])
        self._open: OrderedDict[str, _Shard] = OrderedDict()

    def grid_at(self, size: int) -> tuple[int, int]:
        """Return the teacher's grid of an image of size x size pixels."""
        side = max(1, size // self.manifest["patch_size"])
        return side, side

    def nbytes(self, grid: tuple[int, int]) -> int:
        """Return the bytes of an image's features, of which patches fill such a grid."""
        numbers = grid[0] * grid[1] * int(self.manifest["dim"]) + int(self.manifest["cls_dim"])
        return numbers * torch.float16.itemsize

    def of(self, sample: dict[str, Any]) -> Features:
        """Features of a webdataset sample, which knows its shard and key.

        Raises:
            KeyError: there are none, because the image could not be read.
            UserError: the shard's features are missing.
        """
        shard, key = self._shard(sample["__url__"]), sample["__key__"]
        dtype = self.manifest["dtype"]
        arrays = {suffix: shard.read(f"{key}.{suffix}") for suffix in suffixes(dtype)}
        return Features(unpack(arrays, dtype), torch.from_numpy(arrays[CLS]))

    def _shard(self, images: str) -> _Shard:
        if images not in self._open:
            self.check([images])
            self._open[images] = _Shard(self.folder.shard(images))
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(images)
        return self._open[images]

    def check(self, images: Iterable[str]) -> None:
        """See whether all of these image shards have features, made from just these images.

        Raises:
            UserError: one is not a local file or has none, or they were made otherwise, or from
                other images.
        """
        made_by = manifest_hash(self.manifest)
        for shard in images:
            if not Path(shard).exists():
                raise UserError(f"features belong to local image shards, but {shard} is not there")
            if not self.folder.is_done(shard, made_by):
                raise UserError(
                    f"{self.folder.path} has no features of {shard}; examples.cc3m.extract_dinov3 "
                    "makes those that are missing"
                )

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: open files stay behind."""
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """A tar file in memory's address space, and where its members begin; safe after a fork."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path, "r:") as tar:
            self.members = {m.name: (m.offset_data, m.size) for m in tar}
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> Array:
        offset, size = self.members[name]
        array: Array = np.lib.format.read_array(
            io.BytesIO(self.data[offset : offset + size]), allow_pickle=False
        )
        return array


def manifest_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_id(path: str, end: int = 1 << 16) -> str:
    """Tells a file from another without reading it all: from its size and both its ends."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        sha = hashlib.sha256(f"{size}\n".encode() + file.read(end))
        file.seek(max(0, size - end))
        sha.update(file.read())
    return sha.hexdigest()
