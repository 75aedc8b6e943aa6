"""Faults of real shards: every kind of fault is counted by its name, and survived."""

import gzip
import io
import json
import logging
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.cc3m.data.loader import ShardLoader
from examples.cc3m.data.positions import Position, ShardOrder
from examples.cc3m.monitor import peak_memory
from examples.common.files import UserError
from examples.common.images import MOST_PIXELS, decode_image
from examples.common.shards import (
    Failures,
    SampleError,
    count_samples,
    read_shard,
    unusable,
)
from tests.helpers.shards import Whole

FILES = list[tuple[str, bytes]]


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


GOOD = picture()


def sample(key: str, image: bytes = GOOD, text: bytes = b"words", suffix: str = "jpg") -> FILES:
    return [(f"{key}.{suffix}", image), (f"{key}.txt", text)]


def write_tar(path: Path, files: FILES, promised: int | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    if promised is not None:
        stats = path.with_name(path.name.replace(".tar", "_stats.json"))
        stats.write_text(json.dumps({"successes": promised}))
    return path


def keys_and_faults(path: Path) -> tuple[list[str], dict[str, int]]:
    failures = Failures()
    return [x["__key__"] for x in read_shard(str(path), failures)], failures.take()


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text)] for text in texts])


def loader(path: Path, **options: object) -> ShardLoader:
    def transform(image: Image.Image) -> Tensor:
        assert image.mode == "RGB"
        return torch.tensor(image.getpixel((0, 0))).float().view(3, 1, 1)

    return ShardLoader([str(path)], Whole(transform), tokenize, 1, **options)  # type: ignore[arg-type]


NOTHING = Whole(lambda _: torch.zeros(3, 1, 1))

# ---------------------------------------------------------------- samples

LOST: dict[str, tuple[FILES, str]] = {
    "cut jpg": (sample("b", GOOD[:-100]), "broken image"),
    "no jpg at all": (sample("b", b"<html>not found</html>"), "broken image"),
    "empty jpg": (sample("b", b""), "broken image"),
    "no image": ([("b.txt", b"words")], "no image"),
    "no caption": ([("b.jpg", GOOD)], "no caption"),
    "empty caption": (sample("b", text=b""), "empty caption"),
    "blank caption": (sample("b", text=b" \n\t"), "empty caption"),
    "caption in another encoding": (sample("b", text=b"\xff\xfe"), "broken caption"),
    "one pixel": (sample("b", picture(size=(1, 1))), "image too small"),
    "one pixel high": (sample("b", picture(size=(10_000, 1))), "image too small"),
}


@pytest.mark.parametrize(("files", "kind"), LOST.values(), ids=LOST)
def test_a_sample_is_left_out_and_counted_by_kind(
    tmp_path: Path, files: FILES, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *files, *sample("c")])
    data = loader(path)
    assert [batch.keys for batch in data.epoch()] == [["a"], ["c"]]
    assert data.faults == {kind: 1}
    assert (data.broken, data.read) == (1, 3)
    assert kind in caplog.text


def big(size: tuple[int, int]) -> bytes:
    """A PNG of one grey: large to decode, small to keep."""
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_ten_thousand_pixels_squared_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "PIL.PngImagePlugin.PngImageFile.load", lambda self: decoded.append(self.size)
    )
    header = big((10_000, 20))
    huge = bytearray(header)
    huge[20:24] = (10_000).to_bytes(4, "big")  # the height that its header claims
    huge[29:33] = zlib_crc(bytes(huge[12:29]))
    with pytest.raises(SampleError, match="image too large"):
        decode_image({"__key__": "b", "png": bytes(huge)})
    assert decoded == []
    assert MOST_PIXELS < 10_000 * 10_000


def zlib_crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def test_ten_thousand_pixels_in_one_direction_are_used() -> None:
    image = decode_image({"__key__": "b", "png": big((10_000, 20))})
    assert (image.size, image.mode) == ((10_000, 20), "RGB")


# ---------------------------------------------------------------- colour modes


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def palette() -> Image.Image:
    return Image.new("RGB", (4, 4), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16))


