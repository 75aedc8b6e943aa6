"""Teacher features joined to images by key: the patch a target describes is the patch shown."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from examples.cc3m import extract_dinov3
from examples.cc3m.features import FeatureFolder, FeatureReader
from examples.cc3m.loader import Batch, Position, ShardLoader
from examples.common.files import UserError, write_json
from rankloss.fusion import TeacherFeatures

PATCH, SIDE, PER_SHARD, SHARDS = 16, 48, 6, 2


class MeanColours(nn.Module):
    """Stands for DINOv3: a patch's feature is its mean colour, as CLIP's transform shows it."""

    dim, patch_size = 3, PATCH
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> TeacherFeatures:
        means = mean_colours(images)
        side = images.shape[2] // PATCH
        return TeacherFeatures(means, means.mean(1), (side, images.shape[3] // PATCH))

    def weights_hash(self) -> str:
        return "none"


def mean_colours(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, h w, 3), patches in row-major order."""
    return avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)


def picture(number: int) -> bytes:
    """Not square, and no two places look alike: colours encode x, y and the number."""
    height, width = 60 + number, 90 - number
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, np.full_like(x, number / 12)], axis=2) * 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + PER_SHARD):
            for suffix, data in (("png", picture(i)), ("txt", f"no {i}".encode())):
                entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i:05d}.tar" for i in range(SHARDS)]
    for i, path in enumerate(paths):
        write_shard(path, i * PER_SHARD)
    return [str(path) for path in paths]


@pytest.fixture
def reader(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> FeatureReader:
    """Features that the extraction script itself wrote."""
    monkeypatch.setattr(extract_dinov3, "Dinov3Teacher", MeanColours)
    command = [*shards, "--resolution", str(SIDE), "--dim", "0", "--device", "cpu"]
    assert extract_dinov3.main(command) == 0
    return FeatureReader(Path(shards[0]).parent / "features", resolution=SIDE)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[-1])] for text in texts])


def transform(side: int = SIDE, *, train: bool = False) -> Callable[[Image.Image], Tensor]:
    made: Callable[[Image.Image], Tensor] = open_clip.image_transform(side, is_train=train)
    return made


def loader(
    shards: list[str],
    features: FeatureReader | None,
    shown: Callable[[Image.Image], Tensor] | None = None,
    batch_size: int = 4,
    shuffle: int = 20,
    **options: Any,
) -> ShardLoader:
    shown = shown or transform()
    return ShardLoader(
        shards, shown, tokenize, batch_size, shuffle=shuffle, features=features, **options
    )


def targets(batch: Batch) -> Tensor:
    assert batch.teacher is not None
    assert batch.teacher.patches.dtype == batch.teacher.cls.dtype == torch.float16
    assert len(batch.teacher.cls) == len(batch.images)
    return batch.teacher.patches.float()


@pytest.mark.parametrize("options", [{}, {"keep": True}, {"workers": 2}], ids=str)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_targets_are_of_the_patches_shown(
    shards: list[str], reader: FeatureReader, options: dict[str, Any]
) -> None:
    assert reader.grid == (3, 3)
    data, seen = loader(shards, reader, **options), set()
    for epoch in range(2):
        for batch in data.epoch(Position(epoch)):
            torch.testing.assert_close(
                targets(batch), mean_colours(batch.images), atol=2e-3, rtol=0
            )
            assert [int(key) for key in batch.keys] == batch.texts[:, 0].tolist()
            seen |= set(batch.keys)
    assert data.broken == 0
    assert len(seen) > 4


def test_towers_may_see_another_resolution_of_the_same_crop(
    shards: list[str], reader: FeatureReader
) -> None:
    for batch in loader(shards, reader, transform(2 * SIDE)).epoch():
        shown = mean_colours(nn.functional.avg_pool2d(batch.images, 2))
        # a crop starts at a whole pixel, of which there are 48; neighbouring patches differ by 1.2
        torch.testing.assert_close(targets(batch), shown, atol=0.1, rtol=0)


def test_after_a_random_crop_they_would_not_be(shards: list[str], reader: FeatureReader) -> None:
    torch.manual_seed(0)
    apart = [
        (targets(batch) - mean_colours(batch.images)).abs().amax()
        for batch in loader(shards, reader, transform(train=True)).epoch()
    ]
    assert min(apart) > 0.1


def test_without_features_batches_have_keys_only(shards: list[str]) -> None:
    batches = list(loader(shards, None).epoch())
    assert all(batch.teacher is None for batch in batches)
    assert [len(batch.keys) for batch in batches] == [4, 4, 4]


def test_resuming_gives_the_same_features(shards: list[str], reader: FeatureReader) -> None:
    whole = list(loader(shards, reader).epoch())
    rest = list(loader(shards, reader).epoch(Position().after(whole[0], 1)))
    for a, b in zip(whole[1:], rest, strict=True):
        assert a.keys == b.keys
        assert torch.equal(targets(a), targets(b))


def test_samples_without_features_are_counted_and_left_out(
    shards: list[str], tmp_path: Path
) -> None:
    folder = FeatureFolder(tmp_path / "some")
    made_by = folder.claim({"grid": [3, 3], "resolution": SIDE})
    for i, shard in enumerate(shards):
        numbers = [n for n in range(i * PER_SHARD, (i + 1) * PER_SHARD) if n not in (2, 7)]
        rows = [(f"{n:09d}", torch.full((9, 3), n).half(), torch.ones(3).half()) for n in numbers]
        write_json(folder.stats(shard), folder.write(shard, rows, made_by))
    data = loader(shards, FeatureReader(tmp_path / "some"), batch_size=1, shuffle=0)
    numbers = []
    for batch in data.epoch():
        assert (targets(batch) == batch.texts[:, :, None]).all()
        numbers += batch.texts[:, 0].tolist()
    assert numbers == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    assert (data.broken, data.read) == (2, SHARDS * PER_SHARD)


def test_a_shard_without_features_is_an_error_at_once(
    shards: list[str], reader: FeatureReader
) -> None:
    reader.folder.shard(shards[1]).unlink()
    with pytest.raises(UserError, match=r"no features of .*00001\.tar; .*extract_dinov3"):
        loader(shards, reader)
