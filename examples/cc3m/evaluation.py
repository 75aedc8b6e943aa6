"""Measures of a two-tower model, as functions of its unit-norm features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import open_clip
import torch
from torch import Tensor, nn

from examples.evaluation.gap import alignment, modality_gap, uniformity
from examples.evaluation.retrieval import recall_at, retrieval

__all__ = [
    "alignment",
    "class_embeddings",
    "encode",
    "match_ranks",
    "mean_and_error",
    "modality_gap",
    "recall_at",
    "retrieval",
    "spearman",
    "uniformity",
    "zero_shot_hits",
]

CHUNK = 256
"""Samples encoded at a time."""


def match_ranks(similarity: Tensor) -> Tensor:
    """Place of each row's match among its candidates, 1 being the best.

    Args:
        similarity: (N, N), the match of row i is column i.

    Returns:
        (N,) int64. Candidates as similar as the match count as better ones, so that a collapsed
        model ranks last, not first.
    """
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def spearman(scores: Tensor, relevance: Tensor) -> Tensor:
    """Rank correlation of scores with graded relevance, of each row.

    Args:
        scores, relevance: (N, M); ties share the mean of their places.

    Returns:
        (N,) in [-1, 1], and 0 for a row that is constant in either.
    """
    a, b = _centred_places(scores), _centred_places(relevance)
    lengths: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / lengths.clamp(min=1e-12)


def _centred_places(x: Tensor) -> Tensor:
    x = x.contiguous()
    ordered = x.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, x)
    upto = torch.searchsorted(ordered, x, right=True)
    places = (below + upto).double() / 2
    return places - places.mean(1, keepdim=True)


def zero_shot_hits(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is nearest to its own class.

    Args:
        images: (N, D) unit-norm.
        classes: (C, D), from `class_embeddings`.
        labels: (N,) int64 class of each image.

    Returns:
        (N,) bool.
    """
    return (images @ classes.T).argmax(1) == labels


@torch.no_grad()
def encode(model: open_clip.CLIP, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm features, two of (N, D), of (N, 3, H, W) images and (N, L) tokens."""
    model.eval()
    image_features = [model.encode_image(x, normalize=True) for x in torch.split(images, CHUNK)]
    text_features = [model.encode_text(x, normalize=True) for x in torch.split(texts, CHUNK)]
    return torch.cat(image_features), torch.cat(text_features)


@torch.no_grad()
def class_embeddings(
    model: open_clip.CLIP, tokenize: Callable[[list[str]], Tensor], prompts: Sequence[list[str]]
) -> Tensor:
    """Zero-shot classifier, (C, D) unit-norm: the mean embedding of each class's prompts."""
    means = []
    for texts in prompts:
        means.append(model.encode_text(tokenize(texts), normalize=True).mean(0))
    return nn.functional.normalize(torch.stack(means), dim=1)


def mean_and_error(outcomes: Tensor) -> tuple[float, float]:
    """Mean of N outcomes and its standard error (NaN for a single one)."""
    values = outcomes.double()
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), error