MODES: dict[str, tuple[bytes, str, tuple[int, int, int]]] = {
    "CMYK": (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), "jpg", (254, 0, 0)),
    "palette": (encoded(palette(), "PNG"), "png", (200, 100, 50)),
    "RGBA": (encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 255)), "PNG"), "png", (9, 8, 7)),
    "transparent": (encoded(Image.new("RGBA", (4, 4), (9, 8, 7, 0)), "PNG"), "png", (255,) * 3),
    "grey with alpha": (encoded(Image.new("LA", (4, 4), (50, 255)), "PNG"), "png", (50,) * 3),
    "16 bit": (encoded(sixteen_bits(), "PNG"), "png", (100,) * 3),
    "black and white": (encoded(Image.new("1", (4, 4), 1), "PNG"), "png", (255,) * 3),
}


@pytest.mark.parametrize(("data", "suffix", "colour"), MODES.values(), ids=MODES)
def test_other_colour_modes_are_converted_and_counted(
    tmp_path: Path, data: bytes, suffix: str, colour: tuple[int, int, int]
) -> None:
    source = loader(write_tar(tmp_path / "0.tar", sample("a", data, suffix=suffix)))
    (batch,) = source.epoch()
    assert (batch.images.flatten() - torch.tensor(colour)).abs().max() <= 2
    assert source.faults == {"colour mode": 1}
    assert source.broken == 0


