"""Zero-shot classification with open_clip's templates."""

from __future__ import annotations

import open_clip
import torch
from torch import Tensor

from examples.common.files import UserError
from examples.evaluation.data import Classification
from examples.evaluation.models import Model
from examples.evaluation.reading import Reading


@torch.no_grad()
def zero_shot(model: Model, data: Classification, reading: Reading) -> dict[str, float]:
    """Measure top-1 and top-5 accuracy, and the mean over classes of top-1; alike in every process.

    Raises:
        Stopped: some process was to stop.
        UserError: no image could be read.
    """
    classifier = _classifier(model, data.names, reading)
    hits, five, counts = torch.zeros(3, len(data.names), dtype=torch.int64).unbind()
    for images, labels in reading.batches(data):
        scores = model.images(images) @ classifier
        found = scores.topk(min(5, len(data.names)), dim=1).indices == labels[:, None]
        hits += torch.bincount(labels[found[:, 0]], minlength=len(hits))
        five += torch.bincount(labels[found.any(1)], minlength=len(hits))
        counts += torch.bincount(labels, minlength=len(hits))
    hits, five, counts = sum(reading.parallel.gather(torch.stack([hits, five, counts]))).unbind()
    total = int(counts.sum())
    if not total:
        raise UserError("no image for zero-shot classification could be read")
    there = counts > 0
    return {
        "zeroshot-top1": int(hits.sum()) / total,
        "zeroshot-top5": int(five.sum()) / total,
        "zeroshot-mean-class-recall": float((hits[there] / counts[there]).double().mean()),
    }


def _classifier(model: Model, names: list[str], reading: Reading) -> Tensor:
    """Return (D, C) mean embeddings of each class's prompts, made by all processes together."""
    rank, world = reading.parallel.rank, reading.parallel.world_size
    mine = None
    if names[rank::world]:
        with model.autocast():
            made = open_clip.build_zero_shot_classifier(
                model.network,
                tokenizer=model.tokenize,
                classnames=names[rank::world],
                templates=open_clip.OPENAI_IMAGENET_TEMPLATES,
                num_classes_per_batch=10,
                device=model.device,
            )
        mine = made.float().cpu()
    shares = [share for share in reading.parallel.gather(mine) if share is not None]
    classifier: Tensor = shares[0].new_empty(len(shares[0]), len(names))
    for place, share in enumerate(shares):
        classifier[:, place::world] = share
    return classifier
