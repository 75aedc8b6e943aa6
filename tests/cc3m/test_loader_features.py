"""Teacher features joined to images by key: the patch a target describes is the patch shown."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from examples.cc3m import extract_dinov3, recipe
from examples.cc3m.data import teacher
from examples.cc3m.data.batch import Batch
from examples.cc3m.data.features import FORMAT, FeatureFolder, FeatureReader
from examples.cc3m.data.inputs import open_features
from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.data.positions import Position
from examples.cc3m.settings import RunSettings, parse
from examples.cc3m.train import Run
from examples.common.files import UserError, write_json
from examples.common.images import CentreCrop, Crop, RandomCrop, cut_grid
from examples.common.parallel import Parallel
from examples.common.tiny import TINY_CLIP
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


def extracted(shards: list[str], resolution: int, monkeypatch: pytest.MonkeyPatch) -> FeatureReader:
    """Features that the extraction script itself wrote."""
    monkeypatch.setattr(teacher, "Dinov3Teacher", MeanColours)
    out = Path(shards[0]).parent / f"features{resolution}"
    command = [*shards, "--resolution", str(resolution), "--dim", "0", "--device", "cpu"]
    assert extract_dinov3.main([*command, "--out", str(out)]) == 0
    return FeatureReader(out, least_resolution=resolution)


@pytest.fixture
def reader(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> FeatureReader:
    return extracted(shards, SIDE, monkeypatch)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[-1])] for text in texts])


CROPS: dict[str, Crop] = {
    "centre": CentreCrop(SIDE),
    "random": RandomCrop(SIDE),
    "other resolution": RandomCrop(2 * SIDE),
}


def loader(
    shards: list[str],
    features: FeatureReader | None,
    crop: Crop = CROPS["random"],
    batch_size: int = 4,
    shuffle: int = 20,
    **options: Any,
) -> ShardLoader:
    return ShardLoader(
        shards, crop, tokenize, batch_size, shuffle=shuffle, features=features, **options
    )


def targets(batch: Batch) -> Tensor:
    assert batch.teacher is not None
    assert batch.teacher.patches.dtype == batch.teacher.cls.dtype == torch.float16
    assert len(batch.teacher.cls) == len(batch.images)
    return batch.teacher.patches.float()


def shown(batch: Batch, side: int = 3) -> Tensor:
    """(B, side^2, 3) mean colours of the patches of what the towers see."""
    return mean_colours(nn.functional.adaptive_avg_pool2d(batch.to("cpu").images, side * PATCH))


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("options", [{}, {"workers": 2}], ids=str)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_targets_are_of_the_patches_shown(
    shards: list[str], reader: FeatureReader, crop: Crop, options: dict[str, Any]
) -> None:
    """Colours say where in the image a patch is: neighbouring patches differ by 1.2."""
    assert reader.grid == (3, 3)
    data, seen = loader(shards, reader, crop, **options), set()
    for epoch in range(2):
        for batch in data.epoch(Position(epoch)):
            torch.testing.assert_close(targets(batch), shown(batch), atol=0.1, rtol=0)
            assert [int(key) for key in batch.keys] == batch.texts[:, 0].tolist()
            seen |= set(batch.keys)
    assert data.broken == 0
    assert len(seen) > 4


@pytest.mark.parametrize("grid", [(3, 3), (6, 6)], ids=str)
def test_finer_features_are_resampled_to_the_grid_asked_for(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int]
) -> None:
    fine = extracted(shards, 4 * SIDE, monkeypatch)
    assert (fine.grid, fine.grid_at(SIDE)) == ((12, 12), (3, 3))
    small = RandomCrop(2 * SIDE, scale=(0.2, 0.5))
    for batch in loader(shards, fine, small, grid=grid).epoch():
        assert targets(batch).shape == (4, grid[0] * grid[1], 3)
        torch.testing.assert_close(targets(batch), shown(batch, grid[0]), atol=0.15, rtol=0)


@pytest.mark.parametrize("target", [(7, 7), (14, 14), (4, 6)], ids=str)
def test_a_grid_of_positions_is_cut_to_those_of_the_box(target: tuple[int, int]) -> None:
    rows, columns = 28, 14
    y, x = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    positions = torch.stack([x, y], dim=2).flatten(0, 1)
    left, top, right, bottom = box = (0.2, 0.1, 0.9, 0.7)
    cut = cut_grid(positions, (rows, columns), box, target).view(*target, 2)
    y, x = ((torch.arange(n) + 0.5) / n for n in target)
    torch.testing.assert_close(cut[..., 0], (left + x * (right - left)).expand(target))
    torch.testing.assert_close(cut[..., 1], (top + y * (bottom - top))[:, None].expand(target))
    whole = cut_grid(positions, (rows, columns), (0, 0, 1, 1), (rows, columns))
    assert torch.equal(whole, positions)
    halved = cut_grid(positions, (rows, columns), (0, 0, 1, 1), (rows // 2, columns))
    means = positions.view(rows // 2, 2, columns, 2).mean(1).flatten(0, 1)
    torch.testing.assert_close(halved, means)


def test_all_recipes_see_the_same_crops_in_the_same_order(
    shards: list[str], reader: FeatureReader
) -> None:
    """With a teacher's features or none, with several views and captions or one."""
    plain = list(loader(shards, None).epoch(Position(1)))
    assert all(batch.teacher is None for batch in plain)
    distilled = loader(shards, reader).epoch(Position(1))
    several = loader(shards, None, views=2, captions=("txt", "txt")).epoch(Position(1))
    for one, two, three in zip(plain, distilled, several, strict=True):
        assert one.keys == two.keys == three.keys
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.images, three.images[:, 0])
        assert torch.equal(one.texts[:, None].expand(-1, 2, -1), three.texts)
        assert not torch.equal(three.images[:, 0], three.images[:, 1])
    with pytest.raises(ValueError, match="one view of an image, got 2 views"):
        loader(shards, reader, views=2)


