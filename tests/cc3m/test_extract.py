"""Extraction: right features under the right keys, whatever breaks, and whenever it is killed."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import save_file

from benchmarks import gram_fidelity
from examples.cc3m.data import features, teacher
from examples.cc3m.data.features import FeatureReader
from examples.cc3m.data.quantised import bytes_of_image, pack, to_half, unpack
from examples.cc3m.data.teacher import sample_images
from examples.cc3m.extract_dinov3 import main
from examples.common.files import UserError, locked, read_json
from examples.common.shards import Failures, count_samples, read_shard
from rankloss.fusion.pca import TokenPCA
from rankloss.fusion.teacher import Dinov3Teacher

NAME = "vit_small_patch16_dinov3"
OPTIONS: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
COMMAND = [
    *("--model", NAME, "--model-options", json.dumps(OPTIONS), "--random-weights"),
    *("--resolution", "32", "--dim", "8", "--batch-size", "4", "--workers", "2", "--device", "cpu"),
]
PER_SHARD, SHARDS = 6, 3


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, first: int, spoil: Callable[[int], str] = lambda i: "") -> None:
    """Samples first .. first + 5; spoil(i) names what is wrong with sample i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + PER_SHARD):
            parts = {"jpg": jpeg(i), "txt": f"no {i}".encode()}
            if spoil(i) == "corrupt":
                parts["jpg"] = b"not a picture"
            if spoil(i) == "cut":
                parts["jpg"] = parts["jpg"][:150]
            if spoil(i).startswith("no "):
                del parts[spoil(i).removeprefix("no ")]
            for suffix, data in parts.items():
                entry = tarfile.TarInfo(f"{i:09d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(SHARDS):
        write_shard(tmp_path / f"images/{i:05d}.tar", i * PER_SHARD)
    return tmp_path / "images"


def pattern(folder: Path, last: int = SHARDS - 1) -> str:
    return f"{folder}/{{00000..{last:05d}}}.tar"


def run(folder: Path, *arguments: str, code: int = 0) -> Path:
    """The folder of features."""
    assert main([*COMMAND, pattern(folder), *arguments]) == code
    return folder / "features"


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def samples_of(shard: Path | str) -> list[dict[str, Any]]:
    """Read a shard of features as any webdataset program does."""
    with open(shard, "rb") as file:
        members = wds.tariterators.tar_file_expander([{"url": str(shard), "stream": file}])
        return list(wds.tariterators.group_by_keys(members))


def keys(shard: Path) -> list[str]:
    return [sample["__key__"] for sample in samples_of(shard)]


def sample_of(shard: Path, number: int) -> dict[str, Any]:
    return next(s for s in samples_of(shard) if s["__key__"] == f"{number:09d}")


def test_features_are_the_teachers_under_the_images_keys(images: Path) -> None:
    folder = run(images)
    torch.manual_seed(0)
    teacher = Dinov3Teacher(NAME, pretrained=False, **OPTIONS)
    pca = TokenPCA.load(folder / "pca.safetensors")
    transform = open_clip.image_transform(32, is_train=False, resize_mode="squash")
    reader = FeatureReader(folder)
    assert (reader.grid, reader.manifest["dim"]) == ((2, 2), 8)
    for i in range(SHARDS):
        shard = images / f"{i:05d}.tar"
        assert keys(folder / shard.name) == keys(shard)
        for sample in read_shard(str(shard), Failures()):
            picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            patches, cls, _ = teacher(transform(picture)[None])
            found = reader.of(sample)
            assert found.patches.dtype == found.cls.dtype == torch.float16
            assert found.patches.shape == (4, 8)
            for got, exact in ((found.patches, pca(patches)[0]), (found.cls, cls[0])):
                torch.testing.assert_close(got.float(), exact, rtol=1e-3, atol=1e-3)  # fp16


def test_webdataset_decodes_the_shards(images: Path) -> None:
    folder = run(images)
    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    assert count_samples(shards) == SHARDS * PER_SHARD
    decode = wds.autodecode.Decoder([wds.autodecode.basichandlers])  # what .decode() does
    samples = [decode(sample) for sample in samples_of(shards[0])]
    assert len(samples) == PER_SHARD
    assert samples[0]["patches.npy"].shape == (4, 8)
    assert samples[0]["cls.npy"].dtype == np.float16
    with tarfile.open(shards[0]) as tar:
        assert {(m.mtime, m.uname, m.gname) for m in tar} == {(0, "", "")}


def test_manifest_says_what_made_the_features(images: Path) -> None:
    folder = run(images)
    manifest = read_json(folder / "manifest.json")
    torch.manual_seed(0)
    teacher = Dinov3Teacher(NAME, pretrained=False, **OPTIONS)
    assert manifest["model"] == NAME
    assert manifest["weights_hash"] == teacher.weights_hash()
    assert (manifest["resolution"], manifest["grid"], manifest["dim"]) == (32, [2, 2], 8)
    assert manifest["pca_hash"] == TokenPCA.load(folder / "pca.safetensors").content_hash()
    assert 0 < manifest["pca_explained"] <= 1
    assert (folder / "pca.png").stat().st_size > 1000
    assert (folder / "pca.safetensors").stat().st_mode & 0o044 == 0o044


def test_weights_from_a_file_are_known_by_what_it_holds(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it lies: the same bytes go on, other bytes do not, and no place is written down."""
    torch.manual_seed(1)
    teacher = Dinov3Teacher(NAME, pretrained=False, **OPTIONS)
    places = [tmp_path / "one.safetensors", tmp_path / "elsewhere" / "two.safetensors"]
    places[1].parent.mkdir()
    for place in places:
        save_file(teacher.model.state_dict(), place)
    command = [pattern(images), *(x for x in COMMAND if x != "--random-weights"), "--weights"]
    assert main([*command, str(places[0])]) == 0
    folder = images / "features"
    written = contents(folder)
    assert main([*command, str(places[1])]) == 0
    assert contents(folder) == written
    manifest = read_json(folder / "manifest.json")
    assert manifest["weights_hash"] == teacher.weights_hash()
    assert manifest["weights_file"] == hashlib.sha256(places[0].read_bytes()).hexdigest()
    assert not manifest["random_weights"]
    for name in ("manifest.json", "settings.json"):
        assert str(tmp_path) not in (folder / name).read_text()
    torch.manual_seed(2)
    other = Dinov3Teacher(NAME, pretrained=False, **OPTIONS)
    save_file(other.model.state_dict(), places[1])
    capsys.readouterr()
    assert main([*command, str(places[1])]) == 2
    assert "weights_file: " in capsys.readouterr().err
    places[1].write_text("no weights")
    missing = str(tmp_path / "none.safetensors")
    for given, told in (
        ([str(places[1])], f"cannot load {NAME}"),
        ([missing], f"cannot load {NAME}"),
        ([str(places[0]), "--model", "some/model"], "--weights is a file for a model of timm"),
    ):
        assert main([*command, *given]) == 2
        assert told in capsys.readouterr().err


def test_broken_images_are_counted_and_left_out(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flaws = {6: "corrupt", 8: "cut", 9: "no jpg", 10: "no txt"}
    write_shard(images / "00001.tar", PER_SHARD, lambda i: flaws.get(i, ""))
    folder = run(images)
    assert keys(folder / "00001.tar") == ["000000007", "000000010", "000000011"]
    stats = read_json(folder / "00001_stats.json")
    assert (stats["count"], stats["successes"], stats["unreadable"]) == (6, 3, 3)
    assert re.search(r"15 images, 3 left out, [\d.]+ img/s", capsys.readouterr().out)
    assert keys(folder / "00002.tar") == keys(images / "00002.tar")
    with pytest.raises(KeyError, match="000000006"):
        FeatureReader(folder).of(sample_of(images / "00001.tar", 6))


def test_truncated_and_hopeless_shards(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = images / "00001.tar"
    with tarfile.open(tar) as whole:
        end = whole.getmembers()[6].offset_data + 10  # in the fourth image
    tar.write_bytes(tar.read_bytes()[:end])
    (images / "00002.tar").write_bytes(b"no tar at all")
    folder = run(images)
    assert keys(folder / "00001.tar") == ["000000006", "000000007", "000000008"]
    assert keys(folder / "00002.tar") == []
    out = capsys.readouterr().out
    assert "9 images" in out
    assert "00002.tar: left out 1 unreadable images; to try again, remove" in out


def test_nothing_readable_is_a_failure(images: Path) -> None:
    for i in range(SHARDS):
        write_shard(images / f"{i:05d}.tar", i * PER_SHARD, lambda i: "corrupt")
    run(images, "--dim", "0", code=1)


def test_finished_shards_are_not_done_again(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(images)
    whole = contents(folder)
    (folder / "00001.tar").unlink()
    (folder / "00002_stats.json").unlink()
    (folder / "00000.tar").write_bytes(b"left alone")
    run(images)
    assert "1 of 3 shards were done before" in capsys.readouterr().out
    assert contents(folder) == {**whole, "00000.tar": b"left alone"}


class Killed(BaseException):
    """As sudden as it gets within a process."""


def test_stopping_before_any_file_appears_changes_nothing(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is renamed into place; stop before each of these renames in turn."""
    whole = contents(run(images))
    replace, calls = os.replace, 0

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        replace(*arguments)

    for last in range(1, len(whole) + 1):
        out, calls = images / f"out{last}", 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(Killed):
                main([pattern(images), *COMMAND, "--out", str(out)])
        run(images, "--out", str(out))
        assert contents(out) == whole, f"stopped before rename {last}"


FORKING = """
import json, os, signal, sys, time
import matplotlib.figure, timm, torch
from examples.cc3m.extract_dinov3 import main
torch.set_num_threads(1)
for line in sys.stdin:
    arguments, delay, after = json.loads(line)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        code = 70
        try:
            code = main(arguments)
        finally:
            os._exit(code)
    if delay is not None:
        while after and not os.path.exists(after) and time.monotonic() < started + 60:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)
"""
"""Imports once, then forks for every command, and kills it where asked to."""


class Forking:
    """A process that runs extractions in forks of itself."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )

    def __call__(
        self, arguments: list[str], delay: float | None = None, after: Path | None = None
    ) -> tuple[int, float]:
        """Run, and kill `delay` seconds later (than `after` exists); exit code and seconds."""
        command = [arguments, delay, None if after is None else str(after)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds

    def close(self) -> None:
        self.process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    """Half of the kills at any moment, half after the first of twelve shards is done."""
    images, shards = tmp_path / "images", 12
    for i in range(shards):
        write_shard(images / f"{i:05d}.tar", i * PER_SHARD)
    arguments = [pattern(images, shards - 1), *COMMAND]
    forking, rng, midway = Forking(), random.Random(0), 0
    try:
        code, seconds = forking([*arguments, "--out", str(tmp_path / "whole")])
        assert code == 0
        whole = contents(tmp_path / "whole")
        for kill in range(kills):
            out = tmp_path / f"out{kill}"
            after = out / "00000_stats.json" if kill % 2 else None
            delay = rng.random() * seconds * (0.1 if kill % 2 else 1)
            code, _ = forking([*arguments, "--out", str(out)], delay, after)
            assert code in (0, -9)  # it may have ended before
            midway += 0 < len(list(out.glob("*_stats.json"))) < shards
            assert forking([*arguments, "--out", str(out)])[0] == 0
            assert contents(out) == whole, f"killed after {delay:.3f} s of {seconds:.3f} s"
    finally:
        forking.close()
    assert midway, "no kill came between the first shard and the last"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--resolution", "48"], "resolution: 32 -> 48"),
        (["--dim", "7"], "pca.dim: 8 -> 7"),
        (["--centre"], "pca.centre"),
        (["--seed", "1"], "weights_hash"),
        (["--precision", "bfloat16"], "precision"),
        (["--model-options", json.dumps({**OPTIONS, "depth": 2})], "model_options.depth: 1 -> 2"),
    ],
)
def test_features_of_other_settings_are_not_mixed(
    images: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    folder = run(images)
    whole = contents(folder)
    run(images, *change, code=2)
    error = capsys.readouterr().err
    assert named in error
    assert "choose another --out, or pass --fresh" in error
    assert contents(folder) == whole


def test_fresh_starts_over(images: Path) -> None:
    folder = run(images)
    run(images, "--resolution", "48", "--fresh")
    reader = FeatureReader(folder, least_resolution=48)
    assert reader.of(sample_of(images / "00001.tar", 7)).patches.shape == (9, 8)


def test_a_replaced_pca_is_noticed(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(images)
    pca = TokenPCA.load(folder / "pca.safetensors")
    TokenPCA(-pca.components).save(folder / "pca.safetensors")
    run(images, code=2)
    assert "different pca_hash" in capsys.readouterr().err


def test_changed_images_are_noticed(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(images)
    size = (images / "00001.tar").stat().st_size
    write_shard(images / "00001.tar", 20)
    assert (images / "00001.tar").stat().st_size == size
    run(images, code=2)
    assert "00001.tar does not belong here (the images have changed)" in capsys.readouterr().err
    (folder / "00001.tar").unlink()  # the remedy it names
    run(images)
    assert keys(folder / "00001.tar") == [f"{i:09d}" for i in range(20, 26)]


def test_a_second_folder_shares_the_first_ones_pca(images: Path, tmp_path: Path) -> None:
    first = run(images)
    pca = first / "pca.safetensors"
    for i in range(SHARDS):
        write_shard(tmp_path / f"more/{i:05d}.tar", 100 + i * PER_SHARD)
    second = run(tmp_path / "more", "--pca", str(pca))
    assert (second / "pca.safetensors").read_bytes() == pca.read_bytes()
    hashes = {read_json(f / "manifest.json")["pca_hash"] for f in (first, second)}
    assert len(hashes) == 1
    run(tmp_path / "more", "--pca", str(pca))  # goes on
    run(tmp_path / "more", code=2)  # would fit its own


def test_without_pca_all_dimensions_are_kept(images: Path) -> None:
    folder = run(images, "--dim", "0")
    reader = FeatureReader(folder)
    assert reader.of(sample_of(images / "00000.tar", 3)).patches.shape == (4, 24)
    assert not (folder / "pca.safetensors").exists()


def test_bfloat16_is_close(images: Path) -> None:
    sample = sample_of(images / "00000.tar", 3)
    exact = FeatureReader(run(images, "--dim", "0")).of(sample)
    run(images, "--dim", "0", "--precision", "bfloat16", "--out", str(images / "half"))
    half = FeatureReader(images / "half").of(sample)
    difference = (exact.patches.float() - half.patches.float()).abs()
    assert 0 < difference.mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "40"], "--resolution 40 is not a multiple of the patch size 16"),
        (["--dim", "25"], "--dim 25 exceeds the model's 24 dimensions"),
        (["--pca-tokens", "7"], "choose a smaller --dim, or 0"),
        (["--pca", "nowhere"], "there is no PCA file nowhere"),
        (["--model", "no_such_model"], "cannot load no_such_model"),
        (["--model", "convnext_atto", "--model-options", "{}"], "choose a ViT"),
        (["--out", "{images}"], "holds other files; choose another --out"),
        (["{images}/../other/00000.tar"], "local files of one folder"),
        (["{images}/00009.tar"], "1 of 4 shards"),
    ],
)
def test_errors_say_what_to_do(
    images: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_shard(images.parent / "other/00000.tar", 0)
    before = contents(images)
    run(images, *[a.replace("{images}", str(images)) for a in arguments], code=2)
    assert message in capsys.readouterr().err
    after = contents(images)
    assert before.items() <= after.items()


def test_a_pca_of_another_width_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TokenPCA(torch.eye(8, 30)).save(tmp_path / "pca.safetensors")
    run(images, "--pca", str(tmp_path / "pca.safetensors"), code=2)
    assert "is for 30 dimensions, the model has 24" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher.Extractor, "features", interrupt)
    run(images, code=130)
    assert "run the same command" in capsys.readouterr().out


def test_reader_after_shuffling_pickling_and_eviction(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "OPEN_SHARDS", 1)
    reader = FeatureReader(run(images))
    shards = sorted(images.glob("*.tar"))
    samples = [s for shard in shards for s in read_shard(str(shard), Failures())]
    in_order = {s["__key__"]: reader.of(s).patches for s in samples}
    random.Random(0).shuffle(samples)
    copied: FeatureReader = pickle.loads(pickle.dumps(reader))
    for sample in samples:
        for one in (reader, copied):
            assert torch.equal(one.of(sample).patches, in_order[sample["__key__"]])
    assert len({p.sum().item() for p in in_order.values()}) == len(samples)


def test_reader_refuses_what_it_was_not_promised(images: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json; run"):
        FeatureReader(images)
    folder = run(images)
    with pytest.raises(UserError, match="are of images at 32 pixels"):
        FeatureReader(folder, least_resolution=224)
    reader = FeatureReader(folder)
    with pytest.raises(UserError, match=r"local image shards, but pipe:cat x\.tar is not there"):
        reader.check(["pipe:cat x.tar"])
    write_shard(images / "00007.tar", 42)
    with pytest.raises(UserError, match=r"no features of .*00007\.tar"):
        reader.of(sample_of(images / "00007.tar", 42))
    write_shard(images / "other/00000.tar", 0, lambda i: "cut")  # same name and keys
    with pytest.raises(UserError, match=r"00000\.tar does not belong.*images have changed"):
        reader.of(sample_of(images / "other/00000.tar", 2))
    stats = folder / "00002_stats.json"
    stats.write_text(json.dumps({**read_json(stats), "manifest": "of another run"}))
    with pytest.raises(UserError, match="other settings made it"):
        reader.of(sample_of(images / "00002.tar", 12))


def test_sample_of_images_is_seeded_and_even(images: Path) -> None:
    shards = [str(p) for p in sorted(images.glob("*.tar"))]

    def chosen(count: int, seed: int) -> list[str]:
        return [s["__key__"] for s in sample_images(shards, count, seed)]

    assert chosen(6, 0) == chosen(6, 0)
    assert len({tuple(chosen(6, seed)) for seed in range(5)}) == 5
    assert sorted(int(key) // PER_SHARD for key in chosen(6, 1)) == [0, 0, 1, 1, 2, 2]
    assert len(chosen(2, 0)) == 2
    assert len(set(chosen(1000, 0))) == SHARDS * PER_SHARD
    counts = np.zeros(PER_SHARD)  # every place of a shard is drawn equally often
    for seed in range(300):
        for key in chosen(3, seed):
            counts[int(key) % PER_SHARD] += 1
    assert counts.min() > 110
    assert counts.max() < 190  # 150 expected, standard deviation 11


def run_by_two(command: list[str]) -> list[int | None]:
    """Exit codes of two processes, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def one(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        warnings.simplefilter("ignore")
        code = main(command)
        sys.stdout.flush()
        os._exit(code)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_share_the_shards_and_write_the_bytes_of_one(
    images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = contents(run(images))
    command = [pattern(images), *COMMAND, "--out", str(images / "two")]
    capfd.readouterr()
    assert run_by_two(command) == [0, 0]
    assert sorted(re.findall(r"(\d+) images, 0 left out", capfd.readouterr().out)) == ["12", "6"]
    assert contents(images / "two") == whole
    (images / "two" / "00001.tar").unlink()
    assert run_by_two(command) == [0, 0]
    assert contents(images / "two") == whole
    assert run_by_two([*command, "--dim", "7"]) == [2, 2]


def test_one_command_at_a_time_writes_into_a_folder(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(images / "features"):
        run(images, code=2)
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.001), ("int8", 0.01), ("float8", 0.07)])
def test_smaller_numbers_are_close_and_take_what_was_said(
    images: Path, capsys: pytest.CaptureFixture[str], dtype: str, error: float
) -> None:
    for shard in images.glob("*.tar"):
        stats = {"successes": PER_SHARD}
        shard.with_name(f"{shard.stem}_stats.json").write_text(json.dumps(stats))
    exact = FeatureReader(run(images))
    capsys.readouterr()
    folder = run(images, "--dtype", dtype, "--out", str(images / "small"))
    each = bytes_of_image(4, 8, 24, dtype)
    said = capsys.readouterr().out.splitlines()[0]
    assert f"disk: {each / 1024:.1f} KiB an image, 0.0 GiB for 18 images" in said
    for number in range(SHARDS):
        size = (folder / f"{number:05d}.tar").stat().st_size
        assert 0 <= size - PER_SHARD * each <= 10240  # whole records of a tar
    for shard in images.glob("*.tar"):
        for sample in read_shard(str(shard), Failures()):
            close, (patches, cls) = FeatureReader(folder).of(sample), exact.of(sample)
            assert close.patches.dtype == torch.float16
            assert torch.equal(close.cls, cls)
            largest = patches.float().abs().amax(1, keepdim=True)
            assert ((close.patches.float() - patches.float()).abs() <= error * largest).all()


def test_every_number_of_a_packed_token_is_within_its_types_rounding() -> None:
    tokens = torch.randn(50, 64) * torch.logspace(-2, 3, 50)[:, None]
    tokens[0] = 0
    largest = tokens.abs().amax(1, keepdim=True)
    for dtype, relative, absolute in (("int8", 0, 0.503 / 127), ("float8", 2**-4, 2**-10 / 448)):
        got = unpack(pack(tokens, dtype), dtype).float()
        rounded = relative * tokens.abs() + absolute * largest + 2e-3 * tokens.abs()  # of the scale
        assert ((got - tokens).abs() <= rounded + 1e-6).all(), dtype


def test_too_little_disk_is_told_before_anything_is_made(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "00000_stats.json").write_text('{"successes": 6}')
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    command = [str(images / "00000.tar"), *COMMAND, "--out", str(images / "out")]
    assert main(command) == 2
    assert "choose a smaller --dim, --dtype int8, or another --out" in capsys.readouterr().err
    assert contents(images / "out").keys() == {"settings.json"}


def test_the_loss_of_fidelity_is_measured(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    command = [pattern(images), *COMMAND, "--dims", "0", "8", "--images", "12"]
    assert gram_fidelity.main([*command, "--report", str(out)]) == 0
    rows = read_json(out)["rows"]
    losses = {name: row["Gram loss"] for name, row in rows.items()}
    assert losses["24, float16"] < 1e-6 < losses["24, int8"] < losses["24, float8"]
    assert losses["24, float8"] < losses["8, float16"] < losses["8, float8"]
    assert rows["8, int8"]["KiB an image"] == bytes_of_image(4, 8, 24, "int8") / 1024


def test_values_beyond_fp16_are_an_error() -> None:
    assert to_half(torch.tensor([1.5])).dtype == torch.float16
    for value in (1e5, float("nan")):
        with pytest.raises(UserError, match="not finite in fp16"):
            to_half(torch.tensor([value]))
