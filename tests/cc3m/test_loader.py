"""Batches from shards: their order, where they resume, and what they leave out."""

import io
import json
import logging
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.cc3m.data.batch import Batch
from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.data.positions import Position
from examples.common.files import UserError
from examples.common.shards import count_samples, expand_shards
from tests.helpers.shards import Whole

PER_SHARD, SHARDS = 8, 3


def transform(image: Image.Image) -> Tensor:
    """(3, H, W) of the colour of one pixel, plus noise: what augmentation would do."""
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    noise = torch.rand(()) + random.random()
    return (torch.tensor([red, green, blue]) + noise).view(3, 1, 1).expand(3, 2, 2).float()


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text.split()[-1]) if text else 0] for text in texts])


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def write_shard(path: Path, first: int, spoil: Callable[[int], str] = lambda i: "") -> None:
    """Samples first .. first + 7; spoil(i) names what is wrong with sample i."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + PER_SHARD):
            image = b"not a picture" if spoil(i) == "image" else jpeg(i)
            add(tar, f"{i:09d}.jpg", image[:100] if spoil(i) == "cut" else image)
            if spoil(i) != "no text":
                add(tar, f"{i:09d}.txt", b"\xff\xfe" if spoil(i) == "bytes" else f"no {i}".encode())
            add(tar, f"{i:09d}.json", json.dumps({"number": i}).encode())
    stats = {"count": PER_SHARD, "successes": PER_SHARD}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for i in range(SHARDS):
        write_shard(tmp_path / f"{i:05d}.tar", i * PER_SHARD)
    return str(tmp_path / f"{{00000..{SHARDS - 1:05d}}}.tar")


def loader(shards: str | list[str], batch_size: int = 4, **options: object) -> ShardLoader:
    return ShardLoader(shards, Whole(transform), tokenize, batch_size, **options)  # type: ignore[arg-type]


def numbers(batches: list[Batch]) -> list[int]:
    return [int(x) for batch in batches for x in batch.texts[:, 0]]


def test_a_spec_names_every_shard_and_missing_ones_are_an_error(shards: str) -> None:
    assert [Path(x).name for x in expand_shards(shards)] == ["00000.tar", "00001.tar", "00002.tar"]
    assert expand_shards([shards, shards]) == expand_shards(shards) * 2
    with pytest.raises(ValueError, match=r"1 of 4 shards.*00003"):
        expand_shards(shards.replace("00002}", "00003}"))


def test_samples_are_counted_from_stats(shards: str) -> None:
    paths = expand_shards(shards)
    assert count_samples(paths) == PER_SHARD * SHARDS
    Path(paths[1].replace(".tar", "_stats.json")).unlink()
    with pytest.raises(ValueError, match=r"00001_stats\.json is missing"):
        count_samples(paths)


def test_without_shuffling_the_order_is_the_files_and_the_rest_is_kept(shards: str) -> None:
    batches = list(loader(shards, 5).epoch())
    assert numbers(batches) == list(range(24))
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 5, 4]
    assert batches[0].images.shape == (5, 3, 2, 2)


def test_order_and_augmentation_are_functions_of_seed_and_epoch(shards: str) -> None:
    def run(seed: int, epoch: int) -> tuple[list[int], Tensor]:
        batches = list(loader(shards, shuffle=100, seed=seed).epoch(Position(epoch)))
        return numbers(batches), torch.cat([batch.images for batch in batches])

    order, images = run(0, 1)
    again, same = run(0, 1)
    assert sorted(order) == list(range(24)) != order
    assert again == order
    assert torch.equal(images, same)
    assert run(1, 1)[0] != order
    assert run(0, 2)[0] != order
    shares = {str(loader(shards, shuffle=1).order.share(Position(i), 0, 1)) for i in range(6)}
    assert len(shares) > 1  # of whole shards too
    noise = dict(zip(order, images[:, 0, 0, 0].tolist(), strict=True))
    for seed, epoch in ((1, 1), (0, 2)):  # the same sample is augmented in another way
        found, pixels = run(seed, epoch)
        others = dict(zip(found, pixels[:, 0, 0, 0].tolist(), strict=True))
        assert all(others[number] != value for number, value in noise.items())


def test_reading_leaves_the_global_generators_alone(shards: str) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    list(loader(shards, shuffle=10).epoch())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def assert_resumes(data: Callable[[], ShardLoader]) -> None:
    """From the position after any batch, a new loader gives the batches that follow."""
    whole = list(data().epoch(Position(2)))
    position = Position(2)
    for done, batch in enumerate(whole, 1):
        position = position.after(batch, data().streams)
        rest = list(data().epoch(position))
        assert numbers(rest) == numbers(whole[done:])
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[done:], strict=True))


def test_resumes_after_any_batch(shards: str) -> None:
    assert_resumes(lambda: loader(shards, shuffle=10))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_resumes_after_any_batch_with_workers_of_unequal_length(shards: str) -> None:
    assert_resumes(lambda: loader(shards, shuffle=10, workers=2))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_ranks_share_the_samples(shards: str) -> None:
    two = list(loader(shards, shuffle=10, workers=2).epoch())
    assert sorted(numbers(two)) == list(range(24))
    ranks = [list(loader(shards, shuffle=10, rank=r, world_size=3).epoch()) for r in range(3)]
    assert sorted(x for batches in ranks for x in numbers(batches)) == list(range(24))
    places = {tuple(x % PER_SHARD for x in numbers(batches)) for batches in ranks}
    assert len(places) == 3  # each shuffles its own shard in its own way


def test_too_many_streams_are_refused(shards: str) -> None:
    with pytest.raises(ValueError, match="3 shards cannot feed 2 processes of 2 workers"):
        loader(shards, workers=2, world_size=2)
    with pytest.raises(ValueError, match="a view and a caption at least, got 0"):
        loader(shards, views=0)


KINDS = {
    "image": "broken image",
    "cut": "broken image",
    "no text": "no caption",
    "bytes": "broken caption",
}


@pytest.mark.parametrize("fault", KINDS)
def test_broken_samples_are_left_out_and_counted(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, 0, lambda i: fault if i in (2, 5) else "")
    data = loader([str(path)], 2)
    assert numbers(list(data.epoch())) == [0, 1, 3, 4, 6, 7]
    assert (data.broken, data.read) == (2, 8)
    assert KINDS[fault] in caplog.text
    assert data.faults == {KINDS[fault]: 2}


def test_broken_samples_do_not_disturb_resuming(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, 0, lambda i: "image" if i in (1, 4) else "")
    assert_resumes(lambda: loader([str(path)], 2, shuffle=5))


def test_too_many_broken_samples_stop_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.cc3m.data.loader.FREE_FAILURES", 1)
    path = tmp_path / "00000.tar"
    write_shard(path, 0, lambda i: "image" if i in (2, 4, 5) else "")
    with pytest.raises(UserError, match=r"3 of 7 samples .*\(3 broken image\).*max_broken"):
        list(loader([str(path)], 1).epoch())
    assert len(list(loader([str(path)], 1, max_broken=0.5).epoch())) == 5


def test_shards_without_a_whole_batch_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, 0, lambda i: "image")
    with pytest.raises(UserError, match="fewer readable samples than one batch"):
        list(loader([str(path)]).epoch())


def test_a_cut_tar_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 - len(whole) // 2 % 512 + 100])
    with caplog.at_level(logging.WARNING):
        found = numbers(list(loader([str(path)], 1).epoch()))
    assert found == list(range(len(found)))
    assert len(found) < PER_SHARD
    assert "their stats promise 8" in caplog.text


def test_keys_are_never_paths(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../evil.jpg", jpeg(1))
        add(tar, "../../evil.txt", b"\x1b[31m 1")
    assert numbers(list(loader([str(path)], 1).epoch())) == [1]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["00000.tar"]


def test_shared_memory_is_what_the_batches_take(shards: str) -> None:
    options: dict[str, Any] = {"views": 2, "captions": ("txt", "txt", "txt")}
    assert loader(shards, **options).shared_memory() == 0
    batch = next(loader(shards, **options).epoch())
    assert batch.images.shape == (4, 2, 3, 2, 2)
    assert batch.texts.shape == (4, 3, 1)
    size = sum(tensor.nbytes for tensor in batch.tensors())
    assert loader(shards, workers=3, prefetch=5, **options).shared_memory() == (3 * 5 + 2) * size