def test_the_script_gives_every_recipe_the_same_images(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in shards:
        Path(shard.replace(".tar", "_stats.json")).write_text(f'{{"successes": {PER_SHARD}}}')
    monkeypatch.setattr(recipe, "SMALL_CLIP", TINY_CLIP)  # of 32 pixels
    fine = extracted(shards, 4 * SIDE, monkeypatch)
    shown = {}
    for name in ("clip", "dinorankclip"):
        command = ["--data", str(Path(shards[0]).parent / "{00000..00001}.tar"), "--recipe", name]
        command += ["--model", "tiny", "--workers", "0", "--out", str(tmp_path / name)]
        command += ["--features", str(fine.folder.path), "--train.batch-size", "4"]
        with Run(parse(command), Parallel()) as run:
            shown[name] = list(run.loader.epoch(Position(1)))
    for plain, distilled in zip(shown["clip"], shown["dinorankclip"], strict=True):
        assert torch.equal(plain.images, distilled.images)
        assert plain.keys == distilled.keys
        assert plain.teacher is None
        assert targets(distilled).shape == (4, 2 * 2, 3)  # 32 pixels are two patches
    assert run.loader.crop == RandomCrop(32)


def test_features_that_do_not_fit_are_refused(shards: list[str], reader: FeatureReader) -> None:
    folder = reader.folder.path
    with pytest.raises(UserError, match="at 48 pixels, fewer than the 64 that the recipe needs"):
        FeatureReader(folder, least_resolution=64)
    settings = RunSettings(features=folder)
    assert open_features(settings, recipe.load_recipe("image_only"), TINY_CLIP) is not None
    with pytest.raises(UserError, match="at 48 pixels, fewer than the 64 that the recipe needs"):
        open_features(settings, recipe.load_recipe("dinorankclip"), TINY_CLIP)  # twice 32 pixels
    write_json(folder / "manifest.json", {**reader.manifest, "format": 1})
    with pytest.raises(UserError, match="older format, which shows the centre"):
        FeatureReader(folder)


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
    manifest = {"format": FORMAT, "grid": [3, 3], "resolution": SIDE, "dtype": "float16"}
    made_by = folder.claim(manifest)
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
