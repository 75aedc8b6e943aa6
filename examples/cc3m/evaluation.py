"""Measures of a two-tower model, as functions of its unit-norm features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import open_clip
import torch
from torch import Tensor, nn

TIE = 1e-6
"""Candidates that come this close to the match are as similar: sums of products are rounded."""
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


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance between the centroids of (N, D) unit-norm features: from 0 to 2 (Liang et al.)."""
    return float((images.mean(0) - texts.mean(0)).norm())


def alignment(images: Tensor, texts: Tensor) -> float:
    """Mean squared distance of matches, (N, D) unit-norm each: 0 is best (Wang and Isola)."""
    return float((images.double() - texts.double()).square().sum(1).mean())


def uniformity(images: Tensor, texts: Tensor) -> float:
    """log of the mean over pairs i > j of exp(-2 |v_i - t_j|^2): -8 at best, 0 if all coincide.

    As in CyCLIP's code: images against texts, of which only one triangle counts.
    """
    total, n = 0.0, len(images)
    for start in range(0, n, CHUNK):
        rows = images[start : start + CHUNK].double()
        kernel = torch.exp(4 * (rows @ texts.double().T) - 4)  # |v - t|^2 = 2 - 2 <v, t>
        total += float(kernel.tril(start - 1).sum())
    return math.log(total / (n * (n - 1) / 2)) if n > 1 and total else -math.inf


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 in both directions, by open_clip's names; features (N, D) unit-norm."""
    measured: dict[str, float] = {}
    for way, a, b in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        own = (a * b).sum(1)
        ranks = torch.cat(
            [
                (a[i : i + CHUNK] @ b.T >= own[i : i + CHUNK, None] - TIE).sum(1)
                for i in range(0, len(a), CHUNK)
            ]
        ).clamp(min=1)
        for k in (1, 5, 10):
            measured[f"{way}_R@{k}"] = float(recall_at(ranks, k).double().mean())
    return measured


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


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Whether each match, at `ranks` (N,), is among the first k: (N,) bool."""
    return ranks <= k


def mean_and_error(outcomes: Tensor) -> tuple[float, float]:
    """Mean of N outcomes and its standard error (NaN for a single one)."""
    values = outcomes.double()
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), error