def test_grey_and_rgb_are_nothing_to_report(tmp_path: Path) -> None:
    source = loader(write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b", picture("L"))]))
    assert len(list(source.epoch())) == 2
    assert not source.faults


# ---------------------------------------------------------------- nothing comes in

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"


def test_only_the_formats_asked_for_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a file is called: Pillow would hand PostScript to Ghostscript."""
    ran: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *x, **_: ran.append(x))
    others = [EPS, picture(kind="BMP"), picture(kind="TIFF"), picture(kind="GIF", mode="P")]
    files = [f for i, data in enumerate(others) for f in sample(f"{i}", data)]
    source = loader(write_tar(tmp_path / "0.tar", [*files, *sample("good")]))
    assert [batch.keys for batch in source.epoch()] == [["good"]]
    assert source.faults == {"broken image": len(others)}
    assert not ran


def sparse_tar(path: Path, size: int) -> None:
    """A tar of a few kilobytes with a file that is `size` large when it is read."""
    content = sum(512 + -(-len(data) // 512) * 512 for _, data in sample("good"))
    good = write_tar(path, sample("good")).read_bytes()[:content]
    header = tarfile.TarInfo("hole.jpg")
    header.size, header.pax_headers = (
        512,
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "hole.jpg",
            "GNU.sparse.realsize": str(size),
        },
    )
    blocks = header.tobuf(tarfile.PAX_FORMAT) + f"1\n{size}\n0\n".encode().ljust(512, b"\0")
    path.write_bytes(good + blocks + bytes(10240))


def large_png(path: Path, side: int) -> None:
    """A shard with a PNG of a few hundred kilobytes whose pixels, all black, are side x side."""
    packer = zlib.compressobj(1)
    rows = [packer.compress(bytes(1 + 3 * side)) for _ in range(side)]
    data = b"".join([*rows, packer.flush()])
    header = side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib_crc(name + data) for name, data in chunks
    )
    write_tar(path, [*sample("large", png, suffix="png"), *sample("good")])


HOSTILE: dict[str, tuple[Callable[[Path, int], None], int, int, str]] = {
    "10 kB of tar that hold 2 GB": (sparse_tar, 2 << 30, 20_000, "file too large"),
    # below the size at which Pillow itself has doubts; decoded it takes 350 MB
    "a PNG of 1.2 MB": (large_png, 9_400, 1_200_000, "image too large"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="measured in a fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("write", "size", "most", "kind"), HOSTILE.values(), ids=HOSTILE)
def test_a_small_file_that_would_become_large_takes_no_memory(
    tmp_path: Path, write: Callable[[Path, int], None], size: int, most: int, kind: str
) -> None:
    path = tmp_path / "0.tar"
    write(path, size)
    assert path.stat().st_size < most

    def read() -> tuple[list[list[str]], dict[str, int]]:
        source = loader(path)
        return [batch.keys for batch in source.epoch()], dict(source.faults)

    (keys, faults), grown = memory_of(read)
    assert grown < 100 << 20
    assert keys == [["good"]]
    assert faults == {kind: 1}
    assert MOST_PIXELS * 12 <= 300e6, "bytes that the largest image takes, in all its copies"


def memory_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """Run a function in a fork; return its result, and by how many bytes the fork grew at most."""
    here, there = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        before = peak_memory(torch.device("cpu"))
        there.send((function(), peak_memory(torch.device("cpu")) - before))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    there.close()
    result, grown = here.recv()
    process.join()
    return result, grown


@pytest.mark.parametrize("name", ["img.v2.001", "a.b/c.d", "000000001"])
def test_names_with_dots_are_whole_keys(tmp_path: Path, name: str) -> None:
    others = [f"{name}.{i}" for i in range(3)]
    files = [f for key in (name, *others) for f in sample(key, text=key.encode())]
    path = write_tar(tmp_path / "0.tar", files)
    failures = Failures()
    found = [(x["__key__"], x["txt"].decode()) for x in read_shard(str(path), failures)]
    assert found == [(key, key) for key in (name, *others)]
    assert not failures.counts


def test_a_compressed_tar_is_read(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b")], promised=2)
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert keys_and_faults(packed) == (["a", "b"], {})
    assert count_samples([str(packed)]) == 2
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    keys, faults = keys_and_faults(packed)
    assert faults == {"truncated tar": 2 - len(keys)}


def test_an_image_is_turned_as_its_camera_said(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    image.paste((0, 0, 255), (4, 0, 8, 4))  # the right half is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
    upright = decode_image({"__key__": "a", "jpg": buffer.getvalue()})
    assert upright.size == (4, 8)
    top, bottom = upright.getpixel((2, 1)), upright.getpixel((2, 6))
    assert top[0] > 200  # type: ignore[index]
    assert bottom[2] > 200  # type: ignore[index]


# ---------------------------------------------------------------- tar files


def test_the_first_of_the_same_key_is_used(tmp_path: Path) -> None:
    first, again = sample("a", text=b"first"), sample("a", text=b"again")
    path = write_tar(tmp_path / "0.tar", [*first, *again, *sample("b"), *again])
    failures = Failures()
    texts = [(x["__key__"], x["txt"]) for x in read_shard(str(path), failures)]
    assert texts == [("a", b"first"), ("b", b"words")]
    assert failures.counts == {"duplicate key": 2}


@pytest.mark.parametrize("promised", [None, 6])
@pytest.mark.parametrize("cut_at", ["data", "header", "entry", "end"])
def test_a_cut_tar_gives_what_is_before_the_cut(
    tmp_path: Path, cut_at: str, promised: int | None
) -> None:
    files = [file for key in "abcdef" for file in sample(key)]
    path = write_tar(tmp_path / "0.tar", files, promised)
    whole, entry = path.read_bytes(), 512 + -(-len(GOOD) // 512) * 512 + 1024
    cuts = {"data": 3 * entry + 700, "header": 3 * entry + 100, "entry": 3 * entry}
    path.write_bytes(whole[: cuts.get(cut_at, 6 * entry)])
    keys, faults = keys_and_faults(path)
    assert keys[:3] == ["a", "b", "c"]
    whole_ones = 6 if cut_at == "end" else 3
    assert len(keys) == whole_ones
    lost = max(1, (promised or 0) - whole_ones)
    assert faults == {"truncated tar": lost}


def test_a_whole_tar_has_no_faults(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample("a"), promised=1)
    assert keys_and_faults(path) == (["a"], {})


def test_an_empty_file_is_a_truncated_tar(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(b"")
    assert keys_and_faults(path) == ([], {"truncated tar": 1})


def test_faults_after_the_last_batch_are_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b", b"")])
    data = loader(path)
    list(data.epoch())
    assert data.faults == {"broken image": 1}


# ---------------------------------------------------------------- how many are too many


def test_above_a_share_the_run_stops_and_says_what_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.cc3m.data.loader.FREE_FAILURES", 0)
    files = [f for i in range(10) for f in sample(f"{i}", text=b"" if i in (4, 6) else b"x")]
    files += [*sample("x", b"")]
    path = write_tar(tmp_path / "0.tar", files)
    expected = r"1 of 6 samples could not be used \(1 empty caption\), above the share of 0\.1"
    with pytest.raises(UserError, match=expected):
        list(loader(path, max_broken=0.1).epoch())
    assert len(list(loader(path, max_broken=0.3).epoch())) == 8


def test_repaired_samples_are_not_broken() -> None:
    assert unusable({"colour mode": 5, "no image": 2, "truncated tar": 3}) == 5


# ---------------------------------------------------------------- shards and processes


def numbered_shards(folder: Path, shards: int, per_shard: int) -> list[str]:
    return [
        str(
            write_tar(
                folder / f"{i}.tar", [f for k in range(per_shard) for f in sample(f"{i}-{k}")]
            )
        )
        for i in range(shards)
    ]


@pytest.mark.parametrize("shards", [12, 2], ids=["many shards", "fewer than processes"])
@pytest.mark.parametrize("worlds", [(2, 1), (2, 4), (1, 3, 2), (3, 2, 4)], ids=str)
def test_another_number_of_processes_leaves_out_only_what_was_read(
    tmp_path: Path, worlds: tuple[int, ...], shards: int
) -> None:
    """Samples that waited in a shuffle buffer, or in a shard that was begun, come later."""
    paths = numbered_shards(tmp_path, shards, 48 // shards)
    order, seen, after = ShardOrder(shards, 0, True), list[str](), Position(1)

    def open_rank(rank: int, world: int) -> ShardLoader:
        return ShardLoader(
            paths,
            NOTHING,
            tokenize,
            1,
            shuffle=9,
            rank=rank,
            world_size=world,
            resample=False,
        )

    for turn, world in enumerate(worlds):
        positions = []
        for rank in range(min(world, shards) if turn == 0 else world):
            data, position = open_rank(rank, min(world, shards)), after
            data.world_size = world
            last = turn == len(worlds) - 1
            for _, batch in zip(range(100 if last else 5), data.epoch(after), strict=False):
                seen += batch.keys
                position = position.after(batch, 1)
            positions.append(Position.from_json(json.loads(json.dumps(position.as_json()))))
        after = order.carry_over(positions)
    assert len(seen) == len(set(seen)) == 48
    assert after == Position(2)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("streams", [(1, 2), (2, 1)], ids=str)
def test_another_number_of_workers_leaves_out_only_what_was_read(
    tmp_path: Path, streams: tuple[int, int]
) -> None:
    paths, seen = numbered_shards(tmp_path, 6, 8), list[str]()
    position, order = Position(0), ShardOrder(6, 0, True)
    for turn, workers in enumerate(streams):
        data = ShardLoader(paths, NOTHING, tokenize, 1, shuffle=9, workers=workers)
        for _, batch in zip(range(100 if turn else 7), data.epoch(position), strict=False):
            seen += batch.keys
            position = position.after(batch, workers)
        position = order.carry_over([position])
    assert len(seen) == len(set(seen)) == 48
    assert position == Position(1)


def test_resuming_within_the_rest_of_an_epoch_is_exact(tmp_path: Path) -> None:
    """After the number of processes changed, and with broken samples among those taken."""
    paths = numbered_shards(tmp_path, 3, 8)
    spoiled = [f for k in range(8) for f in sample(f"x-{k}", text=b"" if k == 3 else b"words")]
    write_tar(Path(paths[1]), spoiled)

    def data() -> ShardLoader:
        return ShardLoader(paths, NOTHING, tokenize, 2, shuffle=5)

    position = Position(0)
    for _, batch in zip(range(4), data().epoch(position), strict=False):
        position = position.after(batch, 1)
    start = ShardOrder(3, 0, True).carry_over([position])
    whole = [batch.keys for batch in data().epoch(start)]
    position = start
    for done, batch in enumerate(data().epoch(start), 1):
        position = position.after(batch, 1)
        assert [x.keys for x in data().epoch(position)] == whole[done:]


def test_shards_drawn_with_replacement_never_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b")])
    data = loader(path, resample=True, shuffle=2)
    keys = [batch.keys[0] for _, batch in zip(range(9), data.epoch(), strict=False)]
    again = [
        batch.keys[0]
        for _, batch in zip(range(9), loader(path, resample=True, shuffle=2).epoch(), strict=False)
    ]
    assert keys == again
    assert set(keys) == {"a", "b"}
    other = loader(path, resample=True, shuffle=2, rank=7, world_size=8)  # fewer shards than ranks
    assert next(other.epoch()).keys


def test_logs_name_each_kind_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [f for i in range(4) for f in sample(f"{i}", text=b"" if i % 2 else b"x")]
    path = write_tar(tmp_path / "0.tar", [*files, *sample("x", b"")])
    with caplog.at_level(logging.WARNING):
        list(loader(path, max_broken=1.0).epoch())
    assert caplog.text.count("empty caption: '1'") == 1
    assert caplog.text.count("empty caption") == 1
    assert caplog.text.count("broken image: 'x'") == 1
