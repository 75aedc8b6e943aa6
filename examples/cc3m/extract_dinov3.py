"""Features of a frozen DINOv3 for every image of webdataset shards, in shards beside them.

    python -m examples.cc3m.extract_dinov3 'data/cc3m/{00000..00331}.tar'
    python -m examples.cc3m.extract_dinov3 runs/demo/data/train/00000.tar --resolution 64 \\
        --model vit_small_patch16_dinov3 --random-weights      # anywhere, without a download

Writes <folder of the shards>/features (see examples/cc3m/features.py, which also reads them back).
Kill it at any moment: the same command goes on after the last whole shard. One process at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.cc3m.extraction import PRECISIONS, Extractor, fit_pca, to_half
from examples.cc3m.features import FORMAT, FeatureFolder
from examples.common.files import UserError, claim_directory, write_atomically, write_json
from examples.common.shards import Failures, count_samples, expand_shards, read_shard, unusable
from rankloss.fusion.pca import TokenPCA
from rankloss.fusion.teacher import Dinov3Teacher

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
        progress = extract(options)
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
    add("--random-weights", action="store_true", help="no download; features mean nothing")
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="default: features, beside the shards")
    add("--fresh", action="store_true", help="discard features of other settings")
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.workers, options.pca_images, options.pca_tokens) < 1:
        parser.error("--batch-size, --workers, --pca-images and --pca-tokens must be at least 1")
    return options


def extract(options: argparse.Namespace) -> Progress:
    """Do what the command line says.

    Raises:
        UserError: it cannot be done; says why.
    """
    shards = _shards(options.shards)
    folder = FeatureFolder(_output(options.out, shards))
    teacher = _teacher(options)
    given = _load_pca(options.pca, teacher) if options.pca else None
    settings = _settings(options, teacher, given)
    claim_directory(folder.path, settings, fresh=options.fresh, written=WRITTEN)
    extractor = Extractor(
        teacher, options.resolution, options.batch_size, options.workers, options.precision
    )
    with extractor.pool:
        pca = given or _own_pca(options, extractor, shards, folder)
        if pca is not None:
            pca = _keep_pca(pca, folder).to(extractor.device)
        made_by = folder.claim(_manifest(settings, teacher, pca, options.resolution))
        todo = [shard for shard in shards if not folder.is_done(shard, made_by)]
        if len(todo) < len(shards):
            print(f"{len(shards) - len(todo)} of {len(shards)} shards were done before")
        if not todo:
            return Progress(None)
        return _run(extractor, pca, folder, todo, made_by)


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
            yield from zip(keys, to_half(projected), to_half(cls), strict=True)
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


def _teacher(options: argparse.Namespace) -> Dinov3Teacher:
    torch.manual_seed(options.seed)
    pretrained = not options.random_weights
    try:
        teacher = Dinov3Teacher(options.model, pretrained=pretrained, **options.model_options)
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "; --random-weights runs without any" if pretrained else ""
        raise UserError(f"cannot load {options.model} ({error}){remedy}") from error
    if options.resolution < 1 or options.resolution % teacher.patch_size:
        raise UserError(
            f"--resolution {options.resolution} is not a multiple of the patch size "
            f"{teacher.patch_size}"
        )
    if options.dim > teacher.dim and not options.pca:
        raise UserError(
            f"--dim {options.dim} exceeds the model's {teacher.dim} dimensions; choose a smaller "
            "one, or 0 to keep all"
        )
    return teacher.to(options.device)


def _load_pca(path: Path, teacher: Dinov3Teacher) -> TokenPCA:
    try:
        pca = TokenPCA.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{error}; --pca takes the pca.safetensors of a first run") from error
    if pca.in_dim != teacher.dim:
        raise UserError(f"{path} is for {pca.in_dim} dimensions, the model has {teacher.dim}")
    return pca


def _settings(
    options: argparse.Namespace, teacher: Dinov3Teacher, given: TokenPCA | None
) -> dict[str, Any]:
    """All that determines features, apart from the images."""
    pca: dict[str, Any] | None = None
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
        "weights_hash": teacher.weights_hash(),
        "resolution": options.resolution,
        "precision": options.precision,
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
        "dtype": "float16",
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
        return _load_pca(folder.pca, extractor.teacher)
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
