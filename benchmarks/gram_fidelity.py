"""Loss of fidelity of the Gram matrices of a teacher's patches, by dimensions and numbers kept.

    python -m benchmarks.gram_fidelity 'data/cc3m/{00000..00007}.tar'
    python -m benchmarks.gram_fidelity ... --dims 0 256 64 --images 256 --report fidelity.json

Takes the options of `examples.cc3m.extract_dinov3` that say which teacher. The projections are
fitted to one half of a random sample of images, the other half is measured against the teacher's
own float32 tokens of all dimensions: by the Gram loss (the mean squared difference of cosines,
zero for a perfect student of the teacher itself) and by the largest difference of two cosines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.cc3m.data.quantised import DTYPES, bytes_of_image, pack, unpack
from examples.cc3m.data.teacher import Extractor, load_teacher, sample_images
from examples.cc3m.extract_dinov3 import parse
from examples.common.files import UserError, write_json
from examples.common.parallel import running
from examples.common.reports import markdown_table
from examples.common.shards import Failures, expand_shards
from rankloss.distillation import GramLoss
from rankloss.fusion.pca import TokenPCA


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[0, 256, 128, 64])
    parser.add_argument("--images", type=int, default=128, help="half of them for the projections")
    parser.add_argument("--report", type=Path, help="JSON file of the numbers")
    own, rest = parser.parse_known_args(arguments)
    options = parse(rest)
    options.dim = max(own.dims)
    try:
        with running(options.device) as parallel:
            teacher = load_teacher(options, parallel.device)
            extractor = Extractor(
                teacher, options.resolution, options.batch_size, options.workers, options.precision
            )
            samples = sample_images(expand_shards(options.shards), own.images, options.seed)
            with extractor.pool:
                found = list(extractor.batches(samples, Failures()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokens = torch.cat([features.patches.cpu() for _, features in found])
    half = len(tokens) // 2
    fitted, measured = tokens[:half], tokens[half:]
    rows = {}
    for dim in own.dims:
        pca = TokenPCA.fit(fitted, dim, seed=options.seed) if dim else None
        for dtype in DTYPES:
            size = bytes_of_image(tokens.shape[1], dim or teacher.dim, teacher.dim, dtype)
            rows[f"{dim or teacher.dim}, {dtype}"] = {
                "KiB an image": size / 2**10,
                **fidelity(measured, pca, dtype),
            }
    cells = [[row, *(f"{value:.2g}" for value in values.values())] for row, values in rows.items()]
    print(markdown_table(["dimensions, numbers", *next(iter(rows.values()))], cells))
    if own.report is not None:
        described = {"model": options.model, "images": len(measured), "rows": rows}
        write_json(own.report, described)
    return 0


@torch.no_grad()
def fidelity(tokens: Tensor, pca: TokenPCA | None, dtype: str) -> dict[str, float]:
    """Compare what would be stored with (B, P, D) float32 tokens."""
    projected = tokens if pca is None else pca(tokens)
    stored = torch.stack([unpack(pack(image, dtype), dtype) for image in projected]).float()
    difference = (_cosines(stored) - _cosines(tokens)).abs()
    return {
        "Gram loss": float(GramLoss()(stored, tokens)),
        "cosine, mean difference": float(difference.mean()),
        "cosine, largest difference": float(difference.max()),
    }


def _cosines(tokens: Tensor) -> Tensor:
    unit = F.normalize(tokens, dim=2)
    return unit @ unit.mT


if __name__ == "__main__":
    sys.exit(main())
