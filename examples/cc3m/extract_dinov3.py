"""Features of a frozen DINOv3 for every image of webdataset shards, in shards beside them.

    python -m examples.cc3m.extract_dinov3 'data/cc3m/{00000..00331}.tar'
    python -m examples.cc3m.extract_dinov3 runs/demo/data/train/00000.tar --resolution 64 \\
        --model vit_small_patch16_dinov3 --random-weights      # anywhere, without a download

    torchrun --nproc_per_node 8 -m examples.cc3m.extract_dinov3 ...        # each takes its shards

Writes <folder of the shards>/features (examples/cc3m/data/features.py also reads them back),
after saying how much disk that takes. Kill it at any moment: the same command goes on after the
last whole shard, also with another number of processes, and writes the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from examples.cc3m.data.features import FORMAT, FeatureFolder, file_hash
from examples.cc3m.data.quantised import DTYPES, bytes_of_image
from examples.cc3m.data.teacher import PRECISIONS, Extractor, fit_pca, load_pca, load_teacher
from examples.common.files import UserError, claim_directory, locked, write_atomically, write_json
from examples.common.parallel import Parallel, running
from examples.common.shards import Failures, count_samples, expand_shards, read_shard, unusable
from rankloss.fusion.pca import TokenPCA
from rankloss.fusion.teacher import Dinov3Teacher

ALONE = Parallel()
WRITTEN = ("settings.json", "manifest.json", "pca.*", "*.tar", "*_stats.json")
"""All that extraction writes into its folder of features, and all that --fresh removes there."""


@dataclass
class Progress:
    """Record of a run's work."""

    bar: Any
    images: int = 0
    left_out: int = 0

    def advance(self, images: int, left_out: int) -> None:
        self.images += images
        self.left_out += left_out
        self.bar.update(images + left_out)
        if self.left_out:
            self.bar.set_postfix(left_out=self.left_out, refresh=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Extract; the exit code."""
    options = parse(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with running(options.device) as parallel:
            progress = extract(options, parallel)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on from there")
        return 130
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if progress.images or not progress.left_out else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, which `extract` takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", nargs="+", help="tar files in one folder, or '{00000..00331}' patterns of them")
    add("--model", default="vit_base_patch16_dinov3", help="name in timm or transformers")
    add("--model-options", type=json.loads, default={}, help='JSON, for example {"depth": 2}')
    source = parser.add_mutually_exclusive_group()
    random_help = "no download; features mean nothing"
    source.add_argument("--random-weights", action="store_true", help=random_help)
    source.add_argument("--weights", type=Path, help="a file of weights for a model of timm")
    add("--resolution", type=int, default=224, help="of images, a multiple of the patch size")
    add("--dim", type=int, default=256, help="of the PCA; 0 keeps all dimensions")
    add("--pca", type=Path, help="use this PCA (of a first run) instead of fitting one")
    add("--pca-images", type=int, default=2000, help="images the PCA is fitted to")
    add("--pca-tokens", type=int, default=50_000, help="tokens the PCA is fitted to")
    add("--centre", action="store_true", help="centre the PCA; changes cosines, hence Gram")
    add("--seed", type=int, default=0, help="of the PCA's sample and of random weights")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=4, help="threads that decode images")
    add("--precision", choices=sorted(PRECISIONS), default="float32")
    add("--dtype", choices=DTYPES, default="float16", help="of patches; one byte saves half")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, help="default: features, beside the shards")
    add("--fresh", action="store_true", help="discard features of other settings")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.workers, options.pca_images, options.pca_tokens) < 1:
        parser.error("--batch-size, --workers, --pca-images and --pca-tokens must be at least 1")
    return options


def extract(options: argparse.Namespace, parallel: Parallel = ALONE) -> Progress:
    """Do what the command line says, with the other processes.

    Raises:
        UserError: it cannot be done; says why.
    """
    shards = _shards(options.shards)
    folder = FeatureFolder(_output(options.out, shards))
    teacher = load_teacher(options, parallel.device)
    given = load_pca(options.pca, teacher) if options.pca else None
    settings = _settings(options, teacher, given)
    extractor = Extractor(
        teacher, options.resolution, options.batch_size, options.workers, options.precision
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(extractor.pool)
        error, made_by = None, ""
        if parallel.first:  # all others wait for the projection and the manifest
            try:
                stack.enter_context(locked(folder.path))
                claim_directory(folder.path, settings, fresh=options.fresh, written=WRITTEN)
                _tell_disk(options, teacher, given, folder, shards)
                pca = given or _own_pca(options, extractor, shards, folder)
                pca = None if pca is None else _keep_pca(pca, folder)
                manifest = _manifest(settings, teacher, pca, options.resolution)
                made_by = folder.claim(manifest)
            except UserError as caught:
                error = caught
        parallel.together(error)
        made_by = parallel.same_for_all(made_by)
        pca = load_pca(folder.pca, teacher).to(parallel.device) if folder.pca.exists() else None
        todo = [shard for shard in shards if not folder.is_done(shard, made_by)]
        if len(todo) < len(shards) and parallel.first:
            print(f"{len(shards) - len(todo)} of {len(shards)} shards were done before")
        mine = parallel.same_for_all(todo)[parallel.rank :: parallel.world_size]
        progress = _run(extractor, pca, folder, mine, made_by) if mine else Progress(None)
        parallel.together(None)  # the first one's lock is everyone's
        return progress


def _tell_disk(
    options: argparse.Namespace,
    teacher: Dinov3Teacher,
    given: TokenPCA | None,
    folder: FeatureFolder,
    shards: list[str],
) -> None:
    """Print what the features will take, before any are made.

    Raises:
        UserError: there is less left on the disk.
    """
    side = options.resolution // teacher.patch_size
    dim = (options.dim or teacher.dim) if given is None else given.out_dim
    each = bytes_of_image(side * side, dim, teacher.dim, options.dtype)
    left = [shard for shard in shards if not folder.shard(shard).exists()]
    total, free = _total(left), shutil.disk_usage(folder.path).free
    needed = 0 if total is None else total * each
    told = f"{needed / 2**30:.1f} GiB for {total} images" if total else "images are not counted"
    print(
        f"disk: {each / 2**10:.1f} KiB an image, {told}; {free / 2**30:.1f} GiB are free in "
        f"{folder.path}",
        flush=True,
    )
    if needed > free:
        raise UserError(
            f"features need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free in "
            f"{folder.path}; choose a smaller --dim, --dtype int8, or another --out"
        )


def _run(
    extractor: Extractor,
    pca: TokenPCA | None,
    folder: FeatureFolder,
    shards: list[str],
    made_by: str,
) -> Progress:
    started = time.perf_counter()
    # disable=None: no bar when the output is not a terminal, but a line a shard (below)
    with tqdm(total=_total(shards), unit="img", disable=None) as bar:
        progress = Progress(bar)
        for shard in shards:
            left_out = progress.left_out
            _extract_shard(extractor, pca, folder, shard, made_by, progress)
            seconds = time.perf_counter() - started
            if bar.disable:
                print(f"{shard}: {progress.images / seconds:.1f} img/s so far", flush=True)
            if progress.left_out > left_out:
                tqdm.write(
                    f"{shard}: left out {progress.left_out - left_out} unreadable images; to try "
                    f"again, remove {folder.shard(shard)}"
                )
    print(
        f"{folder.path}: {progress.images} images, {progress.left_out} left out, "
        f"{progress.images / (time.perf_counter() - started):.1f} img/s"
    )
    return progress


def _extract_shard(
    extractor: Extractor,
    pca: TokenPCA | None,
    folder: FeatureFolder,
    shard: str,
    made_by: str,
    progress: Progress,
) -> None:
    failures = Failures()
    left_out = 0

    def rows() -> Iterator[tuple[str, Tensor, Tensor]]:
        nonlocal left_out
        for keys, (patches, cls, _) in extractor.batches(read_shard(shard, failures), failures):
            projected = patches if pca is None else pca(patches)
            yield from zip(keys, projected, cls, strict=True)
            broken = unusable(failures.take())
            left_out += broken
            progress.advance(len(keys), broken)

    stats = folder.write(shard, rows(), made_by)
    broken = unusable(failures.take())  # after the last readable image
    progress.advance(0, broken)
    stats |= {"count": stats["successes"] + left_out + broken, "unreadable": left_out + broken}
    write_json(folder.stats(shard), stats)  # last: it says that the shard is whole


def _shards(specs: list[str]) -> list[str]:
    try:
        shards = expand_shards(specs)
    except ValueError as error:
        raise UserError(str(error)) from error
    folders = {str(Path(shard).parent) for shard in shards}
    if len(folders) > 1 or any(":" in shard and not Path(shard).exists() for shard in shards):
        raise UserError(
            f"shards must be local files of one folder, got {sorted(folders)[:3]}; run once a "
            "folder, later ones with --pca FIRST/features/pca.safetensors"
        )
    return shards


def _output(out: Path | None, shards: list[str]) -> Path:
    """The folder for features, which must be new or one of features."""
    images = Path(shards[0]).parent
    out = images / "features" if out is None else out
    strange = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    if out.resolve() == images.resolve() or (strange and not (out / "settings.json").exists()):
        raise UserError(f"{out} holds other files; choose another --out")
    return out


def _settings(
    options: argparse.Namespace, teacher: Dinov3Teacher, given: TokenPCA | None
) -> dict[str, Any]:
    """All that determines features, apart from the images."""
    pca: dict[str, Any] | None = None
    # by what it holds, wherever it lies; features made without such a file do not say so
    file = {} if options.weights is None else {"weights_file": file_hash(options.weights)}
    if given is not None:
        pca = {"given": given.content_hash()}
    elif options.dim:
        names = ("dim", "centre", "seed", "pca_images", "pca_tokens")
        pca = {name: getattr(options, name) for name in names}
    return {
        "format": FORMAT,
        "model": options.model,
        "model_options": options.model_options,
        "random_weights": options.random_weights,
        **file,
        "weights_hash": teacher.weights_hash(),
        "resolution": options.resolution,
        "precision": options.precision,
        "dtype": options.dtype,
        "pca": pca,
    }


def _manifest(
    settings: dict[str, Any], teacher: Dinov3Teacher, pca: TokenPCA | None, resolution: int
) -> dict[str, Any]:
    """Facts that a reader needs."""
    side = resolution // teacher.patch_size
    return {
        **{name: value for name, value in settings.items() if name != "pca"},
        "transform": "the whole image, resized to a square (bicubic)",
        "mean": list(teacher.mean),
        "std": list(teacher.std),
        "patch_size": teacher.patch_size,
        "grid": [side, side],
        "dim": teacher.dim if pca is None else pca.out_dim,
        "cls_dim": teacher.dim,
        "pca_hash": None if pca is None else pca.content_hash(),
        "pca_fit": None if pca is None else pca.fit_settings,
        "pca_explained": None if pca is None else round(float(pca.explained.sum()), 6),
    }


def _own_pca(
    options: argparse.Namespace, extractor: Extractor, shards: list[str], folder: FeatureFolder
) -> TokenPCA | None:
    """The folder's own if it was fitted before, else one fitted now; None if none is wanted."""
    if not options.dim:
        return None
    if folder.pca.exists():
        return load_pca(folder.pca, extractor.teacher)
    return fit_pca(
        extractor,
        shards,
        options.dim,
        centre=options.centre,
        images=options.pca_images,
        max_tokens=options.pca_tokens,
        seed=options.seed,
    )


def _keep_pca(pca: TokenPCA, folder: FeatureFolder) -> TokenPCA:
    """Written beside the features, with a picture; what is there stays."""
    if not folder.pca.exists():
        write_atomically(folder.pca, pca.save)
        print(f"{folder.pca}: {pca}")
    picture = folder.pca.with_suffix(".png")
    if not picture.exists():
        write_atomically(picture, pca.plot)
    return pca


def _total(shards: list[str]) -> int | None:
    try:
        return count_samples(shards)
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
